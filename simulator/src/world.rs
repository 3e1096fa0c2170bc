//! A world: a state folder with a template, two DVM templates and, as the operation needs, a savefile and things to be
//! collected; beside it the simulation's notes, and what the processes said.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use control_plane::error::Result;
use control_plane::inputs::Guest;
use control_plane::qube::{Qube, SavefilePin};
use control_plane::savefiles::{self, Prerun, Standing};
use control_plane::state::State;
use control_plane::templates::{self, TemplateFiles};
use engine::image::hot::HotImage;
use nix::sys::signal::{kill, Signal};
use nix::sys::wait::{waitpid, WaitPidFlag, WaitStatus};
use nix::unistd::Pid;

use crate::context::Context;
use crate::guest::root_image;
use crate::host::SimHost;
use crate::machine::{SimMachine, SILENCE};
use crate::operate::{new_dvm, notes, own_error, state_root, Action, Unwatched};
use crate::plan::{Fault, Plan};
use crate::rng::mix;
use crate::steps::Steps;
use crate::tracer;

/// The TemplateVM.
pub const TEMPLATE: &str = "simulated-12";
/// The DVM template things happen to.
pub const DVM: &str = "work-dvm";
/// Another, which never has a savefile.
pub const OTHER: &str = "cold-dvm";

/// One made or removed by an operation.
pub const NEW: &str = "new-dvm";
/// A TemplateVM made by an operation.
pub const NEW_TEMPLATE: &str = "new-12";

/// How long others are waited for while one is held: several times what they take. One that takes longer waits for a lock of
/// the held one.
const HELD_MAX: Duration = Duration::from_millis(150);

/// When a process with a guest that fell silent is asked to end.
const PATIENCE: Duration = Duration::from_millis(2 * SILENCE.as_millis() as u64 + 200);

/// A world, gone when dropped unless it is kept.
pub struct World {
    folder: PathBuf,
    /// Its state folder.
    pub state: State,
    seed: u64,
    program: PathBuf,
    runs: std::cell::Cell<u32>,
    keep: bool,
}

/// What is in a world to begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Contents {
    /// Whether the DVM template has a savefile, admitted.
    pub savefile: bool,
    /// Whether its hot image is gone again.
    pub evicted: bool,
    /// Whether a byte of the savefile is wrong.
    pub damaged: bool,
    /// Whether there is something to collect.
    pub garbage: bool,
    /// Whether there is a third DVM template.
    pub third: bool,
}

/// How a process ended, and what it said.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// How it ended.
    pub status: WaitStatus,
    /// What it wrote.
    pub stdout: Vec<u8>,
    /// What it told.
    pub stderr: String,
    /// The steps it took.
    pub steps: Vec<String>,
    /// The system calls on files, if it was traced.
    pub files: Vec<String>,
    /// How long it lived.
    pub took: Duration,
}

impl World {
    /// A new one in `parent`, run by the simulator at `program`.
    pub fn new(parent: &Path, program: &Path, seed: u64, contents: Contents, keep: bool) -> Result<World> {
        let folder = tempfile::Builder::new()
            .prefix(&format!("dispvm-sim-{seed}-"))
            .tempdir_in(parent)
            .map_err(own_error("make a world"))?
            .keep();
        let state = State::open(&state_root(&folder))?;
        let runs = std::cell::Cell::new(0);
        let world = World { folder, state, seed, program: program.to_owned(), runs, keep };
        world.fill(contents)?;
        Ok(world)
    }

    fn fill(&self, contents: Contents) -> Result<()> {
        let write = |name: &str, bytes: &[u8]| fs::write(self.folder.join(name), bytes);
        let made = (|| {
            write("root-1.img", &root_image(self.seed, 128))?;
            write("root-2.img", &root_image(mix(self.seed, 2), 128))?;
            write("hook", b"a hook of the simulator")?;
            write("input", &self.input())
        })();
        made.map_err(own_error("make a world's files"))?;
        self.add_template("root-1.img")?;
        for name in [DVM, OTHER] {
            templates::add_dvm(&self.state, name, "red", new_dvm())?;
        }
        if contents.third {
            templates::add_dvm(&self.state, NEW, "red", new_dvm())?;
        }
        let machine = SimMachine::new(self.context()?);
        if contents.garbage {
            // A generation of the template and of the savefile that nothing needs any more.
            self.build(&machine)?;
            self.keep_generation()?;
        }
        if contents.savefile {
            self.build(&machine)?;
        }
        if contents.garbage {
            self.leave_garbage().map_err(own_error("leave garbage"))?;
        }
        if let (true, Some(pin)) = (contents.evicted, self.pin(DVM)?) {
            let root =
                pin.root_hash.parse().map_err(control_plane::error::Error::failed("read a root hash"))?;
            HotImage::evict(&self.state.hot(), &root)
                .map_err(control_plane::error::Error::failed("evict a hot image"))?;
        }
        if contents.damaged {
            self.damage().map_err(own_error("damage a savefile"))?;
        }
        Ok(())
    }

    fn add_template(&self, root: &str) -> Result<u64> {
        let root = self.folder.join(root);
        let cmdline = "simulated".to_owned();
        let files = TemplateFiles { root: &root, kernel: &root, initrd: &root, cmdline };
        templates::add_template(&self.state, TEMPLATE, "black", &files)
    }

    fn build(&self, machine: &SimMachine) -> Result<()> {
        savefiles::build(&self.state, machine, DVM, &Prerun::Same, true, &mut Unwatched).map(drop)
    }

    /// A context of the driver itself, in which nothing goes wrong.
    fn context(&self) -> Result<Arc<Context>> {
        let steps = Steps::new(Plan::Nothing, None).map_err(own_error("count steps"))?;
        let context = Context::new(&notes(&self.folder), self.seed, steps);
        context.map(Arc::new).map_err(own_error("open the simulation's notes"))
    }

    /// Copies the savefile that is there, so that the next build leaves a generation to collect.
    fn keep_generation(&self) -> Result<()> {
        let pinned = self.pin(DVM)?.map_or(0, |pin| pin.generation);
        let (from, to) = (self.state.savefile(DVM, pinned), self.state.savefile(DVM, pinned + 100));
        fs::copy(from, to).map(drop).map_err(own_error("copy a savefile"))
    }

    /// What killed processes have left, and what nobody needs.
    fn leave_garbage(&self) -> io::Result<()> {
        let state = &self.state;
        fs::copy(state.root_generation(TEMPLATE, 1).join("root.img"), self.folder.join("old"))?;
        copy_folder(&state.root_generation(TEMPLATE, 1), &state.qube(TEMPLATE).join("root/99"))?;
        fs::create_dir_all(state.qube(TEMPLATE).join("root/7.tmp"))?;
        fs::write(state.savefiles(DVM).join(".5.savefile.1-0-0.tmp"), b"half a savefile")?;
        fs::write(state.clones().join("disp77"), b"{}")?;
        fs::create_dir_all(state.hot().join(".aside"))?;
        fs::create_dir_all(state.qubes().join(".gone-dvm.removed/private"))?;
        let set = format!("{}-0", "00".repeat(32));
        fs::create_dir_all(state.hot().join(set))
    }

    fn damage(&self) -> io::Result<()> {
        let path = self.pin(DVM).ok().flatten().map(|pin| self.state.savefile(DVM, pin.generation));
        let path = path.ok_or(io::ErrorKind::NotFound)?;
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
        let file = File::options().read(true).write(true).open(&path)?;
        let (mut byte, at) = ([0], file.metadata()?.len() / 2);
        file.read_exact_at(&mut byte, at)?;
        file.write_all_at(&[byte[0] ^ 1], at)?;
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o444))
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A long stdin for `cat`: more than a window.
    pub fn input(&self) -> Vec<u8> {
        (0..300 << 10).map(|at: u64| b'a' + ((at ^ self.seed) % 23) as u8).collect()
    }

    /// The savefile that serves.
    pub fn pin(&self, dvm: &str) -> Result<Option<SavefilePin>> {
        Ok(Qube::load(&self.state, dvm)?.dvm()?.savefile.clone())
    }

    /// How the savefile stands.
    pub fn standing(&self, dvm: &str) -> Result<Standing> {
        savefiles::standing(&self.state, &Guest::load(&self.state, dvm)?, &SimHost::new(self.context()?))
    }

    fn command(&self, action: &Action, plan: Plan, traced: bool) -> (Command, PathBuf) {
        self.runs.set(self.runs.get() + 1);
        let trace = self.folder.join(format!("steps-{}", self.runs.get()));
        let mut command = Command::new(&self.program);
        command.arg("operate").arg("--world").arg(&self.folder).arg("--seed").arg(self.seed.to_string());
        command.arg("--plan").arg(plan.to_string()).arg("--trace").arg(&trace);
        command.args(traced.then_some("--traced")).args(action.arguments());
        (command, trace)
    }

    /// Starts an operation whose stdin and stdout are spoken to.
    pub fn converse(&self, action: &Action) -> io::Result<Conversation> {
        let (mut command, _) = self.command(action, Plan::Nothing, false);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        Ok(Conversation { child, stdin, stdout })
    }

    /// Starts an operation.
    pub fn start(&self, action: &Action, plan: Plan, traced: bool) -> io::Result<Running> {
        let (mut command, trace) = self.command(action, plan, traced);
        let (stdout, stderr) = (trace.with_extension("stdout"), trace.with_extension("stderr"));
        let input = match action {
            Action::Launch { command, .. } if command[0] == "cat" => self.folder.join("input"),
            _ => PathBuf::from("/dev/null"),
        };
        command.stdin(File::open(input)?).stdout(File::create(&stdout)?).stderr(File::create(&stderr)?);
        let start = Instant::now();
        let child = command.spawn()?;
        let root = self.state.root().to_owned();
        let pid = Pid::from_raw(child.id() as i32);
        Ok(Running { pid, plan, traced, root, trace, start, status: None })
    }

    /// Runs an operation that is held where `plan` says, while the others run one after the other: to their ends, but for one
    /// that waits for the held one, which then goes on.
    pub fn run_beside(
        &self,
        action: &Action,
        plan: Plan,
        others: &[Action],
    ) -> io::Result<(Outcome, Vec<(Action, Outcome)>)> {
        let mut started: Vec<(Action, Running)> = Vec::new();
        let held = self.start(action, plan, true)?.finish_meanwhile(&mut || {
            for other in others {
                let mut running = self.start(other, Plan::Nothing, false)?;
                let over = running.ends_within(HELD_MAX)?;
                started.push((other.clone(), running));
                if !over {
                    break;
                }
            }
            Ok(())
        })?;
        let mut outcomes = Vec::new();
        for (other, running) in started {
            outcomes.push((other, running.finish()?));
        }
        for other in &others[outcomes.len()..] {
            outcomes.push((other.clone(), self.run(other, Plan::Nothing, false)?));
        }
        Ok((held, outcomes))
    }

    /// Runs an operation to its end.
    pub fn run(&self, action: &Action, plan: Plan, traced: bool) -> io::Result<Outcome> {
        self.start(action, plan, traced)?.finish()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if !self.keep {
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

fn copy_folder(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}

/// An operation under way.
pub struct Running {
    pid: Pid,
    plan: Plan,
    traced: bool,
    root: PathBuf,
    trace: PathBuf,
    start: Instant,
    status: Option<WaitStatus>,
}

impl Running {
    /// Waits for its end, doing from outside what the plan says. From the thread that started it.
    pub fn finish(self) -> io::Result<Outcome> {
        self.finish_meanwhile(&mut || Ok(()))
    }

    /// The same; `meanwhile` is done where the plan holds it.
    fn finish_meanwhile(mut self, meanwhile: &mut dyn FnMut() -> io::Result<()>) -> io::Result<Outcome> {
        let mut files = Vec::new();
        let status = match (self.status, self.plan) {
            (Some(status), _) => status,
            _ if self.traced => {
                let (status, calls) = tracer::run(self.pid, &self.root, self.plan, meanwhile)?;
                files = calls;
                status
            }
            (_, Plan::KillAfter(after)) => {
                std::thread::sleep(after.saturating_sub(self.start.elapsed()));
                kill(self.pid, Signal::SIGKILL)?;
                waitpid(self.pid, None)?
            }
            // A command may say nothing for as long as it likes: its caller ends it.
            (_, Plan::Step(_, Fault::Silent)) if !self.ends_within(PATIENCE)? => {
                kill(self.pid, Signal::SIGTERM)?;
                waitpid(self.pid, None)?
            }
            _ => self.status.map_or_else(|| waitpid(self.pid, None), Ok)?,
        };
        self.status = Some(status);
        let took = self.start.elapsed();
        let steps = fs::read_to_string(&self.trace).unwrap_or_default();
        Ok(Outcome {
            status,
            stdout: fs::read(self.trace.with_extension("stdout"))?,
            stderr: String::from_utf8_lossy(&fs::read(self.trace.with_extension("stderr"))?).into_owned(),
            steps: steps.lines().map(str::to_owned).collect(),
            files,
            took,
        })
    }

    /// Whether it ends before so much time is over.
    fn ends_within(&mut self, limit: Duration) -> io::Result<bool> {
        let start = Instant::now();
        while start.elapsed() < limit {
            match waitpid(self.pid, Some(WaitPidFlag::WNOHANG))? {
                WaitStatus::StillAlive => std::thread::sleep(Duration::from_millis(2)),
                ended => {
                    self.status = Some(ended);
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.status.is_none() {
            let _ = kill(self.pid, Signal::SIGKILL);
            let _ = waitpid(self.pid, None);
        }
    }
}

/// A clone that runs while things go wrong around it, and is asked from time to time how it is.
pub struct Conversation {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Option<ChildStdout>,
}

impl Conversation {
    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a line and reads the answer to it.
    pub fn ask(&mut self, line: &str) -> io::Result<String> {
        let (Some(stdin), Some(stdout)) = (&mut self.stdin, &mut self.stdout) else {
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        stdin.write_all(format!("{line}\n").as_bytes())?;
        let (mut answer, mut byte) = (Vec::new(), [0]);
        while stdout.read(&mut byte)? > 0 && byte[0] != b'\n' {
            answer.push(byte[0]);
        }
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    /// Lets it end, by the end of its stdin.
    pub fn end(mut self) -> io::Result<std::process::ExitStatus> {
        self.stdin = None;
        self.child.wait()
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
