//! What a QEMU says and writes that its guest has taken over.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use engine::units::ByteCount;
use qemu_glue::qcow2::{read_changes, write_empty};
use qemu_glue::qmp::{Qmp, QmpError};
use serde_json::json;

use crate::{files, take};

/// Input for [`qmp`] is cut here: it must fit a socket's buffer, for there is nobody who reads meanwhile.
const LINES_BYTES_MAX: usize = 128 << 10;
/// QEMU has said all it will, so no wait is long.
const LIMIT: Duration = Duration::from_secs(5);
const PAGE: u64 = 4096;

/// How often a command is sent first (u8 mod 4), then the lines of a QEMU that hangs up after the last.
pub fn qmp(mut data: &[u8]) {
    let commands = take::<1>(&mut data)[0] & 3;
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    let mut qmp = Qmp::start(ours).expect("the greeting fits");
    (&theirs).write_all(&data[..data.len().min(LINES_BYTES_MAX)]).expect("a socket's buffer");
    theirs.shutdown(Shutdown::Write).expect("a connected socket");
    for _ in 0..commands {
        match qmp.execute("query-status", json!({}), LIMIT) {
            Ok(_) | Err(QmpError::Refused { .. }) => {}
            Err(error) => return ended(&error),
        }
    }
    loop {
        match qmp.next_event(LIMIT) {
            Ok(event) => assert!(event.name.len() <= data.len()),
            Err(QmpError::Refused { .. }) => {}
            Err(error) => return ended(&error),
        }
    }
}

fn ended(error: &QmpError) {
    assert!(!matches!(error, QmpError::Timeout(_)), "{error}");
}

/// An overlay to be read back. Input: pages of the volume u16, clusters of the file u8, then patches (place u24, length u8, bytes)
/// of an overlay as it is made; without clusters the rest is the file, as it is.
pub fn qcow2(mut data: &[u8]) {
    let size = ByteCount((u64::from(u16::from_le_bytes(take(&mut data))) + 1) * PAGE);
    let clusters = u64::from(take::<1>(&mut data)[0]);
    let file = if clusters == 0 { files::with(data) } else { patched(data, size, clusters) };
    let file_blocks = file.metadata().expect("an open file").blocks();
    let raw = files::empty();
    let Ok(changes) = read_changes(&file, size, &raw) else { return };
    let mut end = 0;
    for run in &changes {
        assert!(run.first.0 >= end && !run.is_empty());
        end = run.end().0;
    }
    assert!(end * PAGE <= size.0);
    let metadata = raw.metadata().expect("an open file");
    assert_eq!(metadata.len(), size.0);
    assert!(metadata.blocks() <= file_blocks, "more data than the overlay holds");
}

fn patched(mut data: &[u8], size: ByteCount, clusters: u64) -> std::fs::File {
    let file = files::empty();
    write_empty(&file, size).expect("a volume within the limits");
    file.set_len(clusters * PAGE).expect("a length that the file system has");
    while !data.is_empty() {
        let [p0, p1, p2, len] = take(&mut data);
        let place = u64::from(u32::from_le_bytes([p0, p1, p2, 0])) % (clusters * PAGE);
        let (bytes, rest) = data.split_at(usize::from(len).min(data.len()));
        data = rest;
        file.write_all_at(bytes, place).expect("room for a patch");
    }
    file
}
