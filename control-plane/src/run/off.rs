//! Waiting for a guest that switches itself off.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use engine::agent::AgentError;
use engine::host::{Domain, HostError};
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::Signal;
use qrexec::GuestFrame;

use crate::agent_link::AgentLink;
use crate::session::{SessionError, Signals};

/// Waits until the guest has switched itself off, or a signal comes.
pub(super) fn await_off(
    domain: &mut dyn Domain,
    mut agent: Option<&mut AgentLink>,
    signals: &mut Signals,
    limit: Duration,
) -> std::result::Result<Option<Signal>, SessionError> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(link) = agent.take() {
            // A channel that closes is no error: the guest is going down.
            agent = listen(link)?.then_some(link);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(HostError::Timeout { step: "shut the qube down", limit }.into());
        }
        let timeout = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
        let mut fds = vec![
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(domain.events(), PollFlags::POLLIN),
        ];
        fds.extend(agent.as_ref().map(|link| {
            let sends = if link.wants_to_send() { PollFlags::POLLOUT } else { PollFlags::empty() };
            PollFd::new(link.as_fd(), PollFlags::POLLIN | sends)
        }));
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(SessionError::Io { step: "wait", source: error.into() }),
        }
        if let Some(signal) = signals.pending() {
            return Ok(Some(signal));
        }
        match domain.serve() {
            Ok(()) => {}
            Err(HostError::PoweredOff { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Sends and hears what there is. Whether the channel is still open; an error when the agent cannot shut down.
fn listen(link: &mut AgentLink) -> std::result::Result<bool, SessionError> {
    if link.flush().is_err() {
        return Ok(false);
    }
    loop {
        match link.next_frame() {
            Ok(Some(GuestFrame::Failed { stream: 0, failed })) => {
                let message = format!("{}: {}", failed.step, failed.message);
                return Err(AgentError::Failed { step: "shut the qube down", message }.into());
            }
            Ok(Some(_)) => {}
            Ok(None) => return Ok(true),
            Err(_) => return Ok(false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::host::{AgentPipe, Capture};
    use engine::units::ByteCount;
    use qrexec::{Failed, Op};
    use std::io::{Read, Write};
    use std::os::fd::BorrowedFd;
    use std::os::unix::net::UnixStream;

    /// A domain whose events are bytes: `o` has it off, `x` dead.
    struct Bytes(UnixStream);

    impl Domain for Bytes {
        fn events(&self) -> BorrowedFd<'_> {
            self.0.as_fd()
        }

        fn serve(&mut self) -> std::result::Result<(), HostError> {
            let (step, mut byte) = ("serve", [0]);
            match self.0.read(&mut byte) {
                Ok(_) if byte == *b"o" => Err(HostError::PoweredOff { step }),
                Ok(_) if byte == *b"x" => Err(HostError::Gone { step, detail: String::new() }),
                _ => Ok(()),
            }
        }

        fn agent(&mut self) -> std::result::Result<Box<dyn AgentPipe>, HostError> {
            unreachable!("it has been connected to")
        }

        fn run(&mut self) -> std::result::Result<(), HostError> {
            unreachable!("it runs")
        }

        fn pause(&mut self) -> std::result::Result<(), HostError> {
            unreachable!("it is going down")
        }

        fn touched(&mut self) -> std::result::Result<Vec<engine::units::PageRange>, HostError> {
            unreachable!("it is going down")
        }

        fn steps(&mut self) -> Vec<(&'static str, Instant)> {
            unreachable!("it is going down")
        }

        fn reclaim_free_memory(&mut self, _: ByteCount) -> std::result::Result<(), HostError> {
            unreachable!("it is going down")
        }

        fn capture(&mut self) -> std::result::Result<Capture, HostError> {
            unreachable!("it is going down")
        }

        fn destroy(self: Box<Self>) -> std::result::Result<(), HostError> {
            Ok(())
        }
    }

    /// Waits for the end of a domain whose hypervisor and agent say these bytes; without any, the agent hangs up.
    fn awaited(events: &[u8], agent: &[u8]) -> std::result::Result<Option<Signal>, SessionError> {
        let pair = || {
            let (ours, theirs) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            (ours, theirs)
        };
        let ((ours, mut hypervisor), (pipe, mut guest)) = (pair(), pair());
        hypervisor.write_all(events).unwrap();
        guest.write_all(agent).unwrap();
        let guest = Some(guest).filter(|_| !agent.is_empty());
        let mut link = AgentLink::new(Box::new(pipe));
        let mut signals = Signals::block().unwrap();
        let ended = await_off(&mut Bytes(ours), Some(&mut link), &mut signals, Duration::from_millis(50));
        drop(guest);
        ended
    }

    fn frame(frame: &GuestFrame) -> Vec<u8> {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        bytes
    }

    #[test]
    fn only_a_guest_that_switches_itself_off_in_time_has_shut_down() {
        let done = frame(&GuestFrame::Done(Op::Shutdown));
        assert!(matches!(awaited(b"o", &done), Ok(None)));
        assert!(matches!(awaited(b"o", b""), Ok(None)), "the channel's end is no error");
        let died = awaited(b"x", &done);
        assert!(matches!(died, Err(SessionError::Host(HostError::Gone { .. }))), "{died:?}");
        for agent in [&done[..], b""] {
            let late = awaited(b"", agent);
            assert!(matches!(late, Err(SessionError::Host(HostError::Timeout { .. }))), "{late:?}");
        }
        let failed =
            Failed { op: Some(Op::Shutdown), step: "power off".into(), errno: 1, message: "no".into() };
        let refused = awaited(b"", &frame(&GuestFrame::Failed { stream: 0, failed }));
        assert!(matches!(refused, Err(SessionError::Agent(AgentError::Failed { .. }))), "{refused:?}");
    }

    #[test]
    fn a_signal_is_heard_while_a_guest_shuts_down() {
        let _blocked = Signals::block().unwrap();
        nix::sys::signal::raise(Signal::SIGTERM).unwrap();
        assert!(matches!(awaited(b"", b""), Ok(Some(Signal::SIGTERM))));
    }
}
