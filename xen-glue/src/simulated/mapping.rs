//! Frames of a simulated domain, mapped: as with Xen they keep a destroyed domain until they are unmapped.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use engine::units::PAGE_BYTES;

use super::{lock, State};
use crate::hypercalls::Mapping;

pub(super) struct SimulatedMapping {
    state: Arc<Mutex<State>>,
    domid: u16,
    gfns: Vec<u64>,
}

impl SimulatedMapping {
    pub fn new(state: Arc<Mutex<State>>, domid: u16, gfns: Vec<u64>) -> SimulatedMapping {
        SimulatedMapping { state, domid, gfns }
    }

    /// Calls `work` with each frame's bytes that `offset..offset + length` touches, and where in that range they begin.
    fn each(&self, offset: usize, length: usize, mut work: impl FnMut(usize, &mut [u8])) {
        assert!(offset + length <= self.len(), "a copy past the end of mapped frames");
        let mut state = lock(&self.state);
        let state = &mut *state;
        let domain = match state.domains.get_mut(&self.domid) {
            Some(domain) => domain,
            None => state.dying.get_mut(&self.domid).expect("a mapped domain is there"),
        };
        let mut done = 0;
        while done < length {
            let (frame, within) = ((offset + done) / PAGE_BYTES, (offset + done) % PAGE_BYTES);
            let count = (PAGE_BYTES - within).min(length - done);
            let page = domain.frames.get_mut(&self.gfns[frame]).expect("a mapped frame is there");
            let page = page.get_or_insert_with(|| Box::new([state.fresh_byte; PAGE_BYTES]));
            work(done, &mut page[within..within + count]);
            done += count;
        }
    }
}

impl Mapping for SimulatedMapping {
    fn copy_to(&self, offset: usize, to: &mut [u8]) {
        self.each(offset, to.len(), |at, bytes| to[at..at + bytes.len()].copy_from_slice(bytes));
    }

    fn copy_from(&self, offset: usize, from: &[u8]) {
        self.each(offset, from.len(), |at, bytes| bytes.copy_from_slice(&from[at..at + bytes.len()]));
    }

    fn read_from(&self, offset: usize, file: &File, at: u64, length: usize) -> io::Result<()> {
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, at)?;
        self.copy_from(offset, &bytes);
        Ok(())
    }

    fn len(&self) -> usize {
        self.gfns.len() * PAGE_BYTES
    }
}

impl Drop for SimulatedMapping {
    fn drop(&mut self) {
        lock(&self.state).unmap(self.domid);
    }
}
