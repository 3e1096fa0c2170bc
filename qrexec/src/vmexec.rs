//! The argument of `qubes.VMExec`: an argument vector as one service argument.
//!
//! Shape: the arguments in their order, a `+` between two. In an argument letters, digits, `_` and `.` stand for themselves, `--` for a
//! hyphen, and `-XX` for the byte with this number, two upper-case hexadecimal digits.
//!
//! Invariants: each argument vector has one encoding, and only encodings decode; a NUL, which no argument can hold, is refused.
//!
//! Source: QubesOS/qubes-core-admin-client, `qubesadmin/utils.py` (encoding); QubesOS/qubes-core-agent-linux,
//! `qubesagent/vmexec.py` (decoding), both R4.1 and later.

/// Why something is no encoded argument vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("byte {at} of the service's argument is no part of an encoded command")]
pub struct NotEncoded {
    /// Where.
    pub at: usize,
}

/// Encodes a vector of at least one argument.
pub fn encode<A: AsRef<[u8]>>(argv: &[A]) -> String {
    let mut text = String::new();
    for (at, argument) in argv.iter().enumerate() {
        if at > 0 {
            text.push('+');
        }
        for byte in argument.as_ref() {
            match byte {
                b'-' => text.push_str("--"),
                plain if is_plain(*plain) => text.push(char::from(*plain)),
                other => text.push_str(&format!("-{other:02X}")),
            }
        }
    }
    text
}

/// Decodes it.
pub fn decode(text: &[u8]) -> Result<Vec<Vec<u8>>, NotEncoded> {
    let mut argv = vec![Vec::new()];
    let mut at = 0;
    while let Some(rest) = text.get(at..).filter(|rest| !rest.is_empty()) {
        let (byte, length) = match rest {
            [b'+', ..] => {
                argv.push(Vec::new());
                at += 1;
                continue;
            }
            [b'-', b'-', ..] => (b'-', 2),
            [b'-', high, low, ..] => (escaped(*high, *low).ok_or(NotEncoded { at })?, 3),
            [plain, ..] if is_plain(*plain) => (*plain, 1),
            _ => return Err(NotEncoded { at }),
        };
        argv.last_mut().into_iter().for_each(|argument| argument.push(byte));
        at += length;
    }
    Ok(argv)
}

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'.'
}

/// The byte of an escape, if it needs one and an argument can hold it.
fn escaped(high: u8, low: u8) -> Option<u8> {
    let digit = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'A'..=b'F' => Some(digit - b'A' + 10),
        _ => None,
    };
    let byte = digit(high)? << 4 | digit(low)?;
    (byte != 0).then_some(byte)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn commands_are_encoded_as_the_stock_client_does() {
        assert_eq!(encode(&["ls", "-la", "a b"]), "ls+--la+a-20b");
        assert_eq!(encode(&["printf", "%s\n", "ü+"]), "printf+-25s-0A+-C3-BC-2B");
        assert_eq!(encode(&["", ""]), "+");
    }

    #[test]
    fn what_no_command_is_encoded_as_is_refused_with_its_place() {
        for (text, at) in
            [("a-", 1), ("a-4", 1), ("a-4g", 1), ("-c3", 0), ("x+-00", 2), ("a b", 1), ("a/b", 1)]
        {
            assert_eq!(decode(text.as_bytes()), Err(NotEncoded { at }), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_comes_back(argv in prop::collection::vec(prop::collection::vec(1u8.., 0..20), 1..6)) {
            prop_assert_eq!(decode(encode(&argv).as_bytes()), Ok(argv));
        }

        #[test]
        fn any_bytes_are_decoded_or_refused(text in prop::collection::vec(any::<u8>(), 0..60)) {
            let _ = decode(&text);
        }
    }
}
