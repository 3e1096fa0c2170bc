//! Calls: into a running qube, into a disposable that is a spare, a long stream, and the Admin API; each beside what it is measured
//! against, interleaved in one run.
//!
//! `--full` keeps its lines in benches/results/; `--short` is CI's guard, with fewer and shorter ones.

use std::io::{pipe, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use admin_api::Request;
use benches::clock::{first_byte, ms};
use benches::daemon::Daemon;
use benches::guests::{Bench, Subject, DEBIAN, TEST};
use benches::run::Options;
use benches::stats::{median, percentile};
use benches::table::Row;
use clap::{Parser, ValueEnum};
use control_plane::calls::client;
use control_plane::state::State;
use qemu_glue::probe::Accel;
use qrexec::Exec;

/// The command whose first byte is waited for.
const COMMAND: [&str; 2] = ["echo", "x"];
/// On a terminal qvm-run would filter and mark what it passes.
const AS_IT_IS: [&str; 3] = ["--no-filter-escape-chars", "--no-color-output", "--no-color-stderr"];
/// What the guest's program reads and writes at once: as much as its `cat` does.
const BLOCK_BYTES: u64 = 128 << 10;
/// What QEMU emulates when it is asked for everything it can. Ours lacks what makes guests copy slowly.
const PLAIN_CPU: &str = "max";
/// Qubes whose properties are asked for.
const QUBES: usize = 200;
/// A daemon listens within that.
const START_LIMIT: Duration = Duration::from_secs(10);

/// Measures calls: 200 launches, 1,000 calls and 1 GiB, or ten, 100 and 64 MiB.
#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    options: Options,
    /// Measure this alone
    #[arg(long, value_enum)]
    only: Option<Part>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Part {
    Api,
    Launch,
    Call,
    Stream,
}

fn main() -> ExitCode {
    let Arguments { options, only } = Arguments::parse();
    let launches = options.launches(200, 10);
    let stream_bytes = if options.full { 1 << 30 } else { 64 << 20 };
    let bench = Bench::open();
    let is_asked = |part: Part| only.is_none_or(|only| only == part);
    options.run("qrexec", launches, || {
        let mut rows = Vec::new();
        if is_asked(Part::Api) {
            rows.extend(api(launches * 10));
        }
        for (name, subject) in [("test guest", &TEST), ("Debian guest", &DEBIAN)] {
            if is_asked(Part::Launch) {
                rows.extend(launch(&bench, name, subject, launches));
            }
            if is_asked(Part::Call) {
                rows.extend(call(&bench, name, subject, launches * 5));
            }
        }
        if is_asked(Part::Stream) {
            rows.extend(stream(&bench, &DEBIAN, stream_bytes));
        }
        rows
    })
}

/// `admin.vm.property.GetAll`, where there are 200 qubes.
fn api(calls: usize) -> Vec<Row> {
    let bench = Bench::in_folder("bench-qubes");
    bench.add_template(&TEST);
    let socket = bench.state().root().join("api.sock");
    let _daemon = Kept(
        bench
            .command("dispvmd")
            .args(["--spares", "0", "--api-socket"])
            .arg(&socket)
            .spawn()
            .expect("it starts"),
    );
    await_socket(&socket);
    let ask = |request: &Request| admin_api::client::call(&socket, request).expect("an answer");
    let list = String::from_utf8(ask(&Request::new("admin.vm.List", "dom0"))).expect("text");
    for number in list.lines().count()..QUBES {
        let request = Request::new("admin.vm.Create.AppVM", "dom0").argument(TEST.template);
        ask(&request.payload(format!("name=qube-{number} label=red")));
    }
    let request = Request::new("admin.vm.property.GetAll", format!("qube-{}", QUBES - 1));
    let taken = samples(calls, || {
        let start = Instant::now();
        ask(&request);
        ms(start)
    });
    let mut ls = bench.command("qvm");
    ls.args(["qvm-ls", "--raw-list"]).env("DISPVM_API_SOCKET", &socket);
    let listed = samples(3, || {
        let start = Instant::now();
        let output = ls.output().expect("it runs");
        assert_eq!(output.stdout.iter().filter(|byte| **byte == b'\n').count(), QUBES);
        ms(start)
    });
    vec![
        Row::limit(format!("GetAll with {QUBES} qubes, p50"), median(&taken), "ms", 2.0),
        Row::report(format!("GetAll with {QUBES} qubes, p95"), percentile(&taken, 95.0), "ms"),
        Row::report(format!("qvm-ls of {QUBES} qubes, each asked for its own"), median(&listed), "ms"),
    ]
}

/// `qvm-run --dispvm` beside `dispvm-launch`, each with a spare.
fn launch(bench: &Bench, name: &str, subject: &Subject, launches: usize) -> Vec<Row> {
    bench.prepare(subject);
    let daemon = Daemon::start(bench, subject, None);
    let (mut plain, mut by_tool) = (Vec::new(), Vec::new());
    for _ in 0..launches {
        daemon.await_spare();
        plain.push(first_byte(&mut bench.ours(subject, &COMMAND)));
        daemon.await_spare();
        let mut tool = bench.command("qvm");
        tool.args(["qvm-run", "-p"])
            .args(AS_IT_IS)
            .args([&format!("--dispvm={}", subject.dvm), "--"])
            .args(COMMAND);
        by_tool.push(first_byte(&mut tool));
    }
    let (plain, by_tool) = (median(&plain), median(&by_tool));
    vec![
        Row::report(format!("{name}: dispvm-launch with a spare, p50"), plain, "ms"),
        Row::report(format!("{name}: qvm-run --dispvm -p with a spare, p50"), by_tool, "ms"),
        Row::limit(format!("{name}: qvm-run - dispvm-launch"), by_tool - plain, "ms", 10.0),
    ]
}

/// A call into a running qube, beside a command of the agent's by hand: a bare round trip and one exec.
fn call(bench: &Bench, name: &str, subject: &Subject, calls: usize) -> Vec<Row> {
    bench.prepare(subject);
    let running = Running::start(bench, subject);
    let mut by_hand = Repeated::start(bench, subject);
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    for _ in 0..calls {
        ours.push(running.call());
        bare.push(by_hand.call());
    }
    let (ours, bare) = (median(&ours), median(&bare));
    let few = calls / 5 + 1;
    let mut client = bench.command("qrexec-client");
    client.args(["-d", &running.name, &format!("DEFAULT:{}", COMMAND.join(" "))]);
    let client = samples(few, || first_byte(&mut client));
    let socket = bench.state().root().join("api.sock");
    let daemon = Daemon::start(bench, subject, Some(&socket));
    await_socket(&socket);
    daemon.await_spare(); // then it is at rest
    let mut tool = bench.command("qvm");
    tool.args(["qvm-run", "-p", "--no-gui"])
        .args(AS_IT_IS)
        .args([&running.name, "--"])
        .args(COMMAND)
        .env("DISPVM_API_SOCKET", &socket);
    let tool = samples(few, || first_byte(&mut tool));
    vec![
        Row::report(format!("{name}: call into a running qube, p50"), ours, "ms"),
        Row::report(format!("{name}: the same by hand, p50"), bare, "ms"),
        Row::ratio(format!("{name}: call : by hand"), ours / bare, 1.3),
        Row::report(format!("{name}: qrexec-client, exec → first byte, p50"), median(&client), "ms"),
        Row::report(format!("{name}: qvm-run -p, exec → first byte, p50"), median(&tool), "ms"),
    ]
}

/// Many bytes through a stream of a launch, beside one program and a port of its own, on the CPU that QEMU has by itself, and on ours.
fn stream(bench: &Bench, subject: &Subject, bytes: u64) -> Vec<Row> {
    bench.prepare(subject);
    let [ours_out, ours_in] = [out_of(bench, subject, bytes), into(bench, subject, bytes)];
    let [plain_out, plain_in] = bare_port(bench, subject, PLAIN_CPU, bytes);
    let [bare_out, bare_in] = bare_port(bench, subject, Accel::Tcg.cpu_model(), bytes);
    let size = bytes >> 20;
    let rate = |taken: f64| size as f64 / (taken / 1e3);
    vec![
        Row::report(format!("{size} MiB out of a guest"), rate(ours_out), "MiB/s"),
        Row::report("… through a bare port, QEMU's own CPU model", rate(plain_out), "MiB/s"),
        Row::report("… through a bare port, our CPU model", rate(bare_out), "MiB/s"),
        Row::ratio("out of a guest: time : bare port's", ours_out / plain_out, 2.0),
        Row::report("out of a guest: the same with our CPU model", ours_out / bare_out, "x"),
        Row::report(format!("{size} MiB into a guest"), rate(ours_in), "MiB/s"),
        Row::report("… through a bare port, QEMU's own CPU model", rate(plain_in), "MiB/s"),
        Row::report("… through a bare port, our CPU model", rate(bare_in), "MiB/s"),
        Row::ratio("into a guest: time : bare port's", ours_in / plain_in, 2.0),
        Row::report("into a guest: the same with our CPU model", ours_in / bare_in, "x"),
    ]
}

/// Out of a guest and into it, without an agent in between.
fn bare_port(bench: &Bench, subject: &Subject, cpu: &str, bytes: u64) -> [f64; 2] {
    let output = bench.bare_port_by_hand(subject, cpu, bytes).output().expect("it runs");
    let text = String::from_utf8(output.stdout).expect("text");
    let mut taken = text.lines().filter_map(|line| line.parse::<f64>().ok());
    let (Some(out), Some(into)) = (taken.next(), taken.next()) else { panic!("by hand: {text:?}") };
    [out, into]
}

/// From the first byte to the last.
fn out_of(bench: &Bench, subject: &Subject, bytes: u64) -> f64 {
    let line = format!("dd if=/dev/zero bs={BLOCK_BYTES} count={} 2>/dev/null", bytes / BLOCK_BYTES);
    let mut launch =
        bench.ours(subject, &["sh", "-c", &line]).stdout(Stdio::piped()).spawn().expect("it starts");
    let mut stdout = launch.stdout.take().expect("a pipe");
    let mut piece = vec![0; 64 << 10];
    stdout.read_exact(&mut piece[..1]).expect("a byte");
    let start = Instant::now();
    let mut left = bytes - 1;
    while left > 0 {
        let read = stdout.read(&mut piece).expect("bytes") as u64;
        assert!(read > 0, "it ended with {left} bytes to come");
        left -= read;
    }
    let taken = ms(start);
    launch.wait().expect("it ends");
    taken
}

/// From the guest's word that it reads to its word that it has all.
fn into(bench: &Bench, subject: &Subject, bytes: u64) -> f64 {
    let blocks = bytes / BLOCK_BYTES;
    let line = format!(
        "echo x; dd of=/dev/null bs={BLOCK_BYTES} count={blocks} iflag=fullblock 2>/dev/null; echo y"
    );
    let mut command = bench.ours(subject, &["sh", "-c", &line]);
    let (mut launch, mut stdin, mut stdout) = spawn(&mut command);
    stdout.read_line(&mut String::new()).expect("its word");
    let piece = vec![0; 64 << 10];
    let start = Instant::now();
    let mut left = bytes;
    while left > 0 {
        let len = left.min(piece.len() as u64);
        stdin.write_all(&piece[..len as usize]).expect("the guest reads");
        left -= len;
    }
    stdout.read_line(&mut String::new()).expect("its word");
    let taken = ms(start);
    drop(stdin);
    launch.wait().expect("it ends");
    taken
}

/// A disposable that runs, and its name.
struct Running {
    state: State,
    name: String,
    launch: Child,
    stdin: Option<ChildStdin>,
    /// It ends when nobody reads this any more.
    _stdout: BufReader<ChildStdout>,
}

impl Running {
    fn start(bench: &Bench, subject: &Subject) -> Running {
        let mut command = bench.ours(subject, &["sh", "-c", "cat /proc/sys/kernel/hostname; read go"]);
        let (launch, stdin, mut stdout) = spawn(&mut command);
        let mut name = String::new();
        stdout.read_line(&mut name).expect("its name");
        Running {
            state: bench.state(),
            name: name.trim().into(),
            launch,
            stdin: Some(stdin),
            _stdout: stdout,
        }
    }

    /// From the call to its first byte, in ms.
    fn call(&self) -> f64 {
        let (mut reader, writer) = pipe().expect("a pipe");
        let read = thread::spawn(move || {
            reader.read_exact(&mut [0u8]).expect("a byte");
            Instant::now()
        });
        let null = std::fs::File::open("/dev/null").expect("it is there");
        let start = Instant::now();
        let fds = [null.as_fd(), writer.as_fd(), null.as_fd()];
        client::call(&self.state, &self.name, Exec::user(COMMAND), fds).expect("the call");
        drop(writer);
        read.join().expect("it read").duration_since(start).as_secs_f64() * 1e3
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.stdin.take());
        let _ = self.launch.wait();
    }
}

/// The peer that runs the command whenever it gets a line.
struct Repeated {
    process: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Repeated {
    fn start(bench: &Bench, subject: &Subject) -> Repeated {
        let (process, stdin, mut stdout) = spawn(&mut bench.repeated_by_hand(subject, &COMMAND));
        stdout.read_line(&mut String::new()).expect("its word that it is ready");
        Repeated { process, stdin: Some(stdin), stdout }
    }

    fn call(&mut self) -> f64 {
        self.stdin.as_mut().expect("a pipe").write_all(b"go\n").expect("it listens");
        let mut line = String::new();
        self.stdout.read_line(&mut line).expect("its word");
        line.trim().parse().expect("milliseconds")
    }
}

impl Drop for Repeated {
    fn drop(&mut self) {
        drop(self.stdin.take());
        let _ = self.process.wait();
    }
}

/// A process that ends with this.
struct Kept(Child);

impl Drop for Kept {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn spawn(command: &mut Command) -> (Child, ChildStdin, BufReader<ChildStdout>) {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts");
    let stdin = child.stdin.take().expect("a pipe");
    let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
    (child, stdin, stdout)
}

fn samples(count: usize, measure: impl FnMut() -> f64) -> Vec<f64> {
    std::iter::repeat_with(measure).take(count).collect()
}

fn await_socket(path: &Path) {
    let start = Instant::now();
    while admin_api::client::call(path, &Request::new("admin.vm.List", "dom0")).is_err() {
        assert!(start.elapsed() < START_LIMIT, "nobody listens at {}", path.display());
        thread::sleep(Duration::from_millis(20));
    }
}
