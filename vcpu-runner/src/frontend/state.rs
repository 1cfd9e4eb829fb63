//! The states of a device's slot, and what leads from one to the next:
//!
//! ```text
//! Absent ─Connect→ Connecting ─Connected→ Running ⇄ Paused
//!                    ↑     │                 │  ↘      │
//!                    │     └──────Lose──→ Lost   Drain │
//!                    └──────Connect────────┘      ↓    ↓
//!                                              Draining ─Drained→ Running
//! ```
//!
//! From every state in which there is a process, Lose leads to Lost.

use std::sync::atomic::{AtomicU8, Ordering};

use outrigger_protocol::control::DeviceState;

/// What happens to a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A process is there; hands are shaken.
    Connect,
    /// The process serves.
    Connected,
    /// The rings are stopped, with the machine.
    Pause,
    /// They go on.
    Resume,
    /// The rings are stopped for another process.
    Drain,
    /// They go on: on another process, or on the old one again.
    Drained,
    /// The process is gone, or given up.
    Lose,
}

/// The state after `step`; `None` where that cannot happen.
pub fn after(state: DeviceState, step: Step) -> Option<DeviceState> {
    use DeviceState::{Absent, Connecting, Draining, Lost, Paused, Running};
    match (state, step) {
        (Absent | Lost, Step::Connect) => Some(Connecting),
        (Connecting, Step::Connected) => Some(Running),
        (Running, Step::Pause) => Some(Paused),
        (Paused, Step::Resume) => Some(Running),
        (Running | Paused, Step::Drain) => Some(Draining),
        (Draining, Step::Drained) => Some(Running),
        (Connecting | Running | Paused | Draining, Step::Lose) => Some(Lost),
        _ => None,
    }
}

/// Turns states into a byte and back.
const STATES: [DeviceState; 6] = [
    DeviceState::Absent,
    DeviceState::Connecting,
    DeviceState::Running,
    DeviceState::Paused,
    DeviceState::Draining,
    DeviceState::Lost,
];

/// A slot's state: one thread changes it, any may look.
#[derive(Default)]
pub struct StateCell(AtomicU8);

impl StateCell {
    /// The state.
    pub fn get(&self) -> DeviceState {
        STATES[usize::from(self.0.load(Ordering::Acquire))]
    }

    /// Takes `step`. One that the state does not allow is a mistake of ours, which
    /// is logged and changes nothing.
    pub fn take(&self, step: Step) {
        let state = self.get();
        let Some(next) = after(state, step) else {
            tracing::error!("a slot that is {state:?} cannot {step:?}");
            return;
        };
        let code = STATES.iter().position(|&s| s == next).unwrap_or(0);
        self.0.store(code as u8, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use DeviceState::{Absent, Connecting, Draining, Lost, Paused, Running};

    const STEPS: [Step; 7] = [
        Step::Connect,
        Step::Connected,
        Step::Pause,
        Step::Resume,
        Step::Drain,
        Step::Drained,
        Step::Lose,
    ];

    #[test]
    fn each_transition_is_the_one_of_the_plan_and_there_are_no_others() {
        let plan = [
            (Absent, Step::Connect, Connecting),
            (Lost, Step::Connect, Connecting),
            (Connecting, Step::Connected, Running),
            (Connecting, Step::Lose, Lost),
            (Running, Step::Pause, Paused),
            (Running, Step::Drain, Draining),
            (Running, Step::Lose, Lost),
            (Paused, Step::Resume, Running),
            (Paused, Step::Drain, Draining),
            (Paused, Step::Lose, Lost),
            (Draining, Step::Drained, Running),
            (Draining, Step::Lose, Lost),
        ];
        for state in STATES {
            for step in STEPS {
                let planned = plan.iter().find(|p| (p.0, p.1) == (state, step));
                assert_eq!(
                    after(state, step),
                    planned.map(|p| p.2),
                    "{state:?} {step:?}"
                );
            }
        }
    }

    #[test]
    fn what_cannot_happen_changes_nothing() {
        let cell = StateCell::default();
        cell.take(Step::Resume);
        assert_eq!(cell.get(), Absent);
        cell.take(Step::Connect);
        cell.take(Step::Connected);
        assert_eq!(cell.get(), Running);
    }
}
