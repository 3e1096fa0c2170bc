//! The texts that methods take and give: lists of qubes, properties, `key=value` pairs.
//!
//! Written from QubesOS/qubes-core-admin `qubes/api/admin.py` (vm_list, _serialize_property, _property_get_all,
//! vm_current_state, vm_volume_info, _vm_create) and what QubesOS/qubes-core-admin-client `qubesadmin/base.py` reads.

use std::fmt;

use crate::error::DecodeError;

/// A line of `admin.vm.List`: `NAME class=CLASS state=STATE uuid=UUID`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Qube {
    /// Its name.
    pub name: String,
    /// `AppVM`, `TemplateVM`, `DispVM`, `StandaloneVM`, `AdminVM` …
    pub class: String,
    /// `Running`, `Halted`, `Paused`, `Transient`, `Halting`, `Dying`, `Crashed`, `Suspended`, `NA`.
    pub state: String,
    /// Its UUID; servers before R4.2 say none.
    pub uuid: Option<String>,
}

impl fmt::Display for Qube {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} class={} state={}", self.name, self.class, self.state)?;
        self.uuid.iter().try_for_each(|uuid| write!(f, " uuid={uuid}"))
    }
}

impl Qube {
    /// One line. Words that are not known are passed over, as newer servers say more.
    pub fn parse(line: &str) -> Result<Qube, DecodeError> {
        let wrong = |wrong| DecodeError::malformed("line of admin.vm.List", wrong);
        let (name, rest) = line.split_once(' ').ok_or(wrong("has one word"))?;
        let find = |key| pairs(rest, ' ').find(|(name, _)| *name == key).map(|(_, value)| value.to_owned());
        if name.is_empty() {
            return Err(wrong("begins with a space"));
        }
        Ok(Qube {
            name: name.to_owned(),
            class: find("class").ok_or(wrong("has no class="))?,
            state: find("state").ok_or(wrong("has no state="))?,
            uuid: find("uuid"),
        })
    }

    /// All lines of an answer.
    pub fn parse_all(answer: &[u8]) -> Result<Vec<Qube>, DecodeError> {
        lines("answer of admin.vm.List", answer)?.map(Qube::parse).collect()
    }
}

/// What a property's value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    /// Text.
    Str,
    /// `True`, `False`, or none.
    Bool,
    /// A number, or none.
    Int,
    /// A qube, or none.
    Vm,
    /// A label, or none.
    Label,
}

const TYPES: [(Type, &str); 5] =
    [(Type::Str, "str"), (Type::Bool, "bool"), (Type::Int, "int"), (Type::Vm, "vm"), (Type::Label, "label")];

impl Type {
    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        TYPES.iter().find(|(kind, _)| *kind == self).map_or("str", |(_, name)| name)
    }

    fn of_word(word: &str) -> Result<Type, DecodeError> {
        let name = word.strip_prefix("type=").ok_or(property("has no type="))?;
        TYPES
            .iter()
            .find(|(_, known)| *known == name)
            .map(|(kind, _)| *kind)
            .ok_or(property("has a type that is not known"))
    }
}

/// A property's value as `admin.*property.Get` says it: `default=True|False type=TYPE VALUE`. `admin.*property.GetDefault`
/// says the same without its first word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Property {
    /// Whether nobody has set it.
    pub is_default: bool,
    /// What it is.
    pub kind: Type,
    /// Its value; empty for no number, no qube, no label.
    pub value: String,
}

impl Property {
    /// A property's value.
    pub fn new(is_default: bool, kind: Type, value: impl Into<String>) -> Property {
        Property { is_default, kind, value: value.into() }
    }

    /// As `Get` says it, with its newlines as they are.
    pub fn encode(&self) -> String {
        let default = if self.is_default { "True" } else { "False" };
        format!("default={default} {}", self.encode_default())
    }

    /// As `GetDefault` says it.
    pub fn encode_default(&self) -> String {
        format!("type={} {}", self.kind.name(), self.value)
    }

    /// An answer of `Get`.
    pub fn decode(answer: &str) -> Result<Property, DecodeError> {
        let (default, rest) = answer.split_once(' ').ok_or(property("has one word"))?;
        let is_default = match default {
            "default=True" => true,
            "default=False" => false,
            _ => return Err(property("begins with neither default=True nor default=False")),
        };
        Ok(Property { is_default, ..Property::decode_default(rest)? })
    }

    /// An answer of `GetDefault`, unless it is empty, which says that there is no default.
    pub fn decode_default(answer: &str) -> Result<Property, DecodeError> {
        let (kind, value) = answer.split_once(' ').ok_or(property("has no value"))?;
        Ok(Property::new(true, Type::of_word(kind)?, value))
    }

    /// A line of `GetAll`, with its newline: the name, then as `Get` says it with `\` as `\\` and newlines as `\n`.
    pub fn encode_line(&self, name: &str) -> String {
        format!("{name} {}\n", self.encode().replace('\\', "\\\\").replace('\n', "\\n"))
    }

    /// All lines of an answer of `GetAll`.
    pub fn decode_lines(answer: &[u8]) -> Result<Vec<(String, Property)>, DecodeError> {
        let line = |line: &str| {
            let line = unescape(line)?;
            let (name, rest) = line.split_once(' ').ok_or(property("has one word"))?;
            Ok((name.to_owned(), Property::decode(rest)?))
        };
        lines("answer of property.GetAll", answer)?.map(line).collect()
    }
}

fn property(wrong: &'static str) -> DecodeError {
    DecodeError::malformed("property", wrong)
}

fn unescape(line: &str) -> Result<String, DecodeError> {
    let mut text = String::with_capacity(line.len());
    let mut chars = line.chars();
    while let Some(char) = chars.next() {
        text.push(match char {
            '\\' => match chars.next() {
                Some('n') => '\n',
                Some('\\') => '\\',
                _ => return Err(property("has a backslash before neither n nor another")),
            },
            other => other,
        });
    }
    Ok(text)
}

/// The lines of an answer, which is UTF-8.
pub fn lines<'a>(what: &'static str, answer: &'a [u8]) -> Result<impl Iterator<Item = &'a str>, DecodeError> {
    let text = std::str::from_utf8(answer).map_err(|_| DecodeError::malformed(what, "is not UTF-8"))?;
    Ok(text.split_terminator('\n'))
}

/// The `key=value` pairs of a text: divided by newlines in answers of `admin.vm.volume.Info`, by spaces in those of
/// `admin.vm.CurrentState` and in payloads of `admin.vm.Create.*`. What has no `=` is passed over.
pub fn pairs(text: &str, between: char) -> impl Iterator<Item = (&str, &str)> {
    text.split(between).filter_map(|pair| pair.split_once('='))
}

/// A boolean as properties have it.
pub fn bool_text(value: bool) -> &'static str {
    match value {
        true => "True",
        false => "False",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lists_of_qubes_are_read() {
        let list = Qube::parse_all(
            b"dom0 class=AdminVM state=Running\ndisp42 class=DispVM state=Running uuid=7-8 new=1\n",
        )
        .unwrap();
        assert_eq!(list[0].to_string(), "dom0 class=AdminVM state=Running");
        assert_eq!(list[1].to_string(), "disp42 class=DispVM state=Running uuid=7-8");
        assert_eq!(Qube::parse_all(b"").unwrap(), []);
        for wrong in [&b"work"[..], b"work class=AppVM\n", b" class=AppVM state=Halted\n", b"\n", b"\xff\n"] {
            assert!(Qube::parse_all(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn properties_are_what_qubesd_says() {
        let netvm = Property::new(false, Type::Vm, "");
        assert_eq!(netvm.encode(), "default=False type=vm ");
        assert_eq!(Property::decode("default=False type=vm "), Ok(netvm));
        let help = Property::new(true, Type::Str, "a b\n\\n");
        assert_eq!(help.encode_line("kernelopts"), "kernelopts default=True type=str a b\\n\\\\n\n");
        for wrong in [
            "",
            "default=True",
            "default=true type=str x",
            "default=True type=str",
            "default=True type=list x",
        ] {
            assert!(Property::decode(wrong).is_err(), "{wrong:?}");
        }
        assert!(Property::decode_lines(b"a default=True type=str \\x\n").is_err());
        assert!(Property::decode_lines(b"a default=True type=str \\").is_err());
    }

    #[test]
    fn pairs_may_have_anything_as_a_value() {
        assert_eq!(
            pairs("a=1\nb=c=d\nx\ne=", '\n').collect::<Vec<_>>(),
            [("a", "1"), ("b", "c=d"), ("e", "")]
        );
    }

    proptest! {
        #[test]
        fn properties_come_back(all in prop::collection::vec(("[a-z_]{1,9}", any::<bool>(), 0..5usize, "[a-z\\\\\né ]{0,9}"), 0..5)) {
            let all: Vec<_> = all.into_iter().map(|(name, is_default, kind, value)|
                (name, Property::new(is_default, TYPES[kind].0, value))).collect();
            let text: String = all.iter().map(|(name, property)| property.encode_line(name)).collect();
            prop_assert_eq!(Property::decode_lines(text.as_bytes()).unwrap(), all);
        }

        #[test]
        fn no_bytes_panic(bytes: Vec<u8>, text in ".{0,40}") {
            let _ = (Qube::parse_all(&bytes), Property::decode_lines(&bytes), Property::decode(&text), Qube::parse(&text));
        }
    }
}
