//! How a step of the agent fails: which step, the system's error number, the error in words.

use std::fmt;
use std::io;

use qrexec::{Failed, Op};

/// A failed step.
#[derive(Debug, Clone)]
pub struct Failure {
    step: String,
    errno: i32,
    message: String,
}

impl Failure {
    /// `step` failed because the system said so.
    pub fn system(step: impl Into<String>, error: impl Into<io::Error>) -> Self {
        let error = error.into();
        Self { step: step.into(), errno: error.raw_os_error().unwrap_or(0), message: error.to_string() }
    }

    /// `step` failed for a reason of ours.
    pub fn ours(step: impl Into<String>, errno: i32, message: impl Into<String>) -> Self {
        Self { step: step.into(), errno, message: message.into() }
    }

    /// The system's error number; 0 where there was none.
    pub fn errno(&self) -> i32 {
        self.errno
    }

    /// As the host gets it.
    pub fn into_frame(self, op: Option<Op>) -> Failed {
        Failed { op, step: self.step, errno: self.errno, message: self.message }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}: {}", self.step, self.message)
    }
}

/// Names the step of a system error.
pub trait Step<T> {
    /// `cannot STEP: …`
    fn step<S: Into<String>>(self, step: impl FnOnce() -> S) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step<S: Into<String>>(self, step: impl FnOnce() -> S) -> Result<T, Failure> {
        self.map_err(|error| Failure::system(step(), error))
    }
}
