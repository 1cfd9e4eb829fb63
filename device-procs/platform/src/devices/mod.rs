//! The devices, each with its registers as plain data: whatever a register
//! access changes can be committed at one stroke (see [`crate::state`]).

pub mod i8042;
pub mod power;
pub mod rtc;
pub mod uart;

/// What a guest asks of the whole machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlatformEvent {
    /// Switch it off.
    PowerOff,
    /// Reset it.
    Reset,
    /// End it with this code; 0 is a pass.
    Exit(u8),
}
