//! Something that happened: `1\0SUBJECT\0EVENT\0KEY\0VALUE\0…\0`, again and again on one connection (`admin.Events`).

use crate::error::DecodeError;

/// Bytes of one event. Qubes' have some hundreds; the limit is that of a request, and bounds what a client holds.
pub const EVENT_BYTES_MAX: usize = 65536;

/// The mark in front of an event.
pub(crate) const EVENT: &[u8] = b"1\0";

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Event {
    /// The qube it happened to; empty if to none.
    pub subject: String,
    /// What: `domain-start`, `property-set:netvm`.
    pub name: String,
    /// More about it.
    pub details: Vec<(String, String)>,
}

impl Event {
    /// An event without details.
    pub fn new(subject: impl Into<String>, name: impl Into<String>) -> Event {
        Event { subject: subject.into(), name: name.into(), details: Vec::new() }
    }

    /// The same with one more detail.
    pub fn detail(mut self, key: impl Into<String>, value: impl Into<String>) -> Event {
        self.details.push((key.into(), value.into()));
        self
    }

    /// The value of a detail.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.details.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// The bytes for the socket. A detail without a key cannot be said, since an empty key ends the event: it is left out.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = EVENT.to_vec();
        let details = self.details.iter().filter(|(key, _)| !key.replace('\0', "").is_empty());
        let fields =
            [&self.subject, &self.name].into_iter().chain(details.flat_map(|(key, value)| [key, value]));
        for field in fields {
            bytes.extend(field.bytes().filter(|&byte| byte != 0)); // a zero byte would end the field
            bytes.push(0);
        }
        bytes.push(0);
        bytes
    }

    /// The first event of what has come so far, and how many bytes it has; `None` if there is more to come.
    pub fn decode(bytes: &[u8]) -> Result<Option<(Event, usize)>, DecodeError> {
        let wrong = |wrong| DecodeError::malformed("event", wrong);
        if !bytes.starts_with(EVENT) && !EVENT.starts_with(bytes) {
            return Err(wrong("does not begin like one"));
        }
        let bytes = &bytes[..bytes.len().min(EVENT_BYTES_MAX + 1)]; // no more of it can be one event
        let mut at = EVENT.len();
        let mut fields = Vec::new();
        let mut next = || {
            let rest = bytes.get(at..)?;
            let end = rest.iter().position(|&byte| byte == 0)?;
            at += end + 1;
            Some(&rest[..end])
        };
        while let Some(field) = next() {
            // Keys stand at the even places after subject and name; an empty one is the end.
            let is_end = field.is_empty() && fields.len() >= 2 && fields.len() % 2 == 0;
            if !is_end {
                fields.push(std::str::from_utf8(field).map_err(|_| wrong("is not UTF-8"))?.to_owned());
                continue;
            }
            return match at {
                0..=EVENT_BYTES_MAX => Ok(Event::of_fields(fields).map(|event| (event, at))),
                _ => Err(DecodeError::TooLong { what: "event", limit: EVENT_BYTES_MAX }),
            };
        }
        match bytes.len() {
            0..=EVENT_BYTES_MAX => Ok(None),
            _ => Err(DecodeError::TooLong { what: "event", limit: EVENT_BYTES_MAX }),
        }
    }

    fn of_fields(fields: Vec<String>) -> Option<Event> {
        let mut fields = fields.into_iter();
        let mut event = Event::new(fields.next()?, fields.next()?);
        while let (Some(key), Some(value)) = (fields.next(), fields.next()) {
            event.details.push((key, value));
        }
        Some(event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn it_is_what_qubesd_sends() {
        let set =
            Event::new("work", "property-set:netvm").detail("name", "netvm").detail("newvalue", "sys-net");
        assert_eq!(set.encode(), b"1\0work\0property-set:netvm\0name\0netvm\0newvalue\0sys-net\0\0");
        assert_eq!(set.get("newvalue"), Some("sys-net"));
        assert_eq!(Event::new("", "connection-established").encode(), b"1\0\0connection-established\0\0");
    }

    #[test]
    fn one_that_is_not_whole_yet_waits() {
        let bytes = Event::new("work", "domain-start").detail("start_guid", "").encode();
        for end in 0..bytes.len() {
            assert_eq!(Event::decode(&bytes[..end]), Ok(None), "{end}");
        }
        assert!(Event::decode(b"0\0").is_err());
        assert!(Event::decode(b"1\0\xff\0").is_err());
        assert!(matches!(
            Event::decode(&[b"1\0", &[b'x'; EVENT_BYTES_MAX][..]].concat()),
            Err(DecodeError::TooLong { .. })
        ));
    }

    proptest! {
        #[test]
        fn events_come_back_one_after_the_other(
            subject in "[a-z]{0,9}", name in "[a-z:]{1,9}", details in prop::collection::vec(("[a-z]{1,5}", "[a-zé]{0,5}"), 0..4),
            rest: Vec<u8>,
        ) {
            let event = Event { subject, name, details };
            let bytes = event.encode();
            let stream = [&bytes[..], &rest].concat();
            prop_assert_eq!(Event::decode(&stream).unwrap(), Some((event, bytes.len())));
        }
    }
}
