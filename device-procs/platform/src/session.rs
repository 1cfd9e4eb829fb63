//! A runner's session, from its Hello until it disconnects. Requests are carried out in
//! ticket order; output and input are moved in between.

use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use device_core::Poller;
use device_core::adaptive_polling::{AdaptivePolling, PollAction};
use outrigger_protocol::channel;
use outrigger_protocol::trap::{
    FromPlatform, ToPlatform, TrapRequest, TrapSlot, VERSION, first_open,
};
use rustix::event::PollFlags;
use rustix::thread::futex;

use crate::devices::uart;
use crate::error::Error;
use crate::input::Input;
use crate::output::{Blocked, CHUNK, Output};
use crate::region::StateRegion;
use crate::state::{DEBUG, PlatformState, SERIAL};
use crate::wait::{self, WaitResult, is_ready};

/// How long a runner may take for each message of the handshake.
const DEADLINE: Duration = Duration::from_secs(5);
/// How long the end of a session waits for a reader of the output.
const OUTPUT_DEADLINE: Duration = Duration::from_secs(1);
/// Output of this many bytes is written even while requests keep coming.
const WRITE_THRESHOLD: u64 = 1024;
/// Longest time of polling for the next request. It is shorter than a vCPU polls for its
/// answer: on a shared CPU, longer polling only delays the vCPU.
const POLL_LIMIT: Duration = Duration::from_micros(50);

// Event tokens.
const STREAM: u64 = 0;
const DOORBELL: u64 = 1;
const SIGNALS: u64 = 2;
const INPUT: u64 = 3;
/// Token of the first output; the others follow.
const OUTPUT: u64 = 4;

/// The host side of the serial line and the debug console.
pub struct SerialConsole {
    /// The serial line's output and, if it has one of its own, the debug console's;
    /// indexed as the streams are.
    pub outputs: Vec<Output>,
    /// The serial line's input.
    pub input: Input,
}

/// How a session ended.
pub enum SessionEnd {
    /// The runner has disconnected.
    Disconnected,
    /// A signal ends this process.
    Signal,
    /// An error ends the session.
    Failed(Error),
}

impl From<Error> for SessionEnd {
    fn from(error: Error) -> Self {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
        match error {
            Error::Io { source, .. }
                if matches!(source.kind(), BrokenPipe | ConnectionReset | UnexpectedEof) =>
            {
                SessionEnd::Disconnected
            }
            error => SessionEnd::Failed(error),
        }
    }
}

/// The session of a connected runner.
pub struct TrapSession<'a> {
    stream: UnixStream,
    region: StateRegion,
    /// The state in the region, or the one that the next commit writes there.
    state: PlatformState,
    /// The eventfd of the serial port's interrupt line.
    interrupt: OwnedFd,
    console: &'a mut SerialConsole,
    poller: Poller,
    polling: AdaptivePolling,
}

impl<'a> TrapSession<'a> {
    /// Does the handshake over `stream` and loads the state of the previous process.
    ///
    /// # Errors
    /// Why there is no session.
    pub fn connect(
        stream: UnixStream,
        signals: BorrowedFd,
        console: &'a mut SerialConsole,
    ) -> Result<Self, SessionEnd> {
        let what = "waiting for the runner's greeting";
        match wait::for_input(&stream, signals, Some(DEADLINE)).map_err(Error::io(what))? {
            WaitResult::Ready => {}
            WaitResult::Signal => return Err(SessionEnd::Signal),
            WaitResult::TimedOut => {
                return Err(Error::Hello(format!("none in {DEADLINE:?}")).into());
            }
        }
        let what = "setting a deadline";
        stream
            .set_read_timeout(Some(DEADLINE))
            .map_err(Error::io(what))?;
        stream
            .set_write_timeout(Some(DEADLINE))
            .map_err(Error::io(what))?;

        let (region, doorbell) = receive_hello(&stream)?;
        let loaded = region.load()?;
        let mut state = loaded.unwrap_or_else(PlatformState::power_on);
        align_streams(&mut state, console)?;
        if loaded.is_some() {
            region.commit(&state);
        } else {
            region.initialise(&state);
        }
        region.header().finish_sleep();
        let interrupt = request_interrupt(&stream)?;

        let poller = Poller::new().map_err(Error::io("epoll"))?;
        let add =
            |fd: BorrowedFd, token, what| poller.add_readable(fd, token).map_err(Error::io(what));
        add(stream.as_fd(), STREAM, "waiting for the runner")?;
        add(doorbell.as_fd(), DOORBELL, "waiting for the doorbell")?;
        add(signals, SIGNALS, "waiting for signals")?;
        match console.input.fd().map(|fd| poller.add_readable(fd, INPUT)) {
            // A regular file is always ready (epoll_ctl(2)).
            Some(Err(e)) if e.kind() != io::ErrorKind::PermissionDenied => {
                return Err(Error::io("waiting for input")(e).into());
            }
            _ => console.input.set_ready(),
        }
        Ok(TrapSession {
            stream,
            region,
            state,
            interrupt,
            console,
            poller,
            polling: AdaptivePolling::new(POLL_LIMIT),
        })
    }

    /// Serves the runner until the session ends.
    pub fn serve(&mut self) -> SessionEnd {
        match self.run() {
            Ok(never) => match never {},
            Err(end) => end,
        }
    }

    fn run(&mut self) -> Result<Infallible, SessionEnd> {
        // The previous process may have died between an answer and waking its vCPU, or
        // between a commit and raising the interrupt line.
        for slot in self.region.slots() {
            wake(slot);
        }
        if self.state.bus.uart.is_pending() {
            self.raise_interrupt();
        }
        loop {
            self.send_pending_event()?;
            if self.handle_request() {
                if self.polling.found_work() {
                    self.check_events()?;
                }
                continue;
            }
            self.read_input();
            match self.polling.found_nothing() {
                PollAction::Poll => std::hint::spin_loop(),
                PollAction::CheckEvents => self.check_events()?,
                PollAction::Sleep => self.sleep()?,
            }
        }
    }

    /// Carries out the request with the lowest ticket; returns false when there is none.
    fn handle_request(&mut self) -> bool {
        let Some((vcpu, request)) = first_open(self.region.slots()) else {
            return false;
        };
        let interrupt = self.apply(vcpu, &request);
        let slot = &self.region.slots()[vcpu];
        if let Some(word) = slot.complete(request.seq, self.state.answer) {
            wake_word(word);
        }
        if interrupt {
            self.raise_interrupt();
        }
        for at in 0..self.console.outputs.len() {
            if self.state.streams[at].pending() >= WRITE_THRESHOLD {
                self.write_output(at);
            }
        }
        true
    }

    /// Commits the request's effects and its answer; returns whether to raise the interrupt
    /// line.
    fn apply(&mut self, vcpu: usize, request: &TrapRequest) -> bool {
        if self.state.is_applied(vcpu, request.seq) {
            // The previous process did it; only the answer is missing.
            return false;
        }
        let outcome = self.state.bus.access(&request.access);
        let debug = DEBUG.min(self.console.outputs.len() - 1);
        for (at, byte) in [(SERIAL, outcome.serial), (debug, outcome.debug)] {
            if let Some(byte) = byte
                && !self.region.push(at, &mut self.state.streams[at], byte)
            {
                self.console.outputs[at].drop_byte();
            }
        }
        if let Some(event) = outcome.event {
            self.state.set_event(event);
        }
        self.state.set_applied(vcpu, request.seq, outcome.value);
        self.region.commit(&self.state);
        outcome.interrupt
    }

    fn send_pending_event(&mut self) -> Result<(), Error> {
        if let Some(event) = self.state.pending_event() {
            tracing::debug!(?event, "the guest made a request");
            self.send(&event)?;
            self.state.set_event_sent();
            self.region.commit(&self.state);
        }
        Ok(())
    }

    fn send(&self, message: &FromPlatform) -> Result<(), Error> {
        channel::send(&self.stream, message, &[]).map_err(Error::io("sending to the runner"))
    }

    fn raise_interrupt(&self) {
        // EAGAIN: the counter is full, so the interrupt is pending anyway.
        let _ = rustix::io::write(&self.interrupt, &1u64.to_ne_bytes());
    }

    fn read_input(&mut self) {
        let room = self.state.bus.uart.room();
        if room == 0 || !self.console.input.is_ready() {
            return;
        }
        let mut buffer = [0; uart::FIFO];
        let len = self.console.input.read(&mut buffer[..room]);
        if len > 0 {
            let interrupt = self.state.bus.uart.receive(&buffer[..len]);
            self.region.commit(&self.state);
            if interrupt {
                self.raise_interrupt();
            }
        }
    }

    /// Writes the output of stream `at` as far as that works without waiting.
    fn write_output(&mut self, at: usize) {
        let output = &mut self.console.outputs[at];
        if matches!(output.blocked(), Some(Blocked::Until(time)) if Instant::now() >= time) {
            output.unblock();
        }
        let mut buffer = [0; CHUNK];
        while self.state.streams[at].pending() > 0 {
            let output = &mut self.console.outputs[at];
            if output.blocked().is_some() {
                break;
            }
            let stream = &mut self.state.streams[at];
            let len = self.region.peek(at, stream, &mut buffer);
            let written = output.write(stream, &buffer[..len]);
            stream.tail = stream.tail.wrapping_add(written as u64);
            if stream.pending() == 0 {
                output.set_drained();
            }
            self.region.commit(&self.state);
            if output.blocked() == Some(Blocked::Full)
                && let Some(fd) = output.fd()
                && let Err(error) = self.poller.add(fd, OUTPUT + at as u64)
            {
                tracing::debug!(%error, "waiting for output failed");
            }
        }
    }

    fn write_outputs(&mut self) {
        for at in 0..self.console.outputs.len() {
            self.write_output(at);
        }
    }

    fn check_events(&mut self) -> Result<(), SessionEnd> {
        self.write_outputs();
        self.wait(Some(Duration::ZERO))
    }

    fn sleep(&mut self) -> Result<(), SessionEnd> {
        self.write_outputs();
        self.region.header().prepare_sleep();
        if first_open(self.region.slots()).is_some() {
            self.region.header().finish_sleep();
            return Ok(());
        }
        let start = Instant::now();
        let retry = self
            .console
            .outputs
            .iter()
            .filter_map(|o| match o.blocked() {
                Some(Blocked::Until(time)) => Some(time.saturating_duration_since(start)),
                _ => None,
            });
        let end = self.wait(retry.min());
        self.region.header().finish_sleep();
        self.polling.slept(start.elapsed());
        end
    }

    /// Waits for events other than requests, and handles them.
    fn wait(&mut self, timeout: Option<Duration>) -> Result<(), SessionEnd> {
        let mut tokens = Vec::new();
        self.poller
            .wait(&mut tokens, timeout)
            .map_err(Error::io("epoll_wait"))?;
        for token in tokens {
            match token {
                STREAM => self.receive_messages()?,
                SIGNALS => return Err(SessionEnd::Signal),
                INPUT => self.console.input.set_ready(),
                // It only wakes this process; requests are in the slots.
                DOORBELL => {}
                output => {
                    let output = &mut self.console.outputs[(output - OUTPUT) as usize];
                    if let Some(fd) = output.fd() {
                        // An output that is not registered any more is no error.
                        let _ = self.poller.remove(fd);
                    }
                    output.unblock();
                }
            }
        }
        Ok(())
    }

    fn receive_messages(&mut self) -> Result<(), Error> {
        while is_ready(&self.stream, PollFlags::IN) {
            let what = "receiving from the runner";
            match channel::receive(&self.stream).map_err(Error::io(what))? {
                (ToPlatform::Reset, _) => self.reset()?,
                (message, _) => return Err(Error::Message(format!("{message:?}"))),
            }
        }
        Ok(())
    }

    /// Resets the machine. Open requests are carried out first; events that they cause do not
    /// count any more.
    fn reset(&mut self) -> Result<(), Error> {
        // The vCPUs are paused, so each has at most one open request.
        for _ in 0..self.region.slots().len() {
            if !self.handle_request() {
                break;
            }
        }
        self.state.reset();
        self.region.commit(&self.state);
        self.send(&FromPlatform::ResetDone)
    }

    /// Ends the session: waits a moment for readers to take the rest of the output.
    pub fn finish(mut self) {
        let end = Instant::now() + OUTPUT_DEADLINE;
        for at in 0..self.console.outputs.len() {
            loop {
                self.write_output(at);
                let left = end.saturating_duration_since(Instant::now());
                let output = &mut self.console.outputs[at];
                let waited = output.blocked() == Some(Blocked::Full)
                    && output.fd().is_some_and(|fd| wait::for_output(fd, left));
                if !waited {
                    break;
                }
                if let Some(fd) = output.fd() {
                    let _ = self.poller.remove(fd);
                }
                output.unblock();
            }
            let left = self.state.streams[at].pending();
            if left > 0 {
                tracing::warn!("{left} bytes of output are lost: their reader does not read");
            }
        }
    }
}

/// Receives the runner's Hello; returns the region and the doorbell.
fn receive_hello(stream: &UnixStream) -> Result<(StateRegion, OwnedFd), Error> {
    let (message, fds) = channel::receive(stream).map_err(Error::io("receiving the greeting"))?;
    let ToPlatform::Hello { version, vcpus } = message else {
        return Err(Error::Hello(format!("got {message:?} instead of Hello")));
    };
    if version != VERSION {
        return Err(Error::Hello(format!(
            "the runner speaks version {version}, this program {VERSION}: use programs of one release"
        )));
    }
    let [region, doorbell] = <[OwnedFd; 2]>::try_from(fds)
        .map_err(|fds| Error::Hello(format!("{} descriptors instead of 2", fds.len())))?;
    Ok((StateRegion::map(&region, vcpus)?, doorbell))
}

/// Adapts the streams to the outputs.
fn align_streams(state: &mut PlatformState, console: &mut SerialConsole) -> Result<(), Error> {
    for (output, stream) in console.outputs.iter_mut().zip(&mut state.streams) {
        output
            .align(stream)
            .map_err(Error::io("the size of an output file"))?;
    }
    for stream in state.streams.iter_mut().skip(console.outputs.len()) {
        if stream.pending() > 0 {
            tracing::warn!(
                "debug output of the previous process is lost: there is no --debug-console now"
            );
            stream.tail = stream.head;
        }
    }
    Ok(())
}

/// Requests the eventfd of the serial port's interrupt line.
fn request_interrupt(stream: &UnixStream) -> Result<OwnedFd, Error> {
    let gsis = vec![uart::LINE];
    channel::send(stream, &FromPlatform::Lines { gsis }, &[])
        .map_err(Error::io("requesting interrupt lines"))?;
    let (message, fds) =
        channel::receive(stream).map_err(Error::io("receiving interrupt lines"))?;
    match (message, <[OwnedFd; 1]>::try_from(fds)) {
        (ToPlatform::Lines, Ok([line])) => Ok(line),
        (message, fds) => Err(Error::Message(format!(
            "got {message:?} with {} descriptors instead of one interrupt line",
            fds.map_or_else(|fds| fds.len(), |_| 1)
        ))),
    }
}

/// Wakes the vCPU that sleeps on `slot`, if one does.
fn wake(slot: &TrapSlot) {
    if let Some(word) = slot.bump() {
        wake_word(word);
    }
}

fn wake_word(word: &std::sync::atomic::AtomicU32) {
    // The futex is shared with another process. That no vCPU sleeps is no error.
    let _ = futex::wake(word, futex::Flags::empty(), 1);
}
