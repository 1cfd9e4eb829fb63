//! The devices. Their registers are plain data, so that everything a register access
//! changes can be committed atomically (see [`crate::state`]).

pub mod i8042;
pub mod power;
pub mod rtc;
pub mod uart;

/// A guest's request that concerns the whole machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlatformEvent {
    /// Power off.
    PowerOff,
    /// Reset.
    Reset,
    /// End with this exit code; 0 is success.
    Exit(u8),
}
