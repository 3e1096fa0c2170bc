//! Manual pages and shell completions, which each of our commands writes itself: `COMMAND --generate man|bash|zsh|fish`.

use std::ffi::OsString;
use std::io::{self, Write};

use clap::{Command, CommandFactory};
use clap_complete::Shell;

/// What is asked for, if `--generate KIND` are the only arguments.
pub fn asked(arguments: &[OsString]) -> Option<&str> {
    match arguments {
        [option, kind] if option == "--generate" => kind.to_str(),
        _ => None,
    }
}

/// The manual page of a command and its subcommands, or the completions for a shell.
pub fn generate(mut command: Command, kind: &str) -> io::Result<Vec<u8>> {
    let name = command.get_name().to_owned();
    let mut out = Vec::new();
    match (kind, kind.parse::<Shell>()) {
        ("man", _) => manual(command, &mut out)?,
        (_, Ok(shell)) => clap_complete::generate(shell, &mut command, name, &mut out),
        (_, Err(_)) => {
            return Err(io::Error::other(format!("--generate knows man, bash, zsh and fish, not {kind:?}")))
        }
    }
    Ok(out)
}

/// Does it, if this program was asked to, and ends the program. Otherwise nothing happens.
pub fn generate_if_asked<P: CommandFactory>() {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let Some(kind) = asked(&arguments) else { return };
    match generate(P::command(), kind).and_then(|text| io::stdout().write_all(&text)) {
        Ok(()) => std::process::exit(0),
        Err(error) => {
            eprintln!("{}: {error}", P::command().get_name());
            std::process::exit(2);
        }
    }
}

/// One page for a command and its subcommands.
fn manual(mut command: Command, out: &mut Vec<u8>) -> io::Result<()> {
    command.build();
    let subcommands: Vec<Command> =
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
