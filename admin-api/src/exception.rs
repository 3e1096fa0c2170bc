//! A failure that qubesd tells its client about: `TYPE\0TRACEBACK\0FORMAT\0ARGUMENT\0…`.
//!
//! The client fills the arguments into the format as Python's `%` does, so a `%` of an ordinary message has to be doubled;
//! [`Exception::new`] does it. Numbers are filled in as numbers (qubesadmin/exc.py, QubesException).

use std::fmt;

use crate::error::DecodeError;

/// What the classes of Qubes' exceptions are called, of those a front end or a server of ours has to do with. The names are
/// those of qubes/exc.py (core-admin) and qubesadmin/exc.py (core-admin-client).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// The base of all others.
    QubesException,
    /// No such domain.
    VmNotFound,
    /// There is such a domain already.
    VmAlreadyExists,
    /// Something is wrong with the domain's state.
    Vm,
    /// The domain cannot be removed or changed while others need it.
    VmInUse,
    /// The domain is powered off.
    VmNotStarted,
    /// The domain is powered off or paused.
    VmNotRunning,
    /// The domain is not paused.
    VmNotPaused,
    /// The domain is not powered off.
    VmNotHalted,
    /// The domain did not shut down in time.
    VmShutdownTimeout,
    /// The domain's template is not there.
    NoTemplate,
    /// A value that cannot be.
    Value,
    /// A value that this property cannot have.
    PropertyValue,
    /// No such property.
    NoSuchProperty,
    /// There is no such function here.
    NotImplemented,
    /// Not enough memory to start the domain.
    Memory,
    /// The feature is not set.
    FeatureNotFound,
    /// The tag is not set.
    TagNotFound,
    /// No such label.
    LabelNotFound,
    /// No such pool.
    PoolNotFound,
    /// No such volume.
    VolumeNotFound,
    /// No such revision of the volume.
    VolumeRevisionNotFound,
    /// The store of volumes failed.
    StoragePool,
    /// The call itself is wrong.
    Protocol,
    /// The caller may not do this.
    PermissionDenied,
    /// Any other, by its class's name.
    Other(String),
}

const NAMES: &[(Kind, &str)] = &[
    (Kind::QubesException, "QubesException"),
    (Kind::VmNotFound, "QubesVMNotFoundError"),
    (Kind::VmAlreadyExists, "QubesVMAlreadyExistsError"),
    (Kind::Vm, "QubesVMError"),
    (Kind::VmInUse, "QubesVMInUseError"),
    (Kind::VmNotStarted, "QubesVMNotStartedError"),
    (Kind::VmNotRunning, "QubesVMNotRunningError"),
    (Kind::VmNotPaused, "QubesVMNotPausedError"),
    (Kind::VmNotHalted, "QubesVMNotHaltedError"),
    (Kind::VmShutdownTimeout, "QubesVMShutdownTimeoutError"),
    (Kind::NoTemplate, "QubesNoTemplateError"),
    (Kind::Value, "QubesValueError"),
    (Kind::PropertyValue, "QubesPropertyValueError"),
    (Kind::NoSuchProperty, "QubesNoSuchPropertyError"),
    (Kind::NotImplemented, "QubesNotImplementedError"),
    (Kind::Memory, "QubesMemoryError"),
    (Kind::FeatureNotFound, "QubesFeatureNotFoundError"),
    (Kind::TagNotFound, "QubesTagNotFoundError"),
    (Kind::LabelNotFound, "QubesLabelNotFoundError"),
    (Kind::PoolNotFound, "QubesPoolNotFoundError"),
    (Kind::VolumeNotFound, "QubesVolumeNotFoundError"),
    (Kind::VolumeRevisionNotFound, "QubesVolumeRevisionNotFoundError"),
    (Kind::StoragePool, "StoragePoolException"),
    (Kind::Protocol, "ProtocolError"),
    (Kind::PermissionDenied, "PermissionDenied"),
];

impl Kind {
    /// The class's name, as it stands on the wire.
    pub fn name(&self) -> &str {
        match self {
            Kind::Other(name) => name,
            kind => NAMES.iter().find(|(known, _)| known == kind).map_or("QubesException", |(_, name)| name),
        }
    }

    /// The kind with this name.
    pub fn from_name(name: &str) -> Kind {
        let known = NAMES.iter().find(|(_, known)| *known == name);
        known.map_or_else(|| Kind::Other(name.to_owned()), |(kind, _)| kind.clone())
    }
}

/// A failure as it goes over the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exception {
    /// Its class.
    pub kind: Kind,
    /// Where it was raised, if qubesd is made to say.
    pub traceback: String,
    /// The message, with `%s` for each argument and `%%` for a percent sign.
    pub format: String,
    /// What is to be filled in.
    pub arguments: Vec<String>,
}

impl Exception {
    /// One with a plain message.
    pub fn new(kind: Kind, message: &str) -> Exception {
        let format = message.replace('%', "%%");
        Exception { kind, traceback: String::new(), format, arguments: Vec::new() }
    }

    /// The message with its arguments in it. What the format asks for and is not there stays as it stands.
    pub fn message(&self) -> String {
        let mut arguments = self.arguments.iter();
        let mut message = String::with_capacity(self.format.len());
        let mut rest = self.format.as_str();
        while let Some(at) = rest.find('%') {
            message.push_str(&rest[..at]);
            let mut after = rest[at + 1..].chars();
            match after.next() {
                Some('%') => message.push('%'),
                Some('s' | 'd' | 'i') if arguments.len() > 0 => {
                    message.push_str(arguments.next().map_or("", String::as_str))
                }
                Some('r') if arguments.len() > 0 => {
                    message.extend(arguments.next().map(|argument| format!("'{argument}'")))
                }
                Some(other) => message.extend(['%', other]),
                None => message.push('%'),
            }
            rest = after.as_str();
        }
        message + rest
    }

    /// What follows `2\0`.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let fields = [self.kind.name(), &self.traceback, &self.format];
        let mut bytes = Vec::new();
        for field in fields.into_iter().chain(self.arguments.iter().map(String::as_str)) {
            bytes.extend(field.bytes().filter(|&byte| byte != 0)); // a zero byte would end the field
            bytes.push(0);
        }
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Exception, DecodeError> {
        let wrong = |wrong| DecodeError::malformed("exception", wrong);
        let fields = bytes.strip_suffix(b"\0").ok_or(wrong("does not end in a zero byte"))?;
        let fields = std::str::from_utf8(fields).map_err(|_| wrong("is not UTF-8"))?;
        let mut fields = fields.split('\0').map(str::to_owned);
        let mut next = || fields.next().ok_or(wrong("has fewer than three fields"));
        let (name, traceback, format) = (next()?, next()?, next()?);
        Ok(Exception { kind: Kind::from_name(&name), traceback, format, arguments: fields.collect() })
    }
}

impl fmt::Display for Exception {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message())
    }
}

impl std::error::Error for Exception {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_keeps_its_name() {
        for (kind, name) in NAMES {
            assert_eq!((kind.name(), &Kind::from_name(name)), (*name, kind));
        }
        assert_eq!(Kind::from_name("DeviceNotFound").name(), "DeviceNotFound");
    }

    #[test]
    fn arguments_are_filled_in_as_python_does() {
        let exception = Exception {
            format: "%s of %r: 100%%, %d left %".into(),
            arguments: vec!["part".into(), "work".into(), "3".into()],
            ..Exception::new(Kind::Value, "")
        };
        assert_eq!(exception.message(), "part of 'work': 100%, 3 left %");
        let short = Exception { arguments: vec![], ..exception };
        assert_eq!(short.message(), "%s of %r: 100%, %d left %");
    }

    #[test]
    fn a_percent_sign_of_a_message_survives_the_client() {
        let exception = Exception::new(Kind::Value, "90 %s of é");
        assert_eq!(exception.format, "90 %%s of é");
        assert_eq!(exception.message(), "90 %s of é");
    }
}
