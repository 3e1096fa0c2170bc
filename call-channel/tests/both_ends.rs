//! Both ends against each other over a socket, with real programs at one and real pipes at the other; and each end against a peer that is not
//! what it should be.

use std::io::{pipe, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use call_channel::port::Port;
use call_channel::service::Step;
use call_channel::{run_client, run_service, Broken, Running, Service, Socket, Streams, Watch, NOTHING_CAME};
use qrexec::stock::Version;

const LIMIT: Duration = Duration::from_secs(60);

fn pair() -> (Socket, Socket) {
    let (one, other) = UnixStream::pair().unwrap();
    (Socket::new(one).unwrap(), Socket::new(other).unwrap())
}

fn shell(line: &str) -> Running {
    let mut command = Command::new("sh");
    command.args(["-c", line]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Running::of(command.spawn().unwrap()).unwrap()
}

fn serve(channel: Socket, line: &'static str) -> thread::JoinHandle<Result<i32, Broken>> {
    thread::spawn(move || run_service(channel, || Ok(shell(line)), Watch::default()))
}

/// A call of `line`, with this input: output, complaints, exit code.
fn call(line: &'static str, input: &[u8]) -> (Vec<u8>, Vec<u8>, i32) {
    let (ours, theirs) = pair();
    let service = serve(theirs, line);
    let ((stdin, mut to), (mut out, stdout), (mut err, stderr)) =
        (pipe().unwrap(), pipe().unwrap(), pipe().unwrap());
    let streams = Streams::of_client([stdin.as_fd(), stdout.as_fd(), stderr.as_fd()]).unwrap();
    drop((stdin, stdout, stderr));
    thread::scope(|scope| {
        let client = scope.spawn(move || run_client(ours, streams, Watch::default()));
        scope.spawn(move || {
            // A program that does not read all of it is no failure here.
            let _ = to.write_all(input);
        });
        let read = |stream: &mut std::io::PipeReader| {
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).unwrap();
            bytes
        };
        let complaints = scope.spawn(move || read(&mut err));
        let output = read(&mut out);
        let code = client.join().unwrap().unwrap();
        assert_eq!(service.join().unwrap().unwrap(), code);
        (output, complaints.join().unwrap(), code)
    })
}

#[test]
fn a_word_and_a_code_come_back() {
    let (out, err, code) = call("cat; echo two >&2; exit 7", b"one");
    assert_eq!((out, err, code), (b"one".to_vec(), b"two\n".to_vec(), 7));
    assert_eq!(call("kill -9 $$", b"").2, 137);
}

#[test]
fn sixty_four_mebibytes_go_through_cat() {
    let sent: Vec<u8> = (0..64u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let started = Instant::now();
    let (out, _, code) = call("cat", &sent);
    assert!(out == sent && code == 0);
    eprintln!("64 MiB there and back in {:?}", started.elapsed());
}

#[test]
fn both_outputs_flood_and_all_arrives() {
    let line = "head -c 20000000 /dev/zero & head -c 20000000 /dev/zero >&2; wait";
    let (out, err, code) = call(line, b"");
    assert_eq!((out.len(), err.len(), code), (20_000_000, 20_000_000, 0));
}

#[test]
fn the_end_of_input_comes_through_and_a_program_that_reads_none_stops_nobody() {
    assert_eq!(call("wc -c", &[7; 100_000]).0, b"100000\n");
    let (out, _, code) = call("exec 0<&-; sleep 0.2; echo done", &vec![7; 8 << 20]);
    assert_eq!((out, code), (b"done\n".to_vec(), 0));
    assert_eq!(call("exec 1>&-; cat >&2", b"x").1, b"x");
}

#[test]
fn what_stays_behind_holds_nobody() {
    let started = Instant::now();
    let (out, _, code) = call("sleep 30 & echo there", b"");
    assert_eq!((out, code), (b"there\n".to_vec(), 0));
    assert!(started.elapsed() < Duration::from_secs(20));
}

#[test]
fn no_program_starts_for_one_who_does_not_speak_and_a_refusal_is_a_code() {
    let (ours, theirs) = pair();
    let watch = Watch { hello_by: Some(Instant::now() + Duration::from_millis(100)), ..Watch::default() };
    let broken = run_service(theirs, || panic!("nobody has asked"), watch);
    assert!(matches!(broken, Err(Broken::Late)), "{broken:?}");
    drop(ours);
    let (ours, theirs) = pair();
    let service = thread::spawn(|| run_service(theirs, || Err(127), Watch::default()));
    assert_eq!(run_client(ours, Streams::default(), Watch::default()).unwrap(), 127);
    assert_eq!(service.join().unwrap().unwrap(), 127);
}

#[test]
fn a_reader_that_has_gone_ends_the_writer() {
    let (ours, theirs) = pair();
    let service = serve(theirs, "trap 'exit 1' TERM; exec yes");
    let (mut out, stdout) = pipe().unwrap();
    let streams = Streams { stdout: Some(Port::own(stdout.into()).unwrap()), ..Streams::default() };
    let client = thread::spawn(move || run_client(ours, streams, Watch::default()));
    let mut bytes = [0; 4];
    out.read_exact(&mut bytes).unwrap();
    drop(out);
    assert_eq!(client.join().unwrap().unwrap(), 141);
    // Its pipe is closed by then.
    assert!(matches!(service.join().unwrap(), Err(Broken::Gone(_))));
    assert_eq!(&bytes, b"y\ny\n");
}

#[test]
fn a_stalled_reader_stops_the_writer_and_loses_nothing() {
    let (ours, theirs) = pair();
    let service = serve(theirs, "head -c 3000000 /dev/zero; exit 3");
    let (mut out, stdout) = pipe().unwrap();
    let streams = Streams::of_client([std::io::stdin().as_fd(), stdout.as_fd(), stdout.as_fd()]).unwrap();
    drop(stdout);
    let streams = Streams { stdin: None, ..streams };
    let client = thread::spawn(move || run_client(ours, streams, Watch::default()));
    thread::sleep(Duration::from_millis(300));
    assert!(!service.is_finished(), "there is no room for all of it");
    let mut bytes = Vec::new();
    out.read_to_end(&mut bytes).unwrap();
    assert_eq!((bytes.len(), client.join().unwrap().unwrap()), (3_000_000, 3));
}

#[test]
fn whoever_goes_breaks_the_call_at_the_other_end() {
    // The client goes while the program takes no input and gives no output.
    let (ours, theirs) = pair();
    let service = serve(theirs, "sleep 30");
    let (closed, hang_up) = pipe().unwrap();
    let client = thread::spawn(move || {
        let watch = Watch { until: Some(closed.as_fd()), ..Watch::default() };
        let (stdin, _held) = pipe().unwrap();
        let streams = Streams { stdin: Some(Port::own(stdin.into()).unwrap()), ..Streams::default() };
        run_client(ours, streams, watch)
    });
    thread::sleep(Duration::from_millis(100));
    let started = Instant::now();
    drop(hang_up);
    assert!(matches!(client.join().unwrap(), Err(Broken::HungUp)));
    assert!(matches!(service.join().unwrap(), Err(Broken::Gone(_))));
    assert!(started.elapsed() < Duration::from_secs(10));
    // The service goes after a word, without an exit code.
    let (ours, theirs) = pair();
    let (mut out, stdout) = pipe().unwrap();
    let streams = Streams { stdout: Some(Port::own(stdout.into()).unwrap()), ..Streams::default() };
    let client = thread::spawn(move || run_client(ours, streams, Watch::default()));
    let mut theirs = raw(theirs);
    theirs.write_all(&message(0x300, &3u32.to_le_bytes())).unwrap();
    theirs.write_all(&message(0x191, b"word")).unwrap();
    drop(theirs);
    assert!(matches!(client.join().unwrap(), Err(Broken::Gone(_))));
    let mut bytes = Vec::new();
    out.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, b"word");
}

fn raw(socket: Socket) -> UnixStream {
    let stream = UnixStream::from(socket.as_fd().try_clone_to_owned().unwrap());
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

fn message(kind: u32, body: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &(body.len() as u32).to_le_bytes(), body].concat()
}

#[test]
fn a_hostile_peer_breaks_its_call() {
    let hello = message(0x300, &2u32.to_le_bytes());
    let too_old = message(0x300, &1u32.to_le_bytes());
    let too_long = [hello.clone(), 0x190u32.to_le_bytes().to_vec(), 4097u32.to_le_bytes().to_vec()].concat();
    let unknown = [hello.clone(), message(0x213, b"")].concat();
    for bytes in [too_old, too_long, unknown, message(0x190, b"first")] {
        let (ours, theirs) = pair();
        let client = thread::spawn(move || run_client(ours, Streams::default(), Watch::default()));
        raw(theirs).write_all(&bytes).unwrap();
        assert!(matches!(client.join().unwrap(), Err(Broken::Wire(_))));
        let (ours, theirs) = pair();
        let service = serve(theirs, "cat");
        let mut peer = raw(ours);
        peer.write_all(&bytes).unwrap();
        assert!(matches!(service.join().unwrap(), Err(Broken::Wire(_))));
    }
}

/// One that sends without end and never reads: the program's output stops in the channel, and nothing is held.
#[test]
fn one_who_never_reads_is_not_heard_without_end() {
    let (ours, theirs) = pair();
    let service = serve(theirs, "cat");
    let mut peer = raw(ours);
    peer.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
    peer.write_all(&message(0x300, &Version::V3.number().to_le_bytes())).unwrap();
    let piece = message(0x190, &[1; 65536]);
    let mut taken = 0;
    while let Ok(()) = peer.write_all(&piece) {
        taken += piece.len();
        assert!(taken < 64 << 20, "it takes without end");
    }
    drop(peer);
    assert!(matches!(service.join().unwrap(), Err(Broken::Gone(_) | Broken::Wire(_))));
}

#[test]
fn no_descriptor_of_others_is_made_non_blocking() {
    let (stdin, _to) = pipe().unwrap();
    let (_out, stdout) = pipe().unwrap();
    let _streams = Streams::of_client([stdin.as_fd(), stdout.as_fd(), stdout.as_fd()]).unwrap();
    for fd in [OwnedFd::from(stdin), stdout.into()] {
        assert!(!rustix::fs::fcntl_getfl(&fd).unwrap().contains(rustix::fs::OFlags::NONBLOCK));
    }
}

#[test]
fn a_peer_that_does_not_come_is_not_waited_for_but_one_that_has_spoken_is_heard_to_its_end() {
    // The word of who was to have it come is there before anything else is.
    for speaks in [false, true] {
        let (ours, theirs) = pair();
        let (broker, mut word) = pipe().unwrap();
        word.write_all(b"x").unwrap();
        let watch = Watch { broker: Some(broker.as_fd()), ..Watch::default() };
        if !speaks {
            let broken = run_client(ours, Streams::default(), watch);
            assert!(matches!(broken, Err(Broken::NotMet)), "{broken:?}");
            continue;
        }
        let mut service = Service::new(theirs);
        service.turn(NOTHING_CAME).unwrap();
        let service = thread::spawn(move || {
            thread::sleep(Duration::from_millis(200));
            loop {
                match service.turn(NOTHING_CAME) {
                    Ok(Step::Agreed) => service.end(3),
                    Ok(Step::On) => thread::sleep(Duration::from_millis(5)),
                    Ok(Step::Over) | Err(_) => break,
                }
            }
        });
        assert_eq!(run_client(ours, Streams::default(), watch).unwrap(), 3);
        service.join().unwrap();
    }
}

#[test]
fn once_the_peer_has_spoken_the_hang_up_of_who_had_it_come_ends_the_call() {
    let (ours, theirs) = pair();
    let _service = serve(theirs, "exec sleep 5");
    let (broker, word) = pipe().unwrap();
    let client = thread::spawn(move || {
        let watch = Watch { broker: Some(broker.as_fd()), ..Watch::default() };
        run_client(ours, Streams::default(), watch)
    });
    thread::sleep(Duration::from_millis(200));
    assert!(!client.is_finished());
    drop(word);
    assert!(matches!(client.join().unwrap(), Err(Broken::HungUp)));
}
