//! The peer our launches are measured against: QEMU driven by hand in the fastest form there is.
//!
//! It does the same work (restore, identity, thaw, command) with the same guest, and nothing else: no records, no
//! checks, no confinement, no limits, no clean-up. It is told every path. What our launcher costs is the difference.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::Parser;
use nix::fcntl::{fcntl, FcntlArg, FdFlag};
use nix::sys::memfd::{memfd_create, MemFdCreateFlag};
use qrexec::{Decoder, Exec, GuestFrame, HostFrame, Identity, Network, Op, User};

/// The name of the port that nothing but bytes go through.
const BARE_PORT: &str = "bench.bare";

/// What the guest's program reads and writes at once: as much as its `cat` does.
const BLOCK_BYTES: u64 = 128 << 10;

/// Nothing moves for so long only when the guest has no such port.
const PORT_LIMIT: Duration = Duration::from_secs(60);

/// A launch without a launcher.
#[derive(Parser)]
struct Options {
    /// QEMU
    #[arg(long)]
    qemu: PathBuf,
    /// The CPU model
    #[arg(long)]
    cpu: String,
    /// RAM in MiB
    #[arg(long)]
    memory: u64,
    /// vCPUs
    #[arg(long)]
    vcpus: u32,
    /// The memory image; without it the guest is booted
    #[arg(long, requires = "state")]
    image: Option<PathBuf>,
    /// The device state
    #[arg(long)]
    state: Option<PathBuf>,
    /// For a boot: kernel, initrd, command line
    #[arg(long)]
    kernel: Option<PathBuf>,
    #[arg(long)]
    initrd: Option<PathBuf>,
    #[arg(long)]
    cmdline: Option<String>,
    /// name,prepared empty overlay[,delta][,base]: one per volume, files separated by commas, `-` for none
    #[arg(long)]
    volume: Vec<String>,
    /// Exercise and pause the restored guest, say so in a line, and go on when a line comes
    #[arg(long, requires = "image")]
    spare: bool,
    /// Run the command for each line that comes, in the same guest, and say how many ms its first byte took
    #[arg(long, conflicts_with = "spare")]
    repeat: bool,
    /// Move so many bytes out of a booted guest and into it, by a port of its own, and say how many ms each took
    #[arg(long, value_name = "BYTES", conflicts_with_all = ["image", "spare", "repeat"])]
    bare_port: Option<u64>,
    /// The command
    #[arg(last = true)]
    command: Vec<String>,
}

fn main() {
    let options = Options::parse();
    let (mut qmp, qmp_theirs) = inherited_pair();
    let (mut agent, agent_theirs) = inherited_pair();
    let mut command = Command::new(&options.qemu);
    command.args("-name dispvm -nodefaults -no-user-config -no-reboot -display none".split(' '));
    command.args(["-accel", "tcg,thread=multi", "-cpu", &options.cpu]);
    command.args([
        "-machine",
        "pc-q35-7.2,smbus=off,sata=off,usb=off,vmport=off,hpet=off,dump-guest-core=off,memory-backend=mem",
    ]);
    command.args(["-m", &format!("{}M", options.memory), "-smp", &options.vcpus.to_string()]);
    let size = options.memory << 20;
    let mut kept: Vec<File> = Vec::new();
    let mut incoming = None;
    match (&options.image, &options.state) {
        (Some(image), Some(state)) => {
            let path = image.display();
            command.args([
                "-object",
                &format!(
                    "memory-backend-file,id=mem,size={size},mem-path={path},share=off,readonly=on,rom=off"
                ),
            ]);
            command.args(["-incoming", "defer"]);
            incoming = Some(inherit(File::open(state).expect("the device state"), &mut kept));
        }
        _ => {
            let file = memfd();
            file.set_len(size).expect("memory");
            let fd = inherit(file, &mut kept);
            command.args([
                "-object",
                &format!("memory-backend-file,id=mem,size={size},mem-path=/proc/self/fd/{fd},share=on"),
            ]);
            command.arg("-kernel").arg(options.kernel.as_ref().expect("--kernel"));
            command.arg("-initrd").arg(options.initrd.as_ref().expect("--initrd"));
            command.args(["-append", options.cmdline.as_ref().expect("--cmdline")]);
        }
    }
    for volume in &options.volume {
        add_volume(volume, &mut command, &mut kept);
    }
    command.args([
        "-chardev",
        &format!("socket,id=qmp,fd={}", qmp_theirs.as_raw_fd()),
        "-mon",
        "chardev=qmp,mode=control",
    ]);
    command.args(["-chardev", &format!("socket,id=agent,fd={}", agent_theirs.as_raw_fd())]);
    // The console's port, the agent's, and the bare one.
    let ports = if options.bare_port.is_some() { 3 } else { 2 };
    command.args(["-device", &format!("virtio-serial-pci,id=ports,max_ports={ports}")]);
    command.args(["-device", "virtserialport,chardev=agent,name=dispvm.agent"]);
    command.args(["-chardev", "ringbuf,id=console,size=65536", "-serial", "chardev:console"]);
    command.args(["-device", "virtio-balloon-pci,id=balloon", "-netdev", "hubport,id=net,hubid=0"]);
    command.args(["-device", "virtio-net-pci,netdev=net,mac=00:16:3e:5e:ff:ff,romfile=,guest_announce=off"]);
    let bare = options.bare_port.map(|bytes| {
        let (ours, theirs) = inherited_pair();
        command.args(["-chardev", &format!("socket,id=bare,fd={}", theirs.as_raw_fd())]);
        command.args(["-device", &format!("virtserialport,chardev=bare,name={BARE_PORT}")]);
        (bytes, ours, theirs)
    });
    let mut qemu = command.stdin(Stdio::null()).spawn().expect("QEMU starts");
    drop((qmp_theirs, agent_theirs));

    let mut decoder = Decoder::new();
    match incoming {
        Some(fd) => {
            let words = format!(
                "{{\"execute\":\"qmp_capabilities\"}}{{\"execute\":\"migrate-set-capabilities\",\"arguments\":{{\"capabilities\":[{{\"capability\":\"x-ignore-shared\",\"state\":true}}]}}}}{{\"execute\":\"migrate-incoming\",\"arguments\":{{\"uri\":\"fd:{fd}\"}}}}"
            );
            qmp.write_all(words.as_bytes()).expect("QMP");
            await_word(&mut qmp, b"\"RESUME\"");
        }
        None => {
            await_frame(&mut agent, &mut decoder, |frame| matches!(frame, GuestFrame::Hello(_)));
        }
    }
    if options.spare {
        for _ in 0..engine::spare::EXERCISES {
            exercise(&mut agent, &mut decoder);
        }
        qmp.write_all(b"{\"execute\":\"stop\"}").expect("QMP");
        await_word(&mut qmp, b"\"STOP\"");
        println!("ready");
        std::io::stdin().read_line(&mut String::new()).expect("a word");
        qmp.write_all(b"{\"execute\":\"cont\"}").expect("QMP");
    }
    let exec = || Exec::user(options.command.iter().map(String::as_str));
    match bare {
        Some((bytes, port, _theirs)) => move_bytes(&mut agent, &mut decoder, port, bytes),
        None if options.repeat => repeat(&mut agent, &mut decoder, exec),
        None => once(&mut agent, &mut decoder, exec()),
    }
    qemu.kill().expect("QEMU is there");
    qemu.wait().expect("QEMU ends");
}

/// Runs the command with its output as ours.
fn once(agent: &mut UnixStream, decoder: &mut Decoder, exec: Exec) {
    agent.write_all(&launch_words(exec)).expect("the agent listens");
    await_frame(agent, decoder, |frame| match frame {
        GuestFrame::Stdout { bytes, .. } => {
            let mut stdout = std::io::stdout();
            stdout.write_all(bytes).and_then(|()| stdout.flush()).expect("stdout");
            false
        }
        GuestFrame::Exited { .. } => true,
        _ => false,
    });
}

/// Runs the command again and again: a bare round trip to the agent and one exec. The first one is the launch, and not told.
fn repeat(agent: &mut UnixStream, decoder: &mut Decoder, exec: impl Fn() -> Exec) {
    let mut first = Some(launch_words(exec()));
    for stream in 1.. {
        let words = first.take().unwrap_or_else(|| exec_words(stream, exec()));
        let start = Instant::now();
        agent.write_all(&words).expect("the agent listens");
        let mut taken = None;
        await_frame(agent, decoder, |frame| {
            if matches!(frame, GuestFrame::Stdout { .. }) {
                taken.get_or_insert(start.elapsed());
            }
            matches!(frame, GuestFrame::Exited { .. })
        });
        match stream {
            1 => println!("ready"),
            _ => println!("{}", taken.expect("a byte").as_secs_f64() * 1e3),
        }
        if std::io::stdin().read_line(&mut String::new()).is_ok_and(|len| len == 0) {
            return;
        }
    }
}

/// Out of the guest and into it through the bare port, by what a shell there has for it.
fn move_bytes(agent: &mut UnixStream, decoder: &mut Decoder, mut port: UnixStream, bytes: u64) {
    let find = format!("for port in /sys/class/virtio-ports/*; do [ \"$(cat $port/name)\" = {BARE_PORT} ] && port=/dev/${{port##*/}} && break; done");
    let blocks = bytes / BLOCK_BYTES;
    let root =
        |line: String| Exec { user: User::Root, ..Exec::user(["sh", "-c", &format!("{find}; {line}")]) };
    agent
        .write_all(&launch_words(root(format!(
            "dd if=/dev/zero of=$port bs={BLOCK_BYTES} count={blocks} 2>/dev/null"
        ))))
        .expect("the agent listens");
    port.set_read_timeout(Some(PORT_LIMIT))
        .and_then(|()| port.set_write_timeout(Some(PORT_LIMIT)))
        .expect("limits");
    let mut piece = vec![0; 64 << 10];
    port.read_exact(&mut piece[..1]).expect("a byte");
    let start = Instant::now();
    let mut left = bytes - 1;
    while left > 0 {
        left -= port.read(&mut piece).expect("bytes") as u64;
    }
    println!("{}", start.elapsed().as_secs_f64() * 1e3);
    await_frame(agent, decoder, |frame| matches!(frame, GuestFrame::Exited { .. }));

    let exec = root(format!("exec < $port; echo x; dd of=/dev/null bs={BLOCK_BYTES} count={blocks} iflag=fullblock 2>/dev/null; echo y"));
    agent.write_all(&exec_words(2, exec)).expect("the agent listens");
    await_frame(agent, decoder, |frame| matches!(frame, GuestFrame::Stdout { .. }));
    let start = Instant::now();
    let mut left = bytes;
    while left > 0 {
        let len = left.min(piece.len() as u64);
        port.write_all(&piece[..len as usize]).expect("the guest reads");
        left -= len;
    }
    await_frame(agent, decoder, |frame| matches!(frame, GuestFrame::Stdout { .. }));
    println!("{}", start.elapsed().as_secs_f64() * 1e3);
}

fn exec_words(stream: u32, exec: Exec) -> Vec<u8> {
    let mut out = Vec::new();
    HostFrame::Exec { stream, exec: Box::new(exec) }.encode(&mut out).expect("a command");
    out
}

/// Identity, command and thaw, as one write.
fn launch_words(exec: Exec) -> Vec<u8> {
    let mut out = Vec::new();
    HostFrame::Identify(Box::new(identity())).encode(&mut out).expect("an identity");
    HostFrame::Exec { stream: 1, exec: Box::new(exec) }.encode(&mut out).expect("a command");
    HostFrame::Thaw.encode(&mut out).expect("a thaw");
    out
}

/// A launch to its end, as our spares are exercised, and a freeze.
fn exercise(agent: &mut UnixStream, decoder: &mut Decoder) {
    let mut out = launch_words(Exec::user(["sh", "-c", "cat; date"]));
    HostFrame::StdinEof { stream: 1 }.encode(&mut out).expect("an end");
    agent.write_all(&out).expect("the agent listens");
    let (mut exited, mut thawed) = (false, false);
    await_frame(agent, decoder, |frame| {
        exited |= matches!(frame, GuestFrame::Exited { .. });
        thawed |= matches!(frame, GuestFrame::Done(Op::Thaw));
        exited && thawed
    });
    out.clear();
    HostFrame::Freeze.encode(&mut out).expect("a freeze");
    agent.write_all(&out).expect("the agent listens");
    await_frame(agent, decoder, |frame| matches!(frame, GuestFrame::Done(Op::Freeze)));
}

fn add_volume(words: &str, command: &mut Command, kept: &mut Vec<File>) {
    let parts: Vec<&str> = words.split(',').collect();
    let [name, prepared, delta, base] = parts[..] else { panic!("--volume {words}") };
    let mut overlay = memfd();
    overlay.write_all(&std::fs::read(prepared).expect("a prepared overlay")).expect("memory");
    let fd = inherit(overlay, kept);
    let set = fd;
    command.args(["-add-fd", &format!("fd={fd},set={set}")]);
    let file = |name: &str, read_only: bool| {
        format!(
            "{{\"driver\":\"file\",\"filename\":\"{name}\",\"locking\":\"off\",\"read-only\":{read_only}}}"
        )
    };
    let mut chain = "null".to_owned();
    if base != "-" {
        chain = format!("{{\"driver\":\"raw\",\"read-only\":true,\"file\":{}}}", file(base, true));
    }
    if delta != "-" {
        chain = format!(
            "{{\"driver\":\"qcow2\",\"read-only\":true,\"file\":{},\"backing\":{chain}}}",
            file(delta, true)
        );
    }
    let overlay = file(&format!("/dev/fdset/{set}"), false);
    command.args(["-blockdev", &format!("{{\"driver\":\"qcow2\",\"node-name\":\"{name}\",\"file\":{overlay},\"backing\":{chain},\"discard\":\"unmap\",\"detect-zeroes\":\"on\"}}")]);
    command.args([
        "-device",
        &format!("virtio-blk-pci,id=disk-{name},drive={name},serial={name},werror=stop,rerror=report"),
    ]);
}

fn identity() -> Identity {
    let mut random = [0u8; 80];
    File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut random)).expect("random bytes");
    Identity {
        hostname: "disp1".into(),
        machine_id: std::array::from_fn(|i| random[i]),
        entropy: std::array::from_fn(|i| random[16 + i]),
        realtime_ns: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64,
        mac: [0, 0x16, 0x3e, 0x5e, 0, 1],
        network: Some(Network {
            address: [10, 138, 0, 2].into(),
            prefix_len: 16,
            gateway: Some([10, 138, 255, 254].into()),
            dns: vec![[10, 138, 255, 253].into()],
        }),
    }
}

fn await_word(qmp: &mut UnixStream, word: &[u8]) {
    let (mut seen, mut buffer) = (Vec::new(), [0u8; 4096]);
    while !seen.windows(word.len()).any(|window| window == word) {
        let count = qmp.read(&mut buffer).expect("QMP");
        assert!(count > 0, "QEMU ended: {}", String::from_utf8_lossy(&seen));
        seen.extend_from_slice(&buffer[..count]);
    }
}

fn await_frame(agent: &mut UnixStream, decoder: &mut Decoder, mut done: impl FnMut(&GuestFrame) -> bool) {
    let mut buffer = [0u8; 64 << 10];
    loop {
        let count = agent.read(&mut buffer).expect("the agent");
        assert!(count > 0, "the guest has gone");
        let mut input = &buffer[..count];
        while let Some(raw) = decoder.next(&mut input).expect("frames") {
            if done(&GuestFrame::parse(raw).expect("a frame")) {
                return;
            }
        }
    }
}

fn memfd() -> File {
    File::from(memfd_create(c"hand-driven", MemFdCreateFlag::empty()).expect("a memfd"))
}

/// Keeps the file open across exec and answers its number.
fn inherit(file: File, kept: &mut Vec<File>) -> i32 {
    let fd = file.as_raw_fd();
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).expect("an open descriptor");
    kept.push(file);
    fd
}

fn inherited_pair() -> (UnixStream, OwnedFd) {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    fcntl(theirs.as_raw_fd(), FcntlArg::F_SETFD(FdFlag::empty())).expect("an open descriptor");
    (ours, theirs.into())
}
