//! What the machine is doing, for whoever asks, whatever the machine's thread waits for.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use outrigger_protocol::control::{DeviceState, MachineState, MachineStatus};

use crate::frontend::Slot;

/// The machine as it is seen from outside.
pub struct Overview {
    vcpus: usize,
    memory: u64,
    slots: Vec<Arc<Slot>>,
    now: Mutex<Now>,
}

/// What changes.
pub struct Now {
    /// The machine's state.
    pub state: MachineState,
    /// Resets so far.
    pub resets: u64,
    /// The platform process, if there is one.
    pub platform: Option<DeviceState>,
}

impl Overview {
    /// A machine with so many vCPUs and bytes of RAM, which is about to run.
    pub fn new(vcpus: usize, memory: u64, slots: Vec<Arc<Slot>>, has_platform: bool) -> Self {
        Overview {
            vcpus,
            memory,
            slots,
            now: Mutex::new(Now {
                state: MachineState::Running,
                resets: 0,
                platform: has_platform.then_some(DeviceState::Running),
            }),
        }
    }

    /// All devices, in the order of their slots.
    pub fn slots(&self) -> &[Arc<Slot>] {
        &self.slots
    }

    /// What changes, to look at or to change.
    pub fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answer to the command of that name.
    pub fn status(&self) -> MachineStatus {
        let now = self.now();
        MachineStatus {
            state: now.state,
            vcpus: self.vcpus,
            memory: self.memory,
            resets: now.resets,
            devices: self.slots.iter().map(|slot| slot.status()).collect(),
            platform: now.platform,
        }
    }
}
