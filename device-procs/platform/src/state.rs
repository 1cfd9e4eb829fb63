//! Everything that must outlive this process, as plain data.
//!
//! It lies in the runner's region (see [`crate::region`]), so that a process that was killed
//! at any moment can be replaced without the guest noticing.

use outrigger_protocol::trap::FromPlatform;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::devices::PlatformEvent;
use crate::isa_bus::IsaBus;

/// Positions in an output stream. They count from the start of the stream and never wrap in
/// practice; the ring contains the bytes from `tail` to `head`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct OutputStream {
    /// Position of the next byte from the guest.
    pub head: u64,
    /// Position of the first byte that is not written out.
    pub tail: u64,
    /// File offset of position 0, modulo 2^64. So each byte has one offset in the file,
    /// however often it is written.
    pub base: u64,
    /// That file (`st_dev` and `st_ino`, stat(3type)); zeros if there is none.
    pub file: [u64; 2],
}

impl OutputStream {
    /// Number of bytes that are not written out.
    pub fn pending(&self) -> u64 {
        self.head.wrapping_sub(self.tail)
    }
}

/// The number of streams: serial line and debug console.
pub const STREAMS: usize = 2;
/// The serial line's stream.
pub const SERIAL: usize = 0;
/// The debug console's stream, if its output does not go where the serial line's goes.
pub const DEBUG: usize = 1;

/// No vCPU.
const NO_VCPU: u32 = u32::MAX;

const NO_EVENT: u8 = 0;
const POWER_OFF: u8 = 1;
const RESET: u8 = 2;
const EXIT: u8 = 3;

/// The state that is committed atomically.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PlatformState {
    /// The devices' registers.
    pub bus: IsaBus,
    /// Answer to the request that was carried out last.
    pub answer: u64,
    /// That request: vCPU and sequence number.
    vcpu: u32,
    seq: u32,
    /// Output that is not written yet.
    pub streams: [OutputStream; STREAMS],
    event: u8,
    exit_code: u8,
    event_sent: u8,
    reserved: [u8; 5],
}

impl PlatformState {
    /// State at power-on.
    pub fn power_on() -> Self {
        PlatformState {
            bus: IsaBus::power_on(),
            answer: 0,
            vcpu: NO_VCPU,
            seq: 0,
            streams: [OutputStream::default(); STREAMS],
            event: NO_EVENT,
            exit_code: 0,
            event_sent: 0,
            reserved: [0; 5],
        }
    }

    /// Resets the devices. Output that is not written yet is kept.
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

    /// Records the guest's request. Only the first request before the runner resets the
    /// machine counts: a guest repeats a reset until it happens, and must be reset once.
    pub fn set_event(&mut self, event: PlatformEvent) {
        if self.event == NO_EVENT {
            (self.event, self.exit_code) = match event {
                PlatformEvent::PowerOff => (POWER_OFF, 0),
                PlatformEvent::Reset => (RESET, 0),
                PlatformEvent::Exit(code) => (EXIT, code),
            };
        }
    }

    /// The message that the runner has not got yet.
    pub fn pending_event(&self) -> Option<FromPlatform> {
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

    /// Records that the message is sent.
    pub fn set_event_sent(&mut self) {
        self.event_sent = 1;
    }

    /// Checks a state that was found in memory; `rings` are the sizes of the rings.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self, rings: [usize; STREAMS]) -> Result<(), &'static str> {
        for (stream, size) in self.streams.iter().zip(rings) {
            if stream.pending() > size as u64 {
                return Err("an output ring contains more bytes than its size");
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
        assert_eq!(state.pending_event(), None);
        state.set_event(PlatformEvent::Reset);
        state.set_event(PlatformEvent::PowerOff);
        assert_eq!(state.pending_event(), Some(FromPlatform::ResetRequest));
        state.set_event_sent();
        state.set_event(PlatformEvent::Reset);
        assert_eq!(state.pending_event(), None);
        state.reset();
        state.set_event(PlatformEvent::Exit(7));
        assert_eq!(state.pending_event(), Some(FromPlatform::Exit { code: 7 }));
    }

    #[test]
    fn a_stream_that_exceeds_its_ring_is_refused() {
        let mut state = PlatformState::power_on();
        state.streams[DEBUG].head = 17;
        state.check([16, 17]).unwrap();
        assert!(state.check([16, 16]).is_err());
        state.streams[SERIAL].tail = 1;
        assert!(state.check([16, 17]).is_err());
    }
}
