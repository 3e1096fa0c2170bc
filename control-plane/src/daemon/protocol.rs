//! The words on `dispvmd`'s socket: one JSON object a message, at most [`MESSAGE_BYTES_MAX`]; descriptors travel beside it.
//!
//! A connection begins with one [`Hello`]. A caller's is answered by one [`Answer`] and over. A keeper's stays: it says [`KeeperSays`], and
//! hears [`KeeperHears`]. Who wants a qube started is handed on to its runner ([`RunnerSays`]). What holds between caller and keeper is the lifeline, on which the
//! keeper says [`LifelineSays`] and hears [`LifelineHears`].

use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The version of what keepers and daemon say to each other. One of another version is not adopted: its clone runs on, its spare ends.
pub const PROTOCOL: u32 = 2;
/// The longest message. The longest there is, a status of many qubes, takes some 200 bytes for each.
pub const MESSAGE_BYTES_MAX: usize = 64 << 10;

/// The first message of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Hello {
    /// A launcher wants a clone of this DVM template.
    Spare {
        /// The DVM template.
        dvm: String,
        /// The settings of the launcher's machine ([`crate::machine::Machine::settings`]): a spare made under others is not
        /// what it asks for.
        settings: String,
        /// Whether a savefile that does not serve is to be rebuilt.
        rebuild: bool,
    },
    /// A DVM template is to be removed: let go of its spares.
    LetGo {
        /// The DVM template.
        dvm: String,
    },
    /// Somebody wants to know how all stands.
    Status,
    /// A record has changed: look at it now.
    Changed,
    /// A qube is to be started. The answer, when it is up, is its runner's: [`RunnerSays`].
    Start {
        /// The qube.
        qube: String,
    },
    /// A spare is to be somebody's who has no process to hold it. The answer is its holder's: [`HolderSays`].
    Hold {
        /// The DVM template.
        dvm: String,
    },
    /// A keeper is there.
    Keeper {
        /// [`PROTOCOL`]: a keeper may be older than its daemon.
        protocol: u32,
        /// The DVM template of its clone.
        dvm: String,
        /// Its own process.
        pid: u32,
    },
}

/// The answer to a caller.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Answer {
    /// A clone. With it come two descriptors: its agent's channel, and the lifeline.
    Spare(Spare),
    /// There is none; make one yourself.
    None {
        /// Whether the savefile is being rebuilt already.
        rebuilding: bool,
    },
    /// How all stands.
    Status(Status),
    /// Noted.
    Noted,
}

/// A clone that waits, or has been waiting, to be somebody's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spare {
    /// The number in its name.
    pub number: u32,
    /// The machine-id it has had since it was made.
    pub machine_id: [u8; 16],
    /// The host's kind.
    pub host: String,
    /// The generation of the savefile it was restored from.
    pub generation: u64,
    /// That savefile's root hash.
    pub root_hash: String,
    /// The hash of what that savefile was built from.
    pub inputs: String,
    /// Milliseconds since the host's boot, suspended ones among them, at which it was ready: no clock that is set makes it older.
    pub ready_ms: u64,
    /// Its keeper's [`PROTOCOL`]: one from before 2, which does not say it, takes whatever is said on the lifeline for its end.
    #[serde(default)]
    pub protocol: u32,
}

impl Spare {
    /// How long ago it was ready.
    pub fn age(&self) -> Duration {
        Duration::from_millis(since_boot_ms().saturating_sub(self.ready_ms))
    }
}

/// CLOCK_BOOTTIME: the same for every process of the host, and nobody can set it.
pub fn since_boot_ms() -> u64 {
    let now =
        nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// What a keeper says to the daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum KeeperSays {
    /// Its clone is ready. With it come two descriptors: its agent's channel, and the lifeline.
    Ready(Spare),
    /// Its clone has been handed out and runs.
    Running(Spare),
    /// There will be no clone.
    Failed {
        /// Why.
        reason: String,
    },
}

/// What a keeper hears from the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeeperHears {
    /// Your clone is somebody's now: let it run.
    HandedOut,
    /// Your clone is not needed: end it.
    End,
}

/// What a keeper says to its clone's owner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum LifelineSays {
    /// The clone cannot go on.
    Failed {
        /// Why.
        reason: String,
    },
    /// The clone is gone.
    Gone,
    /// Its CPUs are stopped, as was asked.
    Paused,
    /// They run again, as was asked.
    Running,
    /// What was asked cannot be.
    Refused {
        /// Why.
        reason: String,
    },
}

/// What a keeper hears from its clone's owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LifelineHears {
    /// Stop the clone's CPUs.
    Pause,
    /// Let them run again.
    Unpause,
}

/// What the runner of a qube says to whoever had it started: that it is there, then how it went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum RunnerSays {
    /// It is at it.
    Starting,
    /// The qube is up.
    Up,
    /// Another runner has it.
    RunsAlready,
    /// It could not be started.
    Failed {
        /// Why.
        reason: String,
    },
}

/// What the holder of a spare hears from whoever wants it, once. If it hears nothing, the disposable ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum HolderHears {
    /// All is noted of the disposable: it may take calls and make them.
    Go,
}

/// What the holder of a spare says to whoever wants it: one word.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum HolderSays {
    /// The spare is a disposable that runs, and takes and makes calls as soon as its holder hears [`HolderHears::Go`].
    Holds {
        /// Its name.
        name: String,
    },
    /// There is none that serves.
    NoSpare,
    /// There was one, and it did not wake up.
    Failed {
        /// Why.
        reason: String,
    },
}

/// How all stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Status {
    /// The daemon's process.
    pub pid: u32,
    /// Each DVM template.
    pub dvms: Vec<DvmStatus>,
    /// Clones that keepers run.
    pub kept: Vec<String>,
}

/// How one DVM template stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DvmStatus {
    /// Its name.
    pub dvm: String,
    /// `fresh`, or why its savefile does not serve.
    pub savefile: String,
    /// How many spares there shall be.
    pub spares_wanted: u32,
    /// How many are ready.
    pub spares_ready: u32,
    /// How many are being made.
    pub spares_preparing: u32,
    /// Whether a savefile is being built.
    pub rebuilding: bool,
    /// Why the last spare could not be made.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub last_failure: Option<String>,
}

/// Why a message is none.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// It is too long.
    #[error("a message of over {MESSAGE_BYTES_MAX} bytes")]
    TooLong,
    /// It is not what may come here.
    #[error("not a message that may come here: {0}")]
    Malformed(String),
}

/// A message's bytes as one of the types above.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, MessageError> {
    if bytes.len() > MESSAGE_BYTES_MAX {
        return Err(MessageError::TooLong);
    }
    serde_json::from_slice(bytes).map_err(|error| MessageError::Malformed(error.to_string()))
}

/// A message's bytes.
pub fn encode(message: &impl Serialize) -> Result<Vec<u8>, MessageError> {
    let bytes = serde_json::to_vec(message).map_err(|error| MessageError::Malformed(error.to_string()))?;
    if bytes.len() > MESSAGE_BYTES_MAX {
        return Err(MessageError::TooLong);
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_comes_back_as_it_was_and_others_are_refused() {
        let hello = Hello::Keeper { protocol: PROTOCOL, dvm: "d".into(), pid: 7 };
        assert_eq!(parse::<Hello>(&encode(&hello).unwrap()), Ok(hello));
        for wrong in [&b"{}"[..], b"\"spare\"", b"{\"spare\":{\"dvm\":\"d\",\"more\":1}}", b"\xff", b""] {
            assert!(matches!(parse::<Hello>(wrong), Err(MessageError::Malformed(_))), "{wrong:?}");
        }
        assert_eq!(parse::<Hello>(&vec![b' '; MESSAGE_BYTES_MAX + 1]), Err(MessageError::TooLong));
    }
}
