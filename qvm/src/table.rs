//! Tables as `column -t` draws them, which the stock client calls: every column but the last is filled up, two spaces apart.

/// The rows, each a line.
pub fn draw<R: AsRef<[String]>>(rows: &[R]) -> String {
    let columns = rows.iter().map(|row| row.as_ref().len()).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.as_ref().get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let row = row.as_ref();
        for (at, (cell, width)) in row.iter().zip(&widths).enumerate() {
            match at + 1 == row.len() {
                true => text.push_str(cell),
                false => text.push_str(&format!("{cell:width$}  ")),
            }
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::draw;

    #[test]
    fn columns_are_as_wide_as_what_is_in_them() {
        let rows = [["NAME", "STATE"].map(String::from), ["sys-net", ""].map(String::from)];
        assert_eq!(draw(&rows), "NAME     STATE\nsys-net  \n");
        assert_eq!(draw::<[String; 0]>(&[]), "");
    }
}
