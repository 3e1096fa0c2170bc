//! In which order the rows stand: as a tree of networks, or sorted by a column.

use super::columns::Row;

/// Columns that are numbers (SORT_NUMERIC of the stock client).
const NUMERIC: [&str; 13] = [
    "MEMORY",
    "DISK",
    "PRIV-CURR",
    "PRIV-MAX",
    "ROOT-CURR",
    "XID",
    "ROOT-MAX",
    "MAXMEM",
    "QREXEC-TIMEOUT",
    "SHUTDOWN-TIMEOUT",
    "VCPUS",
    "PRIV-USED",
    "ROOT-USED",
];

/// How to sort.
#[derive(clap::Args)]
pub struct Sort {
    /// Sort by this column, which must be shown
    #[arg(long, value_name = "COLUMN", default_value = "NAME")]
    sort: String,
    /// From the last to the first
    #[arg(long)]
    reverse: bool,
    /// Sort as if there were no capital letters
    #[arg(long)]
    ignore_case: bool,
}

impl Sort {
    /// Sorts rows that have these heads. Rows that are alike stay in their order.
    pub fn apply(&self, heads: &[String], rows: &mut [Vec<String>]) {
        let head = self.sort.replace('_', "-").to_uppercase();
        let Some(at) = heads.iter().position(|known| *known == head) else { return };
        let is_numeric = NUMERIC.contains(&&head[..]);
        let key = |row: &Vec<String>| {
            let text = row.get(at).map_or("", String::as_str);
            let number = text.trim_end_matches('%').parse().unwrap_or(0);
            let text = if self.ignore_case { text.to_uppercase() } else { text.to_owned() };
            if is_numeric {
                (number, String::new())
            } else {
                (0u64, text)
            }
        };
        rows.sort_by(|one, other| match self.reverse {
            false => key(one).cmp(&key(other)),
            true => key(other).cmp(&key(one)),
        });
    }
}

/// The rows as a tree, each under its netvm, and how deep it stands: first those that have and give no network.
pub fn tree(rows: &[Row]) -> Vec<(usize, &Row)> {
    let is_root =
        |row: &&Row| netvm(row).is_none_or(|netvm| rows.iter().all(|other| other.qube.name != netvm));
    let gives = |row: &&Row| row.property("provides_network").is_some_and(|value| value == "True");
    let (givers, others): (Vec<&Row>, Vec<&Row>) = rows.iter().filter(is_root).partition(gives);
    let mut tree = Vec::new();
    for root in others.into_iter().chain(givers) {
        branch(rows, root, 0, &mut tree);
    }
    tree
}

fn branch<'a>(rows: &'a [Row], row: &'a Row, depth: usize, tree: &mut Vec<(usize, &'a Row)>) {
    tree.push((depth, row));
    for child in rows.iter().filter(|child| netvm(child) == Some(&row.qube.name)) {
        branch(rows, child, depth + 1, tree);
    }
}

fn netvm(row: &Row) -> Option<&str> {
    row.property("netvm").map(String::as_str)
}

/// A name in the tree.
pub fn indented(depth: usize, name: &str) -> String {
    match depth.checked_sub(1) {
        None => name.to_owned(),
        Some(above) => format!("{}└─{name}", "  ".repeat(above)),
    }
}
