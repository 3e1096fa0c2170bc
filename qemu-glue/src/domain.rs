//! A living guest under QEMU: its socket pair to the machine protocol, its agent's socket, its overlays.
//!
//! Phases: running → captured (gone), or running → destroyed. Everything it writes (but to a volume that is to be kept) is
//! in memfds and in QEMU's private memory until an overlay is full; then [`QemuDomain::serve`] puts an encrypted one on top, whose key was never
//! anywhere but in memory.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use engine::host::{AgentPipe, Capture, CapturedDelta, Confinement, Domain, HostError};
use engine::launch::RESTORE_LIMIT;
use engine::units::{ByteCount, PageRange};
use rustix::fs::{fcntl_add_seals, SealFlags};
use serde_json::{json, Value};

use crate::plan::BALLOON;
use crate::process::{memfd, Process};
use crate::qcow2;
use crate::qmp::{Event, Qmp, QmpError};
use crate::spill;
use crate::touched::{touched, FileId};

/// How long QEMU may take over one command. The slowest, formatting a LUKS header, takes 0.3 s here.
pub(crate) const COMMAND_LIMIT: Duration = Duration::from_secs(20);
/// How long saving the device state may take; RAM is not in it, so it is a matter of 10 ms.
const SAVE_LIMIT: Duration = Duration::from_secs(30);
/// Free pages the balloon leaves to the guest: it must not have to push anything out.
///
/// With 16 MiB a guest of 1 GiB swapped out 10 MiB, which its clones then had to read back.
const BALLOON_RESERVE: u64 = 80 << 20;
/// The balloon is given up on when it has not moved for this long.
const BALLOON_PATIENCE: Duration = Duration::from_secs(3);
/// Events served before the caller gets its turn; a guest whose overlays are all full causes some hundreds.
const EVENTS_AT_ONCE: usize = 10_000;

/// One volume's overlay.
pub struct Overlay {
    /// The volume's name, and its node's.
    pub volume: String,
    /// The size the guest sees.
    pub size: ByteCount,
    /// The qcow2 in memory.
    pub file: File,
    /// Whether an encrypted one lies on top already.
    pub spilled: bool,
}

/// A guest. Dropping it kills it.
pub struct QemuDomain {
    pub(crate) process: Process,
    pub(crate) qmp: Qmp,
    pub(crate) agent: Option<UnixStream>,
    /// Guest memory shared with us; only while capturing.
    pub(crate) memory: Option<File>,
    pub(crate) memory_size: ByteCount,
    /// The memory image, as QEMU's mappings name it.
    pub(crate) memory_file: FileId,
    pub(crate) overlays: Vec<Overlay>,
    pub(crate) confinement: Confinement,
    pub(crate) version: (u32, u32),
    /// Whether its CPUs run already (a boot), or start when a state has been loaded.
    pub(crate) running: bool,
    /// Whether its CPUs have been stopped since.
    pub(crate) paused: bool,
}

impl Domain for QemuDomain {
    fn agent(&mut self) -> Result<Box<dyn AgentPipe>, HostError> {
        let socket = self.agent.take().ok_or_else(|| HostError::Refused {
            step: "connect to the agent",
            reason: "its channel has been taken already".to_owned(),
        })?;
        socket.set_nonblocking(true).map_err(HostError::io("connect to the agent"))?;
        Ok(Box::new(socket))
    }

    fn run(&mut self) -> Result<(), HostError> {
        if self.paused {
            // Not waited for: what the guest does next tells that it runs.
            self.qmp.post("cont", json!({})).map_err(|error| self.explain("continue the clone", error))?;
            self.paused = false;
            return Ok(());
        }
        let step = "restore the clone";
        while !self.running {
            let event = self.qmp.next_event(RESTORE_LIMIT).map_err(|error| self.explain(step, error))?;
            self.running = event.name == "RESUME";
        }
        Ok(())
    }

    fn pause(&mut self) -> Result<(), HostError> {
        let step = "pause the clone";
        self.execute(step, "stop", json!({}))?;
        self.paused = true;
        self.process.to_foreground().map_err(HostError::io(step))
    }

    fn reclaim_free_memory(&mut self, free: ByteCount) -> Result<(), HostError> {
        let all = self.memory_size.0;
        // Free memory that was never touched reads as zero already. The guest's allocator gives the balloon what was
        // freed before what was never used, so half as much again as there are touched free pages gets nearly all.
        let touched = self
            .memory
            .as_ref()
            .and_then(|memory| memory.metadata().ok())
            .map_or(all, |meta| meta.blocks() * 512);
        let touched_free = touched.saturating_sub(all.saturating_sub(free.0));
        let inflate = (touched_free + touched_free / 2).min(free.0.saturating_sub(BALLOON_RESERVE)).min(all);
        self.balloon_to(all - inflate)?;
        self.balloon_to(all)
    }

    fn capture(&mut self) -> Result<Capture, HostError> {
        let device_state = self.save_device_state()?;
        let step = "end the captured guest";
        self.qmp.execute("quit", json!({}), COMMAND_LIMIT).map_err(|error| self.explain(step, error))?;
        self.process.wait().map_err(HostError::io(step))?;
        let memory = self.memory.take().ok_or_else(|| HostError::Refused {
            step: "capture memory",
            reason: "the guest was not started to be captured".to_owned(),
        })?;
        // Clones are rehearsed on it before it is stored; QEMU could open it anew for writing.
        let seals = SealFlags::FUTURE_WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
        fcntl_add_seals(&memory, seals)
            .map_err(|errno| HostError::Io { step: "capture memory", source: errno.into() })?;
        let deltas = self.overlays.drain(..).map(read_delta).collect::<Result<_, _>>()?;
        Ok(Capture {
            memory,
            memory_size: self.memory_size,
            device_state,
            device_state_version: self.version.0 << 16 | self.version.1,
            deltas,
        })
    }

    fn touched(&mut self) -> Result<Vec<PageRange>, HostError> {
        touched(self.process.id(), self.memory_file)
            .map_err(HostError::io("ask which pages of memory the clone has touched"))
    }

    fn steps(&mut self) -> Vec<(&'static str, Instant)> {
        Vec::new()
    }

    fn events(&self) -> BorrowedFd<'_> {
        self.qmp.as_fd()
    }

    fn serve(&mut self) -> Result<(), HostError> {
        let step = "serve the clone";
        let mut failed = Vec::new();
        for _ in 0..EVENTS_AT_ONCE {
            let event = self.qmp.pending_event().map_err(|error| self.explain(step, error))?;
            match event {
                None => return self.relieve_all(failed),
                Some(event) if event.name == "BLOCK_IO_ERROR" => failed.push(event),
                Some(event) if event.name == "SHUTDOWN" => return Err(self.ending(step, &event)),
                Some(_) => {}
            }
        }
        Err(HostError::Hypervisor { step, message: "QEMU does not stop reporting events".to_owned() })
    }

    fn destroy(mut self: Box<Self>) -> Result<(), HostError> {
        self.process.end().map_err(HostError::io("end the guest"))
    }
}

impl QemuDomain {
    /// An answer of QMP as an error of the host. If QEMU has ended, with its last words.
    pub(crate) fn explain(&mut self, step: &'static str, error: QmpError) -> HostError {
        match error {
            QmpError::Closed => {
                let status = self.process.ending().map_or_else(String::new, |status| format!(" ({status})"));
                HostError::Gone { step, detail: format!("{status}{}", self.process.last_words()) }
            }
            QmpError::Timeout(limit) => HostError::Timeout { step, limit },
            QmpError::Io(source) => HostError::Io { step, source },
            refused => HostError::Hypervisor { step, message: refused.to_string() },
        }
    }

    /// The end that a SHUTDOWN event announces. One that the guest wanted is waited for: what QEMU still has to write is
    /// written then.
    fn ending(&mut self, step: &'static str, event: &Event) -> HostError {
        // qapi/run-state.json, ShutdownCause.
        match event.data["reason"].as_str() {
            Some("guest-shutdown") => {}
            Some("guest-reset") => {
                return HostError::Gone { step, detail: ": the guest restarted itself".to_owned() }
            }
            _ => return HostError::Gone { step, detail: ": the guest came to an end".to_owned() },
        }
        loop {
            match self.qmp.next_event(COMMAND_LIMIT) {
                Ok(_) => {}
                Err(QmpError::Closed) => break,
                Err(error) => return self.explain(step, error),
            }
        }
        match self.process.wait() {
            Ok(status) if status.success() => HostError::PoweredOff { step },
            Ok(status) => {
                let detail = format!(" ({status}){}", self.process.last_words());
                HostError::Gone { step, detail }
            }
            Err(source) => HostError::Io { step, source },
        }
    }

    fn execute(&mut self, step: &'static str, command: &str, arguments: Value) -> Result<Value, HostError> {
        self.qmp.execute(command, arguments, COMMAND_LIMIT).map_err(|error| self.explain(step, error))
    }

    /// Sets the balloon so that the guest has `target` bytes, and waits until it has, or has stopped trying.
    fn balloon_to(&mut self, target: u64) -> Result<(), HostError> {
        let step = "take back free memory";
        self.execute(step, "balloon", json!({ "value": target }))?;
        let (mut actual, mut moved) = (u64::MAX, Instant::now());
        while actual != target && moved.elapsed() < BALLOON_PATIENCE {
            std::thread::sleep(Duration::from_millis(5));
            let now = self.execute(step, "query-balloon", json!({}))?["actual"].as_u64().unwrap_or(0);
            if now != actual {
                (actual, moved) = (now, Instant::now());
            }
        }
        if actual != target {
            tracing::debug!("{BALLOON}: {actual} bytes instead of {target}");
        }
        Ok(())
    }

    /// Saves everything but RAM, which stays in the shared file. The guest is stopped from then on.
    fn save_device_state(&mut self) -> Result<Vec<u8>, HostError> {
        let step = "save the device state";
        let mut file = memfd("device-state").map_err(HostError::io(step))?;
        let capabilities = json!([{ "capability": "x-ignore-shared", "state": true }]);
        self.execute(step, "migrate-set-capabilities", json!({ "capabilities": capabilities }))?;
        self.qmp.give_fd("state", file.as_fd(), COMMAND_LIMIT).map_err(|error| self.explain(step, error))?;
        self.execute(step, "migrate", json!({ "uri": "fd:state" }))?;
        let deadline = Instant::now() + SAVE_LIMIT;
        loop {
            let answer = self.execute(step, "query-migrate", json!({}))?;
            match answer["status"].as_str() {
                Some("completed") => break,
                Some("failed" | "cancelled") => {
                    let message = answer["error-desc"].as_str().unwrap_or("migration failed").to_owned();
                    return Err(HostError::Hypervisor { step, message });
                }
                _ if Instant::now() > deadline => return Err(HostError::Timeout { step, limit: SAVE_LIMIT }),
                _ => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(0))
            .and_then(|_| file.read_to_end(&mut bytes))
            .map_err(HostError::io(step))?;
        Ok(bytes)
    }

    /// Several volumes may have failed at once. Those that can still be helped come first: a late word of one that was helped
    /// before is not to be taken for the end of it, and once the guest goes on it says nothing any more.
    fn relieve_all(&mut self, failed: Vec<Event>) -> Result<(), HostError> {
        let (spilled, helpable): (Vec<Event>, Vec<Event>) = failed.into_iter().partition(|event| {
            self.overlays.iter().any(|overlay| overlay.spilled && names_volume(event, &overlay.volume))
        });
        helpable.iter().chain(&spilled).try_for_each(|event| self.relieve(event))
    }

    /// A write failed. If the guest stands still over it, the volume gets an encrypted overlay on disk and the guest
    /// goes on. Several writes fail at once when an overlay fills up; by the second event the guest may run again.
    fn relieve(&mut self, event: &Event) -> Result<(), HostError> {
        let step = "store what the clone writes";
        if self.execute(step, "query-status", json!({}))?["status"] != "io-error" {
            return Ok(());
        }
        let at = self.overlays.iter().position(|overlay| names_volume(event, &overlay.volume));
        let Some(at) = at.filter(|at| !self.overlays[*at].spilled) else {
            let reason =
                format!("a volume is full: the disk that holds {} is", self.confinement.spill_dir.display());
            return Err(HostError::Refused { step, reason });
        };
        self.overlays[at].spilled = true;
        let (volume, size) = (self.overlays[at].volume.clone(), self.overlays[at].size);
        tracing::info!("the {volume} volume has outgrown memory: spilling to an encrypted file");
        spill::stack_encrypted(&mut self.qmp, &volume, size, &self.confinement)
            .map_err(|error| self.explain(step, error))?;
        match self.paused {
            true => Ok(()),
            false => self.execute(step, "cont", json!({})).map(drop),
        }
    }
}

/// Whether a BLOCK_IO_ERROR is about this volume: QEMU names the device by its path, `…/disk-NAME/virtio-backend`.
fn names_volume(event: &Event, volume: &str) -> bool {
    event.data["node-name"] == volume
        || event.data["qom-path"].as_str().is_some_and(|path| path.contains(&format!("/disk-{volume}/")))
        || event.data["device"].as_str().is_some_and(|path| path.contains(&format!("/disk-{volume}/")))
}

fn read_delta(overlay: Overlay) -> Result<CapturedDelta, HostError> {
    let step = "read what the guest changed on its volumes";
    let raw = memfd("delta").map_err(HostError::io(step))?;
    let changed = qcow2::read_changes(&overlay.file, overlay.size, &raw).map_err(HostError::io(step))?;
    Ok(CapturedDelta { volume: overlay.volume, size: overlay.size, raw, changed })
}
