//! `qvm-tags`: tags of a qube.

use admin_api::Kind;
use clap::{Parser, Subcommand};

use crate::api::{is, Common};
use crate::names;
use crate::outcome::{print, Outcome, FAILED};

/// Manages a qube's tags.
#[derive(Parser)]
#[command(version, disable_help_subcommand = true)]
pub struct Options {
    #[command(flatten)]
    common: Common,
    /// A qube's name
    #[arg(value_name = "VMNAME")]
    qube: String,
    #[command(subcommand)]
    what: Option<What>,
}

#[derive(Subcommand)]
enum What {
    /// List the tags, or tell by the exit status whether there is this one
    #[command(visible_aliases = ["ls", "l", "query"])]
    List {
        /// A tag
        tag: Option<String>,
    },
    /// Add tags
    #[command(visible_aliases = ["a", "set"])]
    Add {
        /// The tags
        #[arg(value_name = "TAG", required = true)]
        tags: Vec<String>,
    },
    /// Delete a tag
    #[command(visible_aliases = ["d", "unset", "u"])]
    Del {
        /// The tag
        tag: String,
    },
}

/// Runs `qvm-tags`.
pub fn run(options: Options) -> Outcome {
    let api = options.common.api();
    let qube = &options.qube;
    names::one(&api.qubes()?, qube)?;
    match options.what.unwrap_or(What::List { tag: None }) {
        What::List { tag: None } => {
            let mut tags = api.names("admin.vm.tag.List", qube, "")?;
            tags.sort();
            print(&tags.iter().map(|tag| format!("{tag}\n")).collect::<String>())?;
        }
        What::List { tag: Some(tag) } => {
            if api.text("admin.vm.tag.Get", qube, &tag)? != "1" {
                return Ok(FAILED);
            }
            print(&format!("{tag}\n"))?;
        }
        What::Add { tags } => {
            for tag in tags {
                api.call("admin.vm.tag.Set", qube, &tag, "")?;
            }
        }
        What::Del { tag } => match api.call("admin.vm.tag.Remove", qube, &tag, "") {
            Err(error) if !is(&error, Kind::TagNotFound) => return Err(error.into()),
            _ => {}
        },
    }
    Ok(0)
}
