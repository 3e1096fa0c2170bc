//! `dispvm-savefile`: builds, lists, checks, imports, exports and removes the savefiles that disposables are restored from.

mod doctor;
mod progress;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use control_plane::cli::{fail, generate_if_asked, machine, Common};
use control_plane::daemon::client;
use control_plane::error::{Kind, Result};
use control_plane::inputs::Guest;
use control_plane::machine::{self, Machine};
use control_plane::qube::Qube;
use control_plane::savefiles::{self, Import, Prerun, Standing};
use control_plane::state::State;

/// Builds, lists, checks, imports, exports and removes the savefiles that disposables are restored from.
///
/// Exit status: 0 done, 1 failed, 2 wrong usage, 3 the savefile is missing, corrupt or stale.
#[derive(Parser)]
#[command(name = "dispvm-savefile", version)]
struct Options {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Boot a DVM template, capture it, and make the result the savefile that serves
    Build {
        /// DVM template
        dvm: String,
        /// Executable to run in the guest before the capture, kept for rebuilds; `none` to run none any more
        #[arg(long, value_name = "FILE|none")]
        prerun: Option<PathBuf>,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
        /// End at once, successfully, when another build of it is under way
        #[arg(long, hide = true)]
        background: bool,
    },
    /// List the DVM templates and how their savefiles stand
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Say how a savefile stands: 0 when it is fresh, 3 when not
    Status {
        /// DVM template
        dvm: String,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Describe a savefile
    Info {
        /// DVM template
        dvm: String,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Check every byte of a savefile
    Verify {
        /// DVM template
        dvm: String,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Make a DVM template of a guest saved by `xl save`
    ///
    /// FILE is a PVH guest's, saved by Xen 4.14 or later. The guest's disks as they were when it was saved are bound by --disk, each as
    /// a raw image: xvda becomes the root volume of a TemplateVM of its own, xvdb the private volume, xvdc what is on the volatile one.
    /// They are copied: FILE and images can go afterwards. That memory and disks belong together, nobody can check.
    ///
    /// A launch talks to this project's agent in the guest. A guest that has it, frozen as a build leaves it (one that `export` has
    /// written), launches as from a built savefile. Any other guest comes to life as well, but only its console can be
    /// reached: dispvm-launch gives up waiting for its agent.
    Import {
        /// The file
        file: PathBuf,
        /// DVM template to make
        #[arg(long = "as", value_name = "DVM")]
        dvm: String,
        /// TemplateVM: a new one, or one whose root volume is the guest's disk [default: DVM-template, a new one]
        #[arg(long, value_name = "NAME")]
        template: Option<String>,
        /// A disk of the guest's: root (or xvda), private (xvdb), volatile (xvdc)
        #[arg(long = "disk", value_name = "NAME=FILE", value_parser = name_and_file)]
        disks: Vec<(String, PathBuf)>,
        /// Kernel for cold boots [default: the file that the guest's configuration names]
        #[arg(long, value_name = "FILE")]
        kernel: Option<PathBuf>,
        /// Initrd for cold boots [default: the file that the guest's configuration names]
        #[arg(long, value_name = "FILE")]
        initrd: Option<PathBuf>,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Write a savefile as a file for `xl restore`, with its disks beside it
    ///
    /// Makes FILE and FILE.root.img, FILE.private.img, FILE.volatile.img: sparse raw images, base and what the guest had changed in one.
    /// The file's configuration names them by their full paths, and calls the guest as the DVM template is called. It has no network
    /// card. Only savefiles made on Xen can be exported.
    Export {
        /// DVM template
        dvm: String,
        /// The file to make
        file: PathBuf,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Say what this machine has for disposables to run on, and what stands in the way
    ///
    /// Looks at Xen and at QEMU, and changes nothing: 0 when one of them can be used, 1 when none can.
    Doctor {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Remove a savefile; running disposables go on
    Rm {
        /// DVM template
        dvm: String,
    },
    /// Remove what nothing needs any more: old savefiles, hot images, old template generations
    Gc {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    generate_if_asked::<Options>();
    let options = Options::parse();
    match run(options) {
        Ok(status) => status,
        Err(error) => {
            let status = match error.kind {
                Kind::Usage => 2,
                Kind::Unusable => 3,
                Kind::Failed | Kind::Refused => 1,
            };
            fail("dispvm-savefile", &error, status)
        }
    }
}

fn run(options: Options) -> Result<ExitCode> {
    let state = match options.command {
        // Who has trouble may not have a state folder yet.
        Command::Doctor { json } => return Ok(doctor::run(&machine()?, json)),
        _ => options.common.state()?,
    };
    match options.command {
        Command::Doctor { .. } => {}
        Command::Build { dvm, prerun, json, background } => build(&state, &dvm, prerun, json, background)?,
        Command::List { json } => list(&state, json)?,
        Command::Status { dvm, json } => return status(&state, &dvm, json),
        Command::Info { dvm, json } => {
            let description = savefiles::describe(&state, &machine()?, &dvm)?;
            report::print_info(&description, json);
        }
        Command::Verify { dvm, json } => {
            let bar = progress::Bar::new();
            let path = savefiles::verify(&state, &dvm, &|progress| bar.show(progress))?;
            bar.finish();
            report::print_verified(&dvm, &path, json);
        }
        Command::Import { file, dvm, template, disks, kernel, initrd, json } => {
            let (template, kernel, initrd) = (template.as_deref(), kernel.as_deref(), initrd.as_deref());
            let order = Import { file: &file, dvm: &dvm, template, disks: &disks, kernel, initrd };
            let bar = progress::Bar::new();
            let imported = savefiles::import(&state, &machine()?, &order, &|progress| bar.show(progress))?;
            bar.finish();
            client::changed(&state);
            report::print_imported(&dvm, &imported, json);
        }
        Command::Export { dvm, file, json } => {
            let bar = progress::Bar::new();
            let exported = savefiles::export(&state, &dvm, &file, &|progress| bar.show(progress))?;
            bar.finish();
            report::print_exported(&dvm, &exported, json);
        }
        Command::Rm { dvm } => {
            savefiles::remove(&state, &dvm)?;
            client::changed(&state);
        }
        Command::Gc { json } => {
            machine::sweep(&state, &machine()?)?;
            report::print_collected(&savefiles::collect(&state)?, json);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// NAME=FILE.
fn name_and_file(text: &str) -> std::result::Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, file)) if !name.is_empty() && !file.is_empty() => Ok((name.into(), file.into())),
        _ => Err("it should be NAME=FILE".into()),
    }
}

fn build(state: &State, dvm: &str, prerun: Option<PathBuf>, json: bool, background: bool) -> Result<()> {
    let prerun = match prerun {
        None => Prerun::Same,
        Some(path) if path.as_os_str() == "none" => Prerun::None,
        Some(path) => Prerun::File(path),
    };
    let mut watch = progress::BuildWatch::new();
    let built = savefiles::build(state, &machine()?, dvm, &prerun, !background, &mut watch)?;
    watch.finish();
    client::changed(state);
    if let Some(built) = built {
        report::print_built(dvm, &built, json);
    }
    Ok(())
}

fn list(state: &State, json: bool) -> Result<()> {
    let mut rows = Vec::new();
    for qube in Qube::all(state)?.into_iter().filter(|qube| qube.dvm().is_ok()) {
        let standing = standing(state, &qube.name)?;
        let pin = qube.dvm()?.savefile.clone();
        let bytes =
            pin.as_ref().and_then(|pin| std::fs::metadata(state.savefile(&qube.name, pin.generation)).ok());
        rows.push(report::Row {
            name: qube.name.clone(),
            generation: pin.map(|pin| pin.generation),
            stored_bytes: bytes.map(|meta| meta.len()),
            standing,
        });
    }
    report::print_list(&rows, json);
    Ok(())
}

fn status(state: &State, dvm: &str, json: bool) -> Result<ExitCode> {
    let standing = standing(state, dvm)?;
    report::print_status(dvm, &standing, &savefiles::rebuild(state, dvm), json);
    Ok(if standing == Standing::Fresh { ExitCode::SUCCESS } else { ExitCode::from(3) })
}

fn standing(state: &State, dvm: &str) -> Result<Standing> {
    let guest = Guest::load(state, dvm)?;
    let host = machine()?.host(state, &guest.spec.kernel)?;
    savefiles::standing(state, &guest, &*host)
}
