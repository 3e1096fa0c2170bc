//! What this machine and its QEMU can do. Answers are kept in a file, because asking costs more than a launch:
//! starting QEMU for its version alone takes 20 ms.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// How long a stock kernel may take to get to its first panic under KVM. Hardware needs half a second.
const KVM_PROBE_LIMIT: Duration = Duration::from_secs(15);

/// How guest code runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// In hardware.
    Kvm,
    /// Translated.
    Tcg,
}

impl Accel {
    /// For `-accel`.
    pub fn argument(self) -> &'static str {
        match self {
            Accel::Kvm => "kvm",
            Accel::Tcg => "tcg,thread=multi",
        }
    }

    /// As savefiles record it.
    pub fn name(self) -> &'static str {
        match self {
            Accel::Kvm => "kvm",
            Accel::Tcg => "tcg",
        }
    }

    /// The CPU model guests get: everything the accelerator has. Emulated, `rep movsb` goes byte by byte, and a guest that is told it is
    /// fast ("ERMS", "FSRM") copies and clears with it whatever it can: 2 to 4 times as slow as by words.
    pub fn cpu_model(self) -> &'static str {
        match self {
            Accel::Kvm => "host",
            Accel::Tcg => "max,-erms,-fsrm",
        }
    }

    /// What that model is on this machine. An emulated one is the QEMU version's matter; the machine's own is a processor with its flags,
    /// and a guest captured on one does not run on another.
    pub fn cpu_description(self) -> String {
        match self {
            Accel::Kvm => {
                format!("host: {}", processor(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()))
            }
            Accel::Tcg => self.cpu_model().to_owned(),
        }
    }
}

/// The processor in a /proc/cpuinfo: its name, and a hash of what identifies it and of what it can do.
fn processor(cpuinfo: &str) -> String {
    let first = cpuinfo.split("\n\n").next().unwrap_or_default();
    let value = |key: &str| {
        let line = first.lines().find(|line| line.split(':').next().is_some_and(|name| name.trim() == key));
        line.and_then(|line| line.split_once(':')).map_or("unknown", |(_, value)| value.trim())
    };
    let parts = ["vendor_id", "cpu family", "model", "stepping", "flags"].map(value);
    let hash = blake3::hash(parts.join("\n").as_bytes()).to_hex();
    format!("{} ({})", value("model name"), &hash[..12])
}

/// A QEMU and what it can do here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Qemu {
    /// The program.
    pub path: PathBuf,
    /// Its full version, Debian's revision included.
    pub version: String,
    /// How guests run.
    pub accel: Accel,
    /// Which file this was found out of, and in which boot of the machine.
    seen: Seen,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Seen {
    bytes: u64,
    mtime_ns: i128,
    inode: u64,
    /// A machine's KVM may come and go between boots: with the hardware it is moved to, or nested.
    boot_id: String,
}

/// Why there is no QEMU to use.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// None found.
    #[error("QEMU ({}) is not there. Hint: `apt install qemu-system-x86`, or name another with DISPVM_QEMU", .0.display())]
    Missing(PathBuf),
    /// One found that does not run or is too old.
    #[error("{}: {reason}", path.display())]
    Unusable {
        /// The program.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A system error.
    #[error("cannot probe {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
}

impl Qemu {
    /// The QEMU at `program`, from `cache` when what it says still holds, else by asking; `kernel` is what a probe
    /// guest boots. The cache is written aside and renamed; that it cannot be written is no error.
    pub fn find(program: &Path, cache: &Path, kernel: &Path) -> Result<Qemu, ProbeError> {
        let seen = Seen::of(program)?;
        if let Some(known) = read_cache(cache).filter(|known| known.path == program && known.seen == seen) {
            return Ok(known);
        }
        let version = ask_version(program)?;
        let accel = if kvm_boots(program, kernel) { Accel::Kvm } else { Accel::Tcg };
        let qemu = Qemu { path: program.to_owned(), version, accel, seen };
        if qemu.number() < (7, 2) {
            let reason = format!("version {} is too old, 7.2 is the oldest that works", qemu.version);
            return Err(ProbeError::Unusable { path: program.to_owned(), reason });
        }
        write_cache(cache, &qemu);
        Ok(qemu)
    }

    /// Major and minor version.
    pub fn number(&self) -> (u32, u32) {
        let mut parts =
            self.version.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
        (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
    }

    /// Whether a memory backend can be opened read-only and mapped privately (QEMU 8.2).
    pub fn maps_read_only(&self) -> bool {
        self.number() >= (8, 2)
    }

    /// Whether it can lock memory as it is touched (QEMU 10.0).
    pub fn locks_on_fault(&self) -> bool {
        self.number() >= (10, 0)
    }
}

impl Seen {
    fn of(program: &Path) -> Result<Seen, ProbeError> {
        let meta = fs::metadata(program).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => ProbeError::Missing(program.to_owned()),
            _ => ProbeError::Io { path: program.to_owned(), source },
        })?;
        Ok(Seen {
            bytes: meta.len(),
            mtime_ns: i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec()),
            inode: meta.ino(),
            boot_id: fs::read_to_string("/proc/sys/kernel/random/boot_id")
                .unwrap_or_default()
                .trim()
                .to_owned(),
        })
    }
}

/// Looks `qemu-system-x86_64` up in the folders of `path`, the value of $PATH.
pub fn in_path(path: &std::ffi::OsStr) -> Option<PathBuf> {
    std::env::split_paths(path).map(|folder| folder.join("qemu-system-x86_64")).find(|file| file.is_file())
}

fn read_cache(cache: &Path) -> Option<Qemu> {
    serde_json::from_slice(&fs::read(cache).ok()?).ok()
}

fn write_cache(cache: &Path, qemu: &Qemu) {
    let aside = cache.with_extension(format!("{}.tmp", std::process::id()));
    let written = serde_json::to_vec(qemu)
        .map_err(io::Error::from)
        .and_then(|bytes| fs::write(&aside, bytes))
        .and_then(|()| fs::rename(&aside, cache));
    if let Err(error) = written {
        let _ = fs::remove_file(&aside);
        tracing::debug!("cannot keep what was found out about QEMU: {error}");
    }
}

/// From "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)".
fn ask_version(program: &Path) -> Result<String, ProbeError> {
    let unusable = |reason: String| ProbeError::Unusable { path: program.to_owned(), reason };
    let output = Command::new(program)
        .arg("-version")
        .stdin(Stdio::null())
        .output()
        .map_err(|source| ProbeError::Io { path: program.to_owned(), source })?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.lines().next().and_then(|line| line.split_once("version ")).map(|(_, v)| v.trim());
    match version {
        Some(version) if output.status.success() && version.len() < 200 => Ok(version.to_owned()),
        _ => Err(unusable(format!(
            "`-version` says nothing usable: {}",
            String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or("no output")
        ))),
    }
}

/// Whether a stock kernel boots under KVM here. A /dev/kvm that opens proves nothing: the probe boots `kernel`
/// without a root disk and waits for it to complain about that.
fn kvm_boots(program: &Path, kernel: &Path) -> bool {
    if File::options().read(true).write(true).open("/dev/kvm").is_err() {
        return false;
    }
    let child = Command::new(program)
        .args([
            "-accel",
            "kvm",
            "-cpu",
            "host",
            "-machine",
            "q35",
            "-m",
            "256",
            "-nodefaults",
            "-no-user-config",
        ])
        .args(["-display", "none", "-no-reboot", "-serial", "stdio", "-kernel"])
        .arg(kernel)
        .args(["-append", "console=ttyS0 panic=-1 quiet"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = child else { return false };
    let Some(mut output) = child.stdout.take() else { return false };
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        let _ = output.by_ref().take(1 << 20).read_to_end(&mut text);
        String::from_utf8_lossy(&text).contains("Unable to mount root fs")
    });
    let deadline = Instant::now() + KVM_PROBE_LIMIT;
    while Instant::now() < deadline && matches!(child.try_wait(), Ok(None)) {
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = child.kill();
    let _ = child.wait();
    reader.join().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_processor_or_another_flag_is_another_model() {
        let cpuinfo = "processor\t: 0\nvendor_id\t: A\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: A B\nstepping\t: 1\nflags\t\t: fpu sse\n\nprocessor\t: 1\n";
        let said = processor(cpuinfo);
        assert!(said.starts_with("A B ("), "{said}");
        assert_eq!(said, processor(&cpuinfo.replace("processor\t: 1", "processor\t: 7")));
        assert_ne!(said, processor(&cpuinfo.replace("fpu sse", "fpu sse avx")));
        assert_ne!(said, processor(&cpuinfo.replace("stepping\t: 1", "stepping\t: 2")));
        assert_eq!(Accel::Tcg.cpu_description(), "max,-erms,-fsrm");
    }

    fn qemu(version: &str) -> Qemu {
        let seen = Seen { bytes: 0, mtime_ns: 0, inode: 0, boot_id: String::new() };
        Qemu { path: "/q".into(), version: version.into(), accel: Accel::Tcg, seen }
    }

    #[test]
    fn what_a_version_can_do() {
        let old = qemu("7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)");
        assert_eq!(old.number(), (7, 2));
        assert!(!old.maps_read_only() && !old.locks_on_fault());
        let new = qemu("10.0.2 (Debian 1:10.0.2+ds-2)");
        assert!(new.maps_read_only() && new.locks_on_fault());
    }

    #[test]
    fn a_missing_qemu_says_what_to_do() {
        let error =
            Qemu::find(Path::new("/nowhere/qemu"), Path::new("/nowhere/cache"), Path::new("/k")).unwrap_err();
        assert!(error.to_string().contains("apt install"), "{error}");
    }

    #[test]
    fn a_program_that_is_no_qemu_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error =
            Qemu::find(Path::new("/bin/true"), &folder.path().join("c"), Path::new("/k")).unwrap_err();
        assert!(matches!(error, ProbeError::Unusable { .. }), "{error}");
    }
}
