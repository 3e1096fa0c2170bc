//! `dispvm-qube`: makes, lists and removes TemplateVMs and DVM templates.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use control_plane::cli::{fail, generate_if_asked, Common};
use control_plane::daemon;
use control_plane::error::{Kind, Result};
use control_plane::output::bytes_text;
use control_plane::qube::{Class, Dvm, Qube};
use control_plane::templates::{self, TemplateFiles};

/// Makes, lists and removes TemplateVMs and the DVM templates on them.
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
    /// List qubes
    List,
    /// Remove a qube
    Rm {
        /// Name
        name: String,
    },
}

fn main() -> ExitCode {
    generate_if_asked::<Options>();
    let options = Options::parse();
    match run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let status = if error.kind == Kind::Usage { 2 } else { 1 };
            fail("dispvm-qube", &error, status)
        }
    }
}

fn run(options: Options) -> Result<()> {
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
                spares: spares,
                savefile: None,
            };
            templates::add_dvm(&state, &name, &label, dvm)?;
        }
        Command::List => {
            for qube in Qube::all(&state)? {
                println!("{}", line(&qube));
            }
        }
        Command::Rm { name } => templates::remove(&state, &name)?,
    }
    daemon::client::changed(&state);
    Ok(())
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
    }
}
