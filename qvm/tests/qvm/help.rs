//! The tools' help is a contract: it is kept as files, and a change shows in them. `UPDATE_HELP=1 cargo test -p qvm` writes them anew.

use std::fs;
use std::path::Path;
use std::process::Command;

fn qvm(words: &[&str]) -> (i32, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_qvm")).args(words).output().unwrap();
    let text = if output.stdout.is_empty() { output.stderr } else { output.stdout };
    (output.status.code().unwrap(), String::from_utf8(text).unwrap())
}

fn tools() -> Vec<String> {
    let (_, usage) = qvm(&[]);
    let list = usage.lines().find_map(|line| line.strip_prefix("tools: ")).unwrap();
    list.split(", ").map(str::to_owned).collect()
}

/// What stands under `Commands:`.
fn subcommands(help: &str) -> Vec<String> {
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let names = listed.take_while(|line| !line.is_empty()).filter_map(|line| line.split_whitespace().next());
    names.map(str::to_owned).collect()
}

fn is_as_written_down(words: &[&str]) -> String {
    // A qube in front of the subcommand, where there has to be one.
    let asked: Vec<&str> = match words {
        [tool @ ("qvm-tags" | "qvm-firewall"), subcommand] => vec![tool, "VMNAME", subcommand, "--help"],
        words => [words, &["--help"]].concat(),
    };
    let (status, found) = qvm(&asked);
    assert_eq!(status, 0, "{words:?}");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/help").join(words.join("-") + ".txt");
    if std::env::var_os("UPDATE_HELP").is_some() {
        fs::write(&path, &found).unwrap();
    }
    let wanted = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(found, wanted, "`{} --help` is not as in {}", words.join(" "), path.display());
    found
}

#[test]
fn help_is_as_it_was_written_down() {
    for tool in tools() {
        let help = is_as_written_down(&[&tool]);
        for subcommand in subcommands(&help) {
            is_as_written_down(&[&tool, &subcommand]);
        }
    }
}

#[test]
fn each_tool_writes_its_manual_page_and_completions() {
    for tool in tools() {
        let (status, page) = qvm(&[&tool, "--generate", "man"]);
        assert!(status == 0 && page.contains(&format!(".TH {tool} 1")), "{page}");
        for shell in ["bash", "zsh", "fish"] {
            let (status, text) = qvm(&[&tool, "--generate", shell]);
            let has_options = text.contains("api-socket") || tool.starts_with("qfile");
            assert!(status == 0 && text.contains(&tool) && has_options, "{text}");
        }
        assert_eq!(qvm(&[&tool, "--generate", "poem"]).0, 2);
    }
}
