//! Which names may be sent and received: relative, of plain components, and nowhere out of the folder that receives. The rules are
//! those of qrexec-lib/unicode.c; only its list of what is safe to show is longer than our rule.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use rustix::io::Errno;

/// Longest name, and longest target of a link, in bytes without a NUL (MAX_PATH_LENGTH of the stock header, less its NUL and one
/// that it keeps free).
pub const NAME_BYTES_MAX: usize = 16382;

/// What a name may consist of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Characters {
    /// UTF-8 that shows itself: no control characters, nothing without width, nothing that changes the direction of a line.
    Displayable,
    /// Any bytes but NUL.
    Any,
}

impl Characters {
    fn allow(self, bytes: &[u8]) -> bool {
        match self {
            Characters::Any => !bytes.contains(&0),
            Characters::Displayable => {
                std::str::from_utf8(bytes).is_ok_and(|text| text.chars().all(is_displayable))
            }
        }
    }
}

fn is_displayable(char: char) -> bool {
    let is_hidden = matches!(char,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e0fff}');
    !char.is_control() && !is_hidden
}

/// Why a name is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadName {
    /// It is too long.
    #[error("the name is longer than {NAME_BYTES_MAX} bytes")]
    TooLong,
    /// It is not a path of plain components, or has characters it may not have.
    #[error("the name is absolute, empty, has a component that is empty, `.` or `..`, or characters that do not show themselves")]
    Illegal,
    /// A symbolic link leads out of the folder that was sent, or was sent without any.
    #[error("the symbolic link leads out of the folder that is sent, or is not in one")]
    LeadsOut,
}

impl BadName {
    /// What the sender is told.
    pub fn errno(self) -> Errno {
        match self {
            BadName::TooLong => Errno::NAMETOOLONG,
            BadName::Illegal => Errno::ILSEQ,
            BadName::LeadsOut => Errno::NOLINK,
        }
    }
}

/// A name that may be used: relative, without `.`, `..`, empty components and NUL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name(Vec<u8>);

impl Name {
    /// Checks a name.
    pub fn parse(bytes: &[u8], characters: Characters) -> Result<Name, BadName> {
        if bytes.len() > NAME_BYTES_MAX {
            return Err(BadName::TooLong);
        }
        if !characters.allow(bytes) || !components(bytes).all(is_plain) {
            return Err(BadName::Illegal);
        }
        Ok(Name(bytes.to_vec()))
    }

    /// The name of what is in this folder.
    pub fn join(&self, last: &[u8], characters: Characters) -> Result<Name, BadName> {
        Name::parse(&[&self.0, &b"/"[..], last].concat(), characters)
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The folder it is in, `.` for the outermost, and its last component.
    pub fn split(&self) -> (&OsStr, &OsStr) {
        let slash = self.0.iter().rposition(|byte| *byte == b'/');
        let (folder, last) = match slash.and_then(|at| self.0.split_at_checked(at)) {
            Some((folder, rest)) => (folder, rest.get(1..).unwrap_or_default()),
            None => (&b"."[..], &self.0[..]),
        };
        (OsStr::from_bytes(folder), OsStr::from_bytes(last))
    }

    fn depth(&self) -> usize {
        components(&self.0).count()
    }
}

/// Whether a symbolic link of this name may have this target: relative, `..` in front only, and never out of the outermost folder of
/// those that were sent, so that what was received can be moved and still leads nowhere else.
pub fn check_link(name: &Name, target: &[u8], characters: Characters) -> Result<(), BadName> {
    if target.len() > NAME_BYTES_MAX {
        return Err(BadName::TooLong);
    }
    if !characters.allow(target) {
        return Err(BadName::Illegal);
    }
    let up_max = name.depth().checked_sub(2).ok_or(BadName::LeadsOut)?;
    let target = target.strip_suffix(b"/").unwrap_or(target);
    let up = components(target).take_while(|component| *component == b"..").count();
    match up <= up_max && components(target).skip(up).all(is_plain) {
        true => Ok(()),
        false => Err(BadName::LeadsOut),
    }
}

fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/')
}

fn is_plain(component: &[u8]) -> bool {
    !matches!(component, b"" | b"." | b"..")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Characters::{Any, Displayable};
    use super::*;

    #[test]
    fn a_name_leads_down_only() {
        for good in ["a", "a/b", ".a", "..a", "a/..b/...", "ä€/日本", "with space", "-rf", "a\\b"] {
            assert!(Name::parse(good.as_bytes(), Displayable).is_ok(), "{good}");
        }
        for bad in
            ["", "/", "/a", "a/", "a//b", ".", "..", "./a", "../a", "a/.", "a/..", "a/./b", "a/../b", "a\0b"]
        {
            assert_eq!(Name::parse(bad.as_bytes(), Any), Err(BadName::Illegal), "{bad:?}");
            assert_eq!(Name::parse(bad.as_bytes(), Displayable), Err(BadName::Illegal), "{bad:?}");
        }
        assert_eq!(Name::parse(&[b'a'; NAME_BYTES_MAX + 1], Any), Err(BadName::TooLong));
    }

    #[test]
    fn what_does_not_show_itself_needs_a_permission() {
        let hidden =
            [&b"a\nb"[..], b"\x1b[2J", b"\x7f", b"\xff", "a\u{9b}".as_bytes(), "\u{202e}fdp.exe".as_bytes()];
        for name in hidden {
            assert_eq!(Name::parse(name, Displayable), Err(BadName::Illegal), "{name:?}");
            assert!(Name::parse(name, Any).is_ok(), "{name:?}");
        }
    }

    #[test]
    fn a_link_stays_in_the_outermost_folder() {
        let check = |name: &str, target: &str| {
            check_link(&Name::parse(name.as_bytes(), Any).unwrap(), target.as_bytes(), Any)
        };
        for (name, target) in
            [("a/b", "a"), ("a/b/c", "../a"), ("a/b", "c/d/"), ("a/b/c/d", "../../e"), ("a/b/c", "..")]
        {
            assert_eq!(check(name, target), Ok(()), "{name} -> {target}");
        }
        let out = [
            ("a", "b"),
            ("a/b", "../a"),
            ("a/b", ".."),
            ("a/b/c", "../../a"),
            ("a/b/c", "/a"),
            ("a/b", "/"),
            ("a/b", ""),
        ];
        let detours = [
            ("a/b/c", "x/../../.."),
            ("a/b/c", "x/.."),
            ("a/b", "./x"),
            ("a/b", "x//y"),
            ("a/b/c", "../x/../../.."),
        ];
        for (name, target) in out.into_iter().chain(detours) {
            assert_eq!(check(name, target), Err(BadName::LeadsOut), "{name} -> {target}");
        }
    }

    proptest! {
        #[test]
        fn no_name_and_no_link_leads_out(name in "[ab./]{0,12}", target in "[ab./]{0,12}") {
            let Ok(name) = Name::parse(name.as_bytes(), Any) else { return Ok(()) };
            // Where the link leads, step by step as the kernel goes: never above the first component.
            if check_link(&name, target.as_bytes(), Any).is_ok() {
                let mut depth = name.depth() - 1;
                for step in target.split('/') {
                    match step {
                        "" | "." => {}
                        ".." => depth -= 1,
                        _ => depth += 1,
                    }
                    prop_assert!(depth >= 1, "{:?} -> {}", name, target);
                }
            }
        }
    }
}
