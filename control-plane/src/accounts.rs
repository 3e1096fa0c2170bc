//! The users of this machine, as /etc/passwd has them. The C library is not asked: in a static binary its way to name services is not there.

use std::fs;

/// The name of a user by number.
pub fn user_name(uid: u32) -> Option<String> {
    let users = fs::read_to_string("/etc/passwd").ok()?;
    let is_theirs = |line: &&str| line.split(':').nth(2).is_some_and(|field| field.parse() == Ok(uid));
    users.lines().find(is_theirs)?.split(':').next().map(str::to_owned)
}

/// A user's number by name.
pub fn uid_of(user: &str) -> Option<u32> {
    let users = fs::read_to_string("/etc/passwd").ok()?;
    let line = users.lines().find(|line| line.split(':').next() == Some(user))?;
    line.split(':').nth(2)?.parse().ok()
}
