//! Everything that must outlive this process, as plain data.
//!
//! The runner's region keeps it (see [`crate::region`]), so that a process that
//! was killed at any moment is replaced and nobody notices.

use outrigger_protocol::trap::FromPlatform;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::devices::PlatformEvent;
use crate::isa_bus::IsaBus;

/// Where a ring's bytes stand. Positions count from the start of the stream and
/// never wrap; a ring holds those from `tail` to `head`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct OutputStream {
    /// Where the next byte from the guest goes.
    pub head: u64,
    /// The first byte that is not written out.
    pub tail: u64,
    /// Where in the file position 0 lies, modulo 2^64, so that every byte has one
    /// place in the file, however often it is written there.
    pub base: u64,
    /// Which file that is (`st_dev` and `st_ino`, stat(3type)); 0 if none.
    pub file: [u64; 2],
}

impl OutputStream {
    /// How many bytes wait to be written out.
    pub fn pending(&self) -> u64 {
        self.head.wrapping_sub(self.tail)
    }
}

/// The number of streams: serial line and debug console.
pub const STREAMS: usize = 2;
/// The serial line's stream.
pub const SERIAL: usize = 0;
/// The debug console's stream, if it is not written to the serial line's sink.
pub const DEBUG: usize = 1;

/// No vCPU.
const NOBODY: u32 = u32::MAX;

const NO_EVENT: u8 = 0;
const POWER_OFF: u8 = 1;
const RESET: u8 = 2;
const EXIT: u8 = 3;

/// All that is committed at one stroke.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PlatformState {
    /// The devices' registers.
    pub bus: IsaBus,
    /// The answer to the request that was carried out last.
    pub answer: u64,
    /// That request: slot and number.
    vcpu: u32,
    seq: u32,
    /// Output on its way.
    pub streams: [OutputStream; STREAMS],
    event: u8,
    exit_code: u8,
    event_sent: u8,
    reserved: [u8; 5],
}

impl PlatformState {
    /// As the power comes on.
    pub fn power_on() -> Self {
        PlatformState {
            bus: IsaBus::power_on(),
            answer: 0,
            vcpu: NOBODY,
            seq: 0,
            streams: [OutputStream::default(); STREAMS],
            event: NO_EVENT,
            exit_code: 0,
            event_sent: 0,
            reserved: [0; 5],
        }
    }

    /// The machine's reset. Output on its way stays on its way.
    pub fn reset(&mut self) {
        self.bus.reset();
        self.event = NO_EVENT;
        self.event_sent = 0;
    }

    /// Whether request `seq` of `vcpu` is the one that was carried out last.
    pub fn is_applied(&self, vcpu: usize, seq: u32) -> bool {
        (self.vcpu as usize, self.seq) == (vcpu, seq)
    }

    /// Notes that request `seq` of `vcpu` is carried out.
    pub fn set_applied(&mut self, vcpu: usize, seq: u32, answer: u64) {
        self.vcpu = vcpu as u32;
        self.seq = seq;
        self.answer = answer;
    }

    /// Notes what the guest asks for. Until the runner has reset the machine, only
    /// the first wish counts: a guest repeats a reset until it happens, and must
    /// not be reset again for each time.
    pub fn set_event(&mut self, event: PlatformEvent) {
        if self.event == NO_EVENT {
            (self.event, self.exit_code) = match event {
                PlatformEvent::PowerOff => (POWER_OFF, 0),
                PlatformEvent::Reset => (RESET, 0),
                PlatformEvent::Exit(code) => (EXIT, code),
            };
        }
    }

    /// What the runner must be told.
    pub fn owed_event(&self) -> Option<FromPlatform> {
        if self.event_sent != 0 {
            return None;
        }
        match self.event {
            POWER_OFF => Some(FromPlatform::PowerOff),
            RESET => Some(FromPlatform::ResetRequest),
            EXIT => Some(FromPlatform::Exit {
                code: self.exit_code,
            }),
            _ => None,
        }
    }

    /// Notes that it was told.
    pub fn set_event_sent(&mut self) {
        self.event_sent = 1;
    }

    /// What is wrong with a state that was found in memory, if anything.
    /// `rings` are the sizes of the rings.
    pub fn check(&self, rings: [usize; STREAMS]) -> Result<(), &'static str> {
        for (stream, size) in self.streams.iter().zip(rings) {
            if stream.pending() > size as u64 {
                return Err("an output ring is fuller than full");
            }
        }
        self.bus.uart.check()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_event_counts_until_a_reset() {
        let mut state = PlatformState::power_on();
        assert_eq!(state.owed_event(), None);
        state.set_event(PlatformEvent::Reset);
        state.set_event(PlatformEvent::PowerOff);
        assert_eq!(state.owed_event(), Some(FromPlatform::ResetRequest));
        state.set_event_sent();
        state.set_event(PlatformEvent::Reset);
        assert_eq!(state.owed_event(), None);
        state.reset();
        state.set_event(PlatformEvent::Exit(7));
        assert_eq!(state.owed_event(), Some(FromPlatform::Exit { code: 7 }));
    }

    #[test]
    fn rings_fuller_than_full_are_refused() {
        let mut state = PlatformState::power_on();
        state.streams[DEBUG].head = 17;
        state.check([16, 17]).unwrap();
        assert!(state.check([16, 16]).is_err());
        state.streams[SERIAL].tail = 1;
        assert!(state.check([16, 17]).is_err());
    }
}
