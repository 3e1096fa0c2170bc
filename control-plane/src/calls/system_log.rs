//! The system's log (syslog(3)), for programs whose standard error is somebody else's: what they have to say is not for a guest's eyes.

use std::os::unix::net::UnixDatagram;

/// Where it listens.
const SYSTEM_LOG: &str = "/dev/log";
/// Facility authpriv, severity info.
const PRIORITY: &str = "<86>";

/// In the environment of a call's programs: there are so many calls that it is not logged if this one fails.
pub const UNLOGGED: &str = "DISPVM_CALL_UNLOGGED";

/// Writes one line; where there is no such log, or it does not listen, nothing.
pub fn say(program: &str, text: &str) {
    let line = format!("{PRIORITY}{program}: {}", text.replace(['\n', '\r'], " "));
    if let Ok(log) = UnixDatagram::unbound() {
        let _ = log.set_nonblocking(true);
        let _ = log.send_to(line.as_bytes(), SYSTEM_LOG);
    }
}

/// The same, of the call that this process carries out, if that one is logged.
pub fn say_of_call(program: &str, text: &str) {
    if std::env::var_os(UNLOGGED).is_none() {
        say(program, text);
    }
}
