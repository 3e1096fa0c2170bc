//! `qrexec-client` as its users run it, against a guest whose agent is played by hand.

mod common;

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Output, Stdio};

use common::{program, Guest, NAME};
use control_plane::calls::message::Control;
use qrexec::{Exec, Exit, GuestFrame, HostFrame, User};

fn client(guest: &Guest, arguments: &[&str]) -> Command {
    let mut command = Command::new(program("qrexec-client"));
    command.env("DISPVM_ROOT", guest.state.root()).args(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn take_exec(guest: &mut Guest) -> (u32, Exec) {
    match guest.agent.hear() {
        HostFrame::Exec { stream, exec } => (stream, *exec),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_service_is_called_with_our_streams_and_its_status_is_ours() {
    let mut guest = Guest::start(true);
    let line = "DEFAULT:QUBESRPC qubes.VMExec+id dom0";
    let mut child = client(&guest, &["-d", NAME, "-w", "5", "-W", "--", line]).spawn().unwrap();
    let (stream, exec) = take_exec(&mut guest);
    assert_eq!(exec.argv, [&b"/etc/qubes-rpc/qubes.VMExec"[..], b"id"]);
    child.stdin.take().unwrap().write_all(b"in").unwrap();
    assert_eq!(guest.agent.hear(), HostFrame::Stdin { stream, bytes: b"in".to_vec() });
    assert_eq!(guest.agent.hear(), HostFrame::StdinEof { stream });
    guest.agent.say(&GuestFrame::Stdout { stream, bytes: b"\x1b[31mout\n".to_vec() });
    guest.agent.say(&GuestFrame::Stderr { stream, bytes: b"err".to_vec() });
    guest.agent.say(&GuestFrame::Exited { stream, exit: Exit::NotFound(2) });
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    assert_eq!((status.code(), stdout, stderr), (Some(127), b"\x1b[31mout\n".to_vec(), b"err".to_vec()));
    guest.end().unwrap();
}

#[test]
fn what_a_terminal_should_not_see_is_replaced_and_a_status_can_be_ignored() {
    let mut guest = Guest::start(true);
    let child = client(&guest, &["-tTE", "-d", NAME, "root:nogui:id"]).spawn().unwrap();
    let (stream, exec) = take_exec(&mut guest);
    assert_eq!((exec.user, exec.argv[3].as_slice()), (User::Root, &b"id"[..]));
    guest.agent.say(&GuestFrame::Stdout { stream, bytes: b"a\x1b[2J\xc3\xa4\tb\r\n".to_vec() });
    guest.agent.say(&GuestFrame::Stderr { stream, bytes: b"\x00\x07".to_vec() });
    guest.agent.say(&GuestFrame::Exited { stream, exit: Exit::Code(9) });
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    assert_eq!((status.code(), stdout, stderr), (Some(0), b"a_[2J__\tb\r\n".to_vec(), b"_\x07".to_vec()));
    guest.end().unwrap();
}

#[test]
fn a_local_program_talks_with_the_command() {
    let mut guest = Guest::start(true);
    let local = "echo asked; read answer; echo \"heard $answer\" >&2";
    let child = client(&guest, &["-l", local, "-d", NAME, "DEFAULT:cat"]).spawn().unwrap();
    let (stream, _) = take_exec(&mut guest);
    assert_eq!(guest.agent.hear(), HostFrame::Stdin { stream, bytes: b"asked\n".to_vec() });
    guest.agent.say(&GuestFrame::Stdout { stream, bytes: b"answer\n".to_vec() });
    assert_eq!(guest.agent.hear(), HostFrame::StdinEof { stream });
    guest.agent.say(&GuestFrame::Exited { stream, exit: Exit::Code(4) });
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    assert_eq!((status.code(), stdout, stderr), (Some(4), Vec::new(), b"heard answer\n".to_vec()));
    guest.end().unwrap();
}

#[test]
fn a_command_that_is_only_started_outlives_who_started_it() {
    let mut guest = Guest::start(true);
    let child = client(&guest, &["-e", "-d", NAME, "DEFAULT:sleep 9"]).spawn().unwrap();
    let (stream, _) = take_exec(&mut guest);
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(0));
    assert_eq!(guest.agent.hear(), HostFrame::StdinEof { stream });
    guest.agent.say(&GuestFrame::Stdout { stream, bytes: vec![0; 100_000] });
    assert!(matches!(guest.agent.hear_any(), HostFrame::StdoutCredit { .. }));
    guest.agent.say(&GuestFrame::Exited { stream, exit: Exit::Code(0) });
    guest.end().unwrap();
}

#[test]
fn a_killed_client_ends_its_command() {
    let mut guest = Guest::start(true);
    let mut child = client(&guest, &["-d", NAME, "DEFAULT:sleep 9"]).spawn().unwrap();
    let (stream, _) = take_exec(&mut guest);
    child.kill().unwrap();
    child.wait().unwrap();
    let heard = [guest.agent.hear(), guest.agent.hear()];
    assert!(heard.contains(&HostFrame::Signal { stream, signal: 15 }), "{heard:?}");
    guest.end().unwrap();
}

#[test]
fn what_cannot_be_done_is_said_with_what_to_type() {
    let guest = Guest::start(true);
    let cases: [(&[&str], i32, &str); 15] = [
        (&["-d", "work", "DEFAULT:id"], 126, "qvm-start work"),
        (&["-d", NAME, "alice:id"], 126, "DEFAULT, user or root"),
        (&["-d", NAME, "id"], 1, "USER:COMMAND"),
        (&["-d", "dom0", "DEFAULT:id"], 1, "itself"),
        (&["-d", "@anyvm", "DEFAULT:id"], 1, "@dispvm"),
        (&["-d", NAME], 1, "USER:COMMAND"),
        (&["--nonsense", "-d", NAME, "DEFAULT:id"], 1, "--nonsense"),
        (&["-w", "soon", "-d", NAME, "DEFAULT:id"], 1, "-w"),
        (&["-e", "-l", "true", "-d", NAME, "DEFAULT:id"], 1, "cannot be used with"),
        (&["-e", "-c", "SOCKET1,work,3", "-d", NAME, "DEFAULT:id"], 1, "cannot be used with"),
        (&["-c", "SOCKET1,work,3", "-d", NAME, "DEFAULT:id"], 1, "qrexec-policy-exec"),
        (&["--socket-dir=/run/qubes", "-d", NAME, "DEFAULT:id"], 1, "calls/QUBE.sock"),
        (&["--use-stdin-socket", "-d", NAME, "DEFAULT:id"], 2, "no stream socket"),
        (&["--use-stdin-socket", "-l", "true", "-d", NAME, "DEFAULT:id"], 1, "cannot be used with"),
        (&["-d", "@dispvm:none", "DEFAULT:QUBESRPC qubes.VMShell dom0"], 125, "none"),
    ];
    for (arguments, status, hint) in cases {
        let mut child = client(&guest, arguments).spawn().unwrap();
        drop(child.stdin.take());
        let (mut said, mut err) = (String::new(), child.stderr.take().unwrap());
        err.read_to_string(&mut said).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(status), "{arguments:?}: {said}");
        assert!(said.contains(hint), "{arguments:?}: {said}");
    }
    guest.end().unwrap();
}

/// A guest that is paused takes commands and says nothing.
#[test]
fn a_paused_qube_is_waited_for_as_long_as_is_said() {
    let mut guest = Guest::start(true);
    control_plane::calls::client::control(&guest.state, NAME, Control::Pause).unwrap();
    let output = client(&guest, &["-w", "1", "-d", NAME, "DEFAULT:id"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{said}");
    assert!(said.contains("has been paused for 1 s") && said.contains("qvm-unpause"), "{said}");

    for limit in ["60", "0"] {
        let child =
            client(&guest, &["-w", limit, "-d", NAME, "DEFAULT:id"]).stdin(Stdio::null()).spawn().unwrap();
        control_plane::calls::client::control(&guest.state, NAME, Control::Unpause).unwrap();
        let (stream, _) = take_exec(&mut guest);
        assert_eq!(guest.agent.hear(), HostFrame::StdinEof { stream });
        guest.agent.say(&GuestFrame::Exited { stream, exit: Exit::Code(7) });
        assert_eq!(child.wait_with_output().unwrap().status.code(), Some(7));
        control_plane::calls::client::control(&guest.state, NAME, Control::Pause).unwrap();
    }
    guest.end().unwrap();
}

#[test]
fn one_socket_can_be_input_and_output() {
    let mut guest = Guest::start(true);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let mut child = client(&guest, &["--use-stdin-socket", "-d", NAME, "DEFAULT:cat"])
        .stdin(OwnedFd::from(theirs))
        .spawn()
        .unwrap();
    let (stream, _) = take_exec(&mut guest);
    ours.write_all(b"in").unwrap();
    assert_eq!(guest.agent.hear(), HostFrame::Stdin { stream, bytes: b"in".to_vec() });
    guest.agent.say(&GuestFrame::Stdout { stream, bytes: b"out".to_vec() });
    guest.agent.say(&GuestFrame::Exited { stream, exit: Exit::Code(0) });
    let mut heard = String::new();
    ours.read_to_string(&mut heard).unwrap();
    assert_eq!((heard.as_str(), child.wait().unwrap().code()), ("out", Some(0)));
    guest.end().unwrap();
}

/// `-k` kills whatever comes of the command, over the Admin API.
#[test]
fn a_qube_is_killed_afterwards_where_that_is_asked_for() {
    let mut guest = Guest::start(true);
    let socket = guest.state.root().join("api.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let mut command = client(&guest, &["-k", "-d", NAME, "DEFAULT:id"]);
    let child = command.env("DISPVM_API_SOCKET", &socket).spawn().unwrap();
    let (stream, _) = take_exec(&mut guest);
    guest.agent.say(&GuestFrame::Exited { stream, exit: Exit::Code(3) });
    let (mut api, _) = listener.accept().unwrap();
    let mut asked = Vec::new();
    api.read_to_end(&mut asked).unwrap();
    assert!(
        asked.starts_with(b"admin.vm.Kill+ dom0 name ") && asked.ends_with(format!("{NAME}\0").as_bytes()),
        "{asked:?}"
    );
    api.write_all(b"0\0").unwrap();
    drop(api);
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(3));
    guest.end().unwrap();
}
