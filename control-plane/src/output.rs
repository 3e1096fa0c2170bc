//! What the binaries say: errors once, with their sources and the next command; numbers people can read.

use std::error::Error as _;

use crate::error::Error;

/// An error as users read it: message, causes, hint.
pub fn error_text(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    if let Some(hint) = error.hint_text() {
        text.push_str("\nHint: ");
        text.push_str(hint);
    }
    text
}

/// Bytes in the largest unit that leaves at least one digit before the point.
pub fn bytes_text(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{bytes} B")
    } else {
        format!("{value:.1} {}", units[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn an_error_is_told_once_with_its_cause_and_hint() {
        let error = Error::new(Kind::Failed, "cannot read X")
            .because(std::io::Error::other("it is gone"))
            .hint("`make X`");
        assert_eq!(error_text(&error), "cannot read X: it is gone\nHint: `make X`");
    }

    #[test]
    fn sizes() {
        assert_eq!(bytes_text(512), "512 B");
        assert_eq!(bytes_text(3 << 20), "3.0 MiB");
    }
}
