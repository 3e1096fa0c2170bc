//! What the binaries say: errors once, with their sources and the next command; numbers people can read.

use std::error::Error as _;
use std::path::Path;

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

/// The text without the files it names, for somebody who is not to know where ours are: each absolute path gives way to a word, and what is
/// left still says what was not done, and why.
pub fn without_paths(text: &str, root: &Path) -> String {
    // The one path that may have spaces.
    let text = match root.is_absolute() && root.parent().is_some() {
        true => text.replace(&*root.to_string_lossy(), "/-"),
        false => text.to_owned(),
    };
    let (mut told, mut before, mut rest) = (String::with_capacity(text.len()), ' ', text.as_str());
    while let Some(next) = rest.chars().next() {
        let path = if next == '/' && !before.is_alphanumeric() { path_len(rest) } else { 0 };
        let is_path = path > next.len_utf8();
        let (taken, left) = rest.split_at(if is_path { path } else { next.len_utf8() });
        told.push_str(if is_path { "(a file)" } else { taken });
        (before, rest) = (next, left);
    }
    told
}

/// Up to where the path reaches that the text begins with: at what stands around paths in our texts, but for a stop within it.
fn path_len(text: &str) -> usize {
    let end = text.find(|c: char| c.is_whitespace() || "'\"`,;()".contains(c)).unwrap_or(text.len());
    text.get(..end).map_or(end, |path| path.trim_end_matches(['.', ':']).len())
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
    fn a_text_without_paths_says_the_rest() {
        let root = Path::new("/var/lib/my state");
        for (text, told) in [
            (
                "cannot link /var/lib/my state/qubes/a/private/3.img: No space",
                "cannot link (a file): No space",
            ),
            (
                "cannot read '/etc/x.y': gone\nHint: `make /tmp/é`",
                "cannot read '(a file)': gone\nHint: `make (a file)`",
            ),
            ("/proc/1/fd is, and /var/lib/my state.", "(a file) is, and (a file)."),
            ("what and/or how, 5 MiB/s, é / x", "what and/or how, 5 MiB/s, é / x"),
            ("", ""),
        ] {
            assert_eq!(without_paths(text, root), told);
        }
        assert_eq!(without_paths("in /a: no", Path::new("/")), "in (a file): no");
    }

    #[test]
    fn sizes() {
        assert_eq!(bytes_text(512), "512 B");
        assert_eq!(bytes_text(3 << 20), "3.0 MiB");
    }
}
