//! What the binaries share: where the state is, what the environment says, how an error ends a program.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::error::{Error, Kind, Result};
use crate::machine::ThisMachine;
use crate::output::error_text;
use crate::state::State;

/// What runs in a qube when no command is given: a login shell.
pub const LOGIN_SHELL: [&str; 3] = ["/bin/sh", "-c", "exec \"${SHELL:-/bin/sh}\" -l"];

/// Options every command has.
#[derive(Debug, clap::Args)]
pub struct Common {
    /// State folder [default: DISPVM_ROOT, else /var/lib/dispvm for root, $XDG_DATA_HOME/dispvm for others]
    #[arg(long, value_name = "DIR", global = true)]
    pub root: Option<PathBuf>,
}

impl Common {
    /// Opens the state folder.
    pub fn state(&self) -> Result<State> {
        State::open(&self.state_path()?)
    }

    fn state_path(&self) -> Result<PathBuf> {
        let variable =
            |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        if let Some(root) = self.root.clone().or_else(|| variable("DISPVM_ROOT")) {
            return Ok(root);
        }
        if nix::unistd::geteuid().is_root() {
            return Ok("/var/lib/dispvm".into());
        }
        variable("XDG_DATA_HOME")
            .or_else(|| variable("HOME").map(|home| home.join(".local/share")))
            .map(|data| data.join("dispvm"))
            .ok_or_else(|| {
                Error::new(Kind::Usage, "neither HOME nor XDG_DATA_HOME is set").hint("give --root DIR")
            })
    }
}

/// `--generate man|bash|zsh|fish`, as the only arguments, has any of our commands write its own manual page or completion, which is
/// what `make man` does; the program ends there. Otherwise nothing happens.
pub fn generate_if_asked<P: CommandFactory>() {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [option, kind] = &arguments[..] else { return };
    let (Some("--generate"), Some(kind)) = (option.to_str(), kind.to_str()) else { return };
    let mut command = P::command();
    let name = command.get_name().to_owned();
    let mut out = Vec::new();
    let made = match kind {
        "man" => manual(command, &mut out),
        shell => match shell.parse::<Shell>() {
            Ok(shell) => {
                clap_complete::generate(shell, &mut command, name, &mut out);
                Ok(())
            }
            Err(_) => {
                Err(std::io::Error::other(format!("--generate knows man, bash, zsh and fish, not {shell:?}")))
            }
        },
    };
    match made.and_then(|()| std::io::stdout().write_all(&out)) {
        Ok(()) => std::process::exit(0),
        Err(error) => {
            eprintln!("{}: {error}", P::command().get_name());
            std::process::exit(2);
        }
    }
}

/// One page for a command and its subcommands.
fn manual(mut command: clap::Command, out: &mut Vec<u8>) -> std::io::Result<()> {
    command.build();
    let subcommands: Vec<clap::Command> =
        command.get_subcommands().filter(|command| !command.is_hide_set()).cloned().collect();
    // All of a page but its list of the subcommands' own pages: they are sections of this one.
    let page = clap_mangen::Man::new(command);
    page.render_title(out)?;
    page.render_name_section(out)?;
    page.render_synopsis_section(out)?;
    page.render_description_section(out)?;
    page.render_options_section(out)?;
    for subcommand in subcommands.into_iter().filter(|command| command.get_name() != "help") {
        let name = subcommand.get_bin_name().unwrap_or_else(|| subcommand.get_name()).to_owned();
        let page = clap_mangen::Man::new(subcommand.display_name(&name));
        writeln!(out, ".SH \"{}\"", name.to_uppercase())?;
        let mut section = Vec::new();
        page.render_name_section(&mut section)?;
        page.render_synopsis_section(&mut section)?;
        page.render_description_section(&mut section)?;
        page.render_options_section(&mut section)?;
        // Its sections become parts of ours.
        out.extend(String::from_utf8_lossy(&section).replace(".SH ", ".SS ").into_bytes());
    }
    Ok(())
}

/// The machine, as the environment describes it.
pub fn machine() -> Result<ThisMachine> {
    let volume_memory_mib = match std::env::var("DISPVM_VOLUME_MEMORY_MIB") {
        Err(_) => None,
        Ok(text) => Some(text.parse().ok().filter(|mib| (1..=1 << 20).contains(mib)).ok_or_else(|| {
            Error::new(Kind::Usage, format!("DISPVM_VOLUME_MEMORY_MIB is {text:?}, not a number of MiB"))
        })?),
    };
    Ok(ThisMachine {
        qemu: std::env::var_os("DISPVM_QEMU").filter(|value| !value.is_empty()).map(PathBuf::from),
        path: std::env::var_os("PATH").unwrap_or_default(),
        volume_memory_mib,
    })
}

/// Has the log written to standard error: warnings, and with DISPVM_LOG=info or debug more.
pub fn start_log() {
    let level = match std::env::var("DISPVM_LOG").as_deref() {
        Ok("debug") => tracing::Level::DEBUG,
        Ok("info") => tracing::Level::INFO,
        _ => tracing::Level::WARN,
    };
    tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).with_target(false).init();
}

/// Prints an error, once, and answers the status.
pub fn fail(program: &str, error: &Error, status: u8) -> ExitCode {
    eprintln!("{program}: {}", error_text(error));
    ExitCode::from(status)
}
