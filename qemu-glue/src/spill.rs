//! What a clone writes beyond its memory limit: an unlinked file on disk, encrypted (LUKS, AES-256-XTS, by QEMU) under
//! a random key which is told to QEMU over its socket pair and is nowhere else.
//!
//! The full overlay in memory stays below as the backing of the encrypted one; QEMU tries the failed write again there.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Instant;

use engine::host::Confinement;
use engine::units::ByteCount;
use nix::libc;
use serde_json::{json, Value};

use crate::domain::COMMAND_LIMIT;
use crate::qmp::{Qmp, QmpError};

/// The key derivation guards against guessed pass phrases; ours is random, so it may be as short as QEMU allows.
const KEY_DERIVATION_MS: u32 = 10;
/// Descriptor sets of spills are numbered from here, above those of the command line.
const FDSET_BASE: u32 = 1000;

/// QEMU measures how fast it derives keys, and gives up with [`BUSY`] when it gets no processor time meanwhile
/// (crypto/pbkdf.c). On a busy host the next try does better.
const FORMAT_TRIES: u32 = 8;
/// QEMU's words for it.
const BUSY: &str = "Unable to get accurate CPU usage";

/// Puts an empty encrypted overlay over node `volume`.
pub fn stack_encrypted(
    qmp: &mut Qmp,
    volume: &str,
    size: ByteCount,
    confinement: &Confinement,
) -> Result<(), QmpError> {
    let file = unlinked_file(&confinement.spill_dir)?;
    let set = FDSET_BASE + volume.bytes().map(u32::from).sum::<u32>();
    let (secret, bytes, top) =
        (format!("{volume}-key"), format!("{volume}-spill-file"), format!("{volume}-spill"));
    let encryption = json!({ "format": "luks", "key-secret": secret });
    let mut ask = |command: &str, arguments: Value| qmp.execute(command, arguments, COMMAND_LIMIT).map(drop);

    ask("object-add", json!({ "qom-type": "secret", "id": secret, "data": random_key()?, "format": "raw" }))?;
    qmp.add_fd(set, file.as_fd(), COMMAND_LIMIT)?;
    let node = json!({ "driver": "file", "node-name": bytes, "filename": format!("/dev/fdset/{set}"),
                       "locking": "off", "cache": { "direct": false, "no-flush": true } });
    qmp.execute("blockdev-add", node, COMMAND_LIMIT)?;
    let mut format = json!({ "driver": "qcow2", "file": bytes, "size": size.0, "encrypt": encryption });
    format["encrypt"]["iter-time"] = json!(KEY_DERIVATION_MS);
    let mut tries = 1;
    while let Err(error) = run_job(qmp, &format!("{volume}-format"), format.clone()) {
        if tries == FORMAT_TRIES || !error.to_string().contains(BUSY) {
            return Err(error);
        }
        tries += 1;
    }
    let overlay = json!({ "driver": "qcow2", "node-name": top, "file": bytes, "encrypt": encryption,
                          "backing": null, "discard": "unmap" });
    qmp.execute("blockdev-add", overlay, COMMAND_LIMIT)?;
    qmp.execute("blockdev-snapshot", json!({ "node": volume, "overlay": top }), COMMAND_LIMIT)?;
    Ok(())
}

/// A file that has no name, on the file system of `folder`.
fn unlinked_file(folder: &Path) -> io::Result<File> {
    File::options().read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(folder)
}

/// 256 random bits in hexadecimal.
fn random_key() -> io::Result<String> {
    let mut key = [0u8; 32];
    File::open("/dev/urandom")?.read_exact(&mut key)?;
    Ok(key.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// `blockdev-create` is a job: it is started, concludes, is asked for its error, and dismissed.
fn run_job(qmp: &mut Qmp, id: &str, options: Value) -> Result<(), QmpError> {
    qmp.execute("blockdev-create", json!({ "job-id": id, "options": options }), COMMAND_LIMIT)?;
    let deadline = Instant::now() + COMMAND_LIMIT;
    loop {
        let jobs = qmp.execute("query-jobs", json!({}), COMMAND_LIMIT)?;
        let job = jobs.as_array().and_then(|jobs| jobs.iter().find(|job| job["id"] == id));
        match job {
            Some(job) if job["status"] == "concluded" => {
                let error = job["error"].as_str().map(str::to_owned);
                qmp.execute("job-dismiss", json!({ "id": id }), COMMAND_LIMIT)?;
                return match error {
                    None => Ok(()),
                    Some(message) => {
                        Err(QmpError::Refused { command: "blockdev-create".to_owned(), message })
                    }
                };
            }
            _ if Instant::now() > deadline => return Err(QmpError::Timeout(COMMAND_LIMIT)),
            _ => std::thread::sleep(std::time::Duration::from_millis(2)),
        }
    }
}
