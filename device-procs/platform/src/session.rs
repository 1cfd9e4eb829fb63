//! One runner, from its greeting until it leaves: requests are carried out in
//! ticket order, output and input move in between.

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
use crate::wait::{self, Woken, is_ready};

/// How long a runner may take for its part of the greeting and for a message.
const DEADLINE: Duration = Duration::from_secs(5);
/// How long the end of a session may wait for whoever reads the output.
const DRAIN: Duration = Duration::from_secs(1);
/// Output of this size is written even though requests keep coming.
const PLENTY: u64 = 1024;
/// For how long it looks for the next request. Less than a vCPU waits before it sleeps:
/// a request found later is one that we kept from being made.
const LOOK: Duration = Duration::from_micros(50);

const STREAM: u64 = 0;
const DOORBELL: u64 = 1;
const SIGNALS: u64 = 2;
const INPUT: u64 = 3;
/// And from here on the outputs.
const OUTPUT: u64 = 4;

/// What the streams are connected to.
pub struct SerialConsole {
    /// The serial line's output, and the debug console's if that has one of its
    /// own; at the places of their streams.
    pub outputs: Vec<Output>,
    /// The serial line's input.
    pub input: Input,
}

/// How a session ended.
pub enum SessionEnd {
    /// The runner has left.
    Left,
    /// A signal wants this process to end.
    Signal,
    /// The runner cannot be served.
    Failed(Error),
}

impl From<Error> for SessionEnd {
    fn from(error: Error) -> Self {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
        match error {
            Error::Io { source, .. }
                if matches!(source.kind(), BrokenPipe | ConnectionReset | UnexpectedEof) =>
            {
                SessionEnd::Left
            }
            error => SessionEnd::Failed(error),
        }
    }
}

/// A connected runner.
pub struct TrapSession<'a> {
    stream: UnixStream,
    region: StateRegion,
    /// What the region's area says, or will say with the next commit.
    state: PlatformState,
    line: OwnedFd,
    console: &'a mut SerialConsole,
    poller: Poller,
    polling: AdaptivePolling,
}

impl<'a> TrapSession<'a> {
    /// Exchanges greetings over `stream`, then takes up where a predecessor
    /// stopped.
    ///
    /// # Errors
    /// [`End`] when it does not come to a session.
    pub fn greet(
        stream: UnixStream,
        signals: BorrowedFd,
        console: &'a mut SerialConsole,
    ) -> Result<Self, SessionEnd> {
        let what = "waiting for the greeting";
        match wait::for_input(&stream, signals, Some(DEADLINE)).map_err(Error::io(what))? {
            Woken::Ready => {}
            Woken::Signal => return Err(SessionEnd::Signal),
            Woken::Late => return Err(Error::Greeting(format!("none in {DEADLINE:?}")).into()),
        }
        let what = "setting a deadline";
        stream
            .set_read_timeout(Some(DEADLINE))
            .map_err(Error::io(what))?;
        stream
            .set_write_timeout(Some(DEADLINE))
            .map_err(Error::io(what))?;

        let (region, doorbell) = hello(&stream)?;
        let found = region.load()?;
        let mut state = found.unwrap_or_else(PlatformState::power_on);
        settle(&mut state, console)?;
        if found.is_some() {
            region.commit(&state);
        } else {
            region.initialise(&state);
        }
        region.header().finish_sleep();
        let line = ask_for_line(&stream)?;

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
            line,
            console,
            poller,
            polling: AdaptivePolling::new(LOOK),
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
        // A predecessor may have died between an answer and waking whoever waits
        // for it, or between a commit and raising the line.
        for slot in self.region.slots() {
            wake(slot);
        }
        if self.state.bus.uart.is_pending() {
            self.raise();
        }
        loop {
            self.send_owed_event()?;
            if self.step() {
                if self.polling.found_work() {
                    self.look_around()?;
                }
                continue;
            }
            self.take_input();
            match self.polling.found_nothing() {
                PollAction::Poll => std::hint::spin_loop(),
                PollAction::CheckEvents => self.look_around()?,
                PollAction::Sleep => self.sleep()?,
            }
        }
    }

    /// Carries out the request that comes first; false when there is none.
    fn step(&mut self) -> bool {
        let Some((vcpu, request)) = first_open(self.region.slots()) else {
            return false;
        };
        let interrupt = self.carry_out(vcpu, &request);
        let slot = &self.region.slots()[vcpu];
        if let Some(word) = slot.complete(request.seq, self.state.answer) {
            wake_word(word);
        }
        if interrupt {
            self.raise();
        }
        for at in 0..self.console.outputs.len() {
            if self.state.streams[at].pending() >= PLENTY {
                self.drain(at);
            }
        }
        true
    }

    /// Makes the request's effects and its answer part of the committed state;
    /// returns whether the interrupt line goes up.
    fn carry_out(&mut self, vcpu: usize, request: &TrapRequest) -> bool {
        if self.state.is_applied(vcpu, request.seq) {
            // A predecessor did; only the answer is missing.
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

    fn send_owed_event(&mut self) -> Result<(), Error> {
        if let Some(event) = self.state.owed_event() {
            tracing::debug!("the guest asks: {event:?}");
            self.send(&event)?;
            self.state.set_event_sent();
            self.region.commit(&self.state);
        }
        Ok(())
    }

    fn send(&self, message: &FromPlatform) -> Result<(), Error> {
        channel::send(&self.stream, message, &[]).map_err(Error::io("sending to the runner"))
    }

    fn raise(&self) {
        // EAGAIN: it has been raised more often than anybody can count.
        let _ = rustix::io::write(&self.line, &1u64.to_ne_bytes());
    }

    fn take_input(&mut self) {
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
                self.raise();
            }
        }
    }

    /// Writes out what stream `at` holds, as far as it goes without waiting.
    fn drain(&mut self, at: usize) {
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
                output.is_drained();
            }
            self.region.commit(&self.state);
            if output.blocked() == Some(Blocked::Full)
                && let Some(fd) = output.fd()
                && let Err(error) = self.poller.add(fd, OUTPUT + at as u64)
            {
                tracing::debug!("waiting for output: {error}");
            }
        }
    }

    fn drain_all(&mut self) {
        for at in 0..self.console.outputs.len() {
            self.drain(at);
        }
    }

    fn look_around(&mut self) -> Result<(), SessionEnd> {
        self.drain_all();
        self.wait(Some(Duration::ZERO))
    }

    fn sleep(&mut self) -> Result<(), SessionEnd> {
        self.drain_all();
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

    /// Waits for anything but requests, and sees to it.
    fn wait(&mut self, timeout: Option<Duration>) -> Result<(), SessionEnd> {
        let mut tokens = Vec::new();
        self.poller
            .wait(&mut tokens, timeout)
            .map_err(Error::io("epoll_wait"))?;
        for token in tokens {
            match token {
                STREAM => self.take_messages()?,
                SIGNALS => return Err(SessionEnd::Signal),
                INPUT => self.console.input.set_ready(),
                // It only wakes; the requests are found in the slots.
                DOORBELL => {}
                output => {
                    let output = &mut self.console.outputs[(output - OUTPUT) as usize];
                    if let Some(fd) = output.fd() {
                        // Not there any more is as good.
                        let _ = self.poller.remove(fd);
                    }
                    output.unblock();
                }
            }
        }
        Ok(())
    }

    fn take_messages(&mut self) -> Result<(), Error> {
        while is_ready(&self.stream, PollFlags::IN) {
            let what = "receiving from the runner";
            match channel::receive(&self.stream).map_err(Error::io(what))? {
                (ToPlatform::Reset, _) => self.reset()?,
                (message, _) => return Err(Error::Message(format!("{message:?}"))),
            }
        }
        Ok(())
    }

    /// The machine's reset. What its vCPUs asked before is carried out first, but
    /// no event that comes of it counts any more.
    fn reset(&mut self) -> Result<(), Error> {
        // The vCPUs stand still: each has one request at most.
        for _ in 0..self.region.slots().len() {
            if !self.step() {
                break;
            }
        }
        self.state.reset();
        self.region.commit(&self.state);
        self.send(&FromPlatform::ResetDone)
    }

    /// The end: gives whoever reads the output a little time to take the rest.
    pub fn finish(mut self) {
        let end = Instant::now() + DRAIN;
        for at in 0..self.console.outputs.len() {
            loop {
                self.drain(at);
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
                tracing::warn!("{left} bytes of output are not written: nobody takes them");
            }
        }
    }
}

/// Takes the runner's greeting.
fn hello(stream: &UnixStream) -> Result<(StateRegion, OwnedFd), Error> {
    let (message, fds) = channel::receive(stream).map_err(Error::io("receiving the greeting"))?;
    let ToPlatform::Hello { version, vcpus } = message else {
        return Err(Error::Greeting(format!("{message:?} comes first")));
    };
    if version != VERSION {
        return Err(Error::Greeting(format!(
            "version {version}, this program speaks {VERSION}"
        )));
    }
    let [region, doorbell] = <[OwnedFd; 2]>::try_from(fds)
        .map_err(|fds| Error::Greeting(format!("{} descriptors instead of 2", fds.len())))?;
    Ok((StateRegion::map(&region, vcpus)?, doorbell))
}

/// Makes the streams fit the outputs.
fn settle(state: &mut PlatformState, console: &mut SerialConsole) -> Result<(), Error> {
    for (output, stream) in console.outputs.iter_mut().zip(&mut state.streams) {
        output
            .settle(stream)
            .map_err(Error::io("the size of an output file"))?;
    }
    for stream in state.streams.iter_mut().skip(console.outputs.len()) {
        if stream.pending() > 0 {
            tracing::warn!("the predecessor's debug output has nowhere to go");
            stream.tail = stream.head;
        }
    }
    Ok(())
}

/// Asks for the one interrupt line that is driven.
fn ask_for_line(stream: &UnixStream) -> Result<OwnedFd, Error> {
    let gsis = vec![uart::LINE];
    channel::send(stream, &FromPlatform::Lines { gsis }, &[])
        .map_err(Error::io("asking for interrupt lines"))?;
    let (message, fds) =
        channel::receive(stream).map_err(Error::io("receiving interrupt lines"))?;
    match (message, <[OwnedFd; 1]>::try_from(fds)) {
        (ToPlatform::Lines, Ok([line])) => Ok(line),
        (message, fds) => Err(Error::Message(format!(
            "{message:?} with {} descriptors answers a wish for one line",
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
    // The word is shared with another process. No sleeper is no error.
    let _ = futex::wake(word, futex::Flags::empty(), 1);
}
