//! `dispvm-qube`: makes, lists and removes TemplateVMs and DVM templates, and runs them themselves to change them.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use control_plane::cli::{fail, generate_if_asked, machine, Common, LOGIN_SHELL};
use control_plane::daemon;
use control_plane::error::{Error, Kind, Result};
use control_plane::launcher;
use control_plane::output::bytes_text;
use control_plane::qube::{Class, Dvm, Qube};
use control_plane::run::{self, Overrides};
use control_plane::state::State;
use control_plane::templates::{self, TemplateFiles};
use qrexec::{Exec, User};

/// Makes, lists and removes TemplateVMs and the DVM templates on them, and runs them to change them.
#[derive(Parser)]
#[command(name = "dispvm-qube", version)]
struct Options {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a TemplateVM, or give one its next generation
    AddTemplate {
        /// Name
        name: String,
        /// Raw image of the root volume
        #[arg(long, value_name = "FILE")]
        root_image: PathBuf,
        /// Kernel
        #[arg(long, value_name = "FILE")]
        kernel: PathBuf,
        /// Initrd
        #[arg(long, value_name = "FILE")]
        initrd: PathBuf,
        /// Kernel command line
        #[arg(long, value_name = "TEXT", default_value = "root=/dev/vda rw console=ttyS0 quiet")]
        cmdline: String,
        /// Label
        #[arg(long, default_value = "black")]
        label: String,
    },
    /// Make a DVM template on a TemplateVM, or change its settings
    AddDvm {
        /// Name
        name: String,
        /// The TemplateVM
        #[arg(long, value_name = "NAME")]
        template: String,
        /// Label
        #[arg(long, default_value = "red")]
        label: String,
        /// Memory in MiB
        #[arg(long, value_name = "MIB", default_value_t = 1024)]
        memory: u64,
        /// Number of vCPUs
        #[arg(long, value_name = "N", default_value_t = 2)]
        vcpus: u32,
        /// Network: none, user, or tap:INTERFACE
        #[arg(long, default_value = "none")]
        net: String,
        /// Size of the private volume in MiB
        #[arg(long, value_name = "MIB", default_value_t = 2048)]
        private_size: u64,
        /// Size of the volatile volume in MiB
        #[arg(long, value_name = "MIB", default_value_t = 1024)]
        volatile_size: u64,
        /// How many clones dispvmd keeps ready [default: as many as it was told]
        #[arg(long, value_name = "N")]
        spares: Option<u32>,
    },
    /// Run a TemplateVM or DVM template itself, to change it from inside
    ///
    /// Boots it, runs the command in it, and has it shut down. Then a TemplateVM's root volume as the run has left it, or a DVM
    /// template's private volume, becomes the qube's next generation, whatever the command's exit status. Everything else that was
    /// written is gone. Savefiles that become stale are rebuilt in the background.
    ///
    /// A run that does not end with the guest switching itself off (a signal, a crash, a restart) changes nothing.
    ///
    /// Exit status: the command's; 125 when the qube could not be started, run or kept, 126 when it was refused, 127 when there is no
    /// such command in it.
    Start(Start),
    /// List qubes
    List,
    /// Remove a qube
    Rm {
        /// Name
        name: String,
    },
}

#[derive(Args)]
struct Start {
    /// Name
    name: String,
    /// Who runs the command
    #[arg(long, value_enum, default_value_t = RunAs::User)]
    user: RunAs,
    /// Memory in MiB [default: the DVM template's; 1024 for a TemplateVM]
    #[arg(long, value_name = "MIB")]
    memory: Option<u64>,
    /// Number of vCPUs [default: the DVM template's; 2 for a TemplateVM]
    #[arg(long, value_name = "N")]
    vcpus: Option<u32>,
    /// Network: none, user, or tap:INTERFACE [default: the DVM template's; none for a TemplateVM]
    #[arg(long)]
    net: Option<String>,
    /// Do not rebuild the savefiles that become stale
    #[arg(long)]
    no_rebuild: bool,
    /// Command and arguments [default: a login shell]
    #[arg(value_name = "CMD", last = true)]
    command: Vec<OsString>,
}

/// Who a command in a guest runs as.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum RunAs {
    User,
    Root,
}

fn main() -> ExitCode {
    generate_if_asked::<Options>();
    let options = Options::parse();
    let runs_a_command = matches!(options.command, Command::Start(_));
    match run(options) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            let status = match error.kind {
                _ if runs_a_command => launcher::exit_of(&error),
                Kind::Usage => 2,
                _ => 1,
            };
            fail("dispvm-qube", &error, status)
        }
    }
}

/// Answers the exit status.
fn run(options: Options) -> Result<u8> {
    let state = options.common.state()?;
    match options.command {
        Command::AddTemplate { name, root_image, kernel, initrd, cmdline, label } => {
            let files = TemplateFiles { root: &root_image, kernel: &kernel, initrd: &initrd, cmdline };
            let generation = templates::add_template(&state, &name, &label, &files)?;
            println!("{name}: generation {generation}");
        }
        Command::AddDvm {
            name,
            template,
            label,
            memory,
            vcpus,
            net,
            private_size,
            volatile_size,
            spares,
        } => {
            let dvm = Dvm {
                template,
                template_for_dispvms: true,
                memory_mib: memory,
                vcpus,
                net,
                private_mib: private_size,
                private_generation: 1,
                private_id: String::new(),
                volatile_mib: volatile_size,
                spares,
                savefile: None,
            };
            templates::add_dvm(&state, &name, &label, dvm)?;
        }
        Command::Start(start) => {
            let status = run_qube(&state, start)?;
            daemon::client::changed(&state);
            return Ok(status);
        }
        Command::List => {
            for qube in Qube::all(&state)? {
                println!("{}", line(&qube));
            }
        }
        Command::Rm { name } => templates::remove(&state, &name)?,
    }
    daemon::client::changed(&state);
    Ok(0)
}

fn run_qube(state: &State, start: Start) -> Result<u8> {
    let mut exec = match start.command.is_empty() {
        true => Exec::user(LOGIN_SHELL),
        false => Exec::user(start.command.into_iter().map(OsString::into_vec)),
    };
    exec.user = match start.user {
        RunAs::User => User::User,
        RunAs::Root => User::Root,
    };
    exec.validate().map_err(|error| Error::new(Kind::Usage, "the command cannot be sent").because(error))?;
    let request = run::command::Request {
        name: start.name,
        exec,
        instead: Overrides { memory_mib: start.memory, vcpus: start.vcpus, net: start.net },
        rebuild: !start.no_rebuild,
    };
    run::command::run(state, &machine()?, request, &|text| eprintln!("dispvm-qube: {text}"))
}

fn line(qube: &Qube) -> String {
    match &qube.class {
        Class::TemplateVM(template) => format!(
            "{:20} TemplateVM {:8} generation {}, root {}",
            qube.name,
            qube.label,
            template.generation,
            bytes_text(template.root_bytes)
        ),
        Class::AppVM(dvm) => format!(
            "{:20} AppVM      {:8} on {}, {} MiB, {} vCPUs, net {}",
            qube.name, qube.label, dvm.template, dvm.memory_mib, dvm.vcpus, dvm.net
        ),
        Class::DispVM(disposable) => {
            format!("{:20} DispVM     {:8} made from {}", qube.name, qube.label, disposable.template)
        }
    }
}
