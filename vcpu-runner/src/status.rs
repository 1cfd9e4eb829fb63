//! What the command `status` shows. It is kept apart from the machine's thread, which may
//! be waiting for a back end.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use outrigger_protocol::control::{DeviceState, MachineState, MachineStatus};

use crate::frontend::VhostUserDevice;

/// The status of the machine, shared by its thread and the control thread.
pub struct SharedStatus {
    vcpus: usize,
    memory: u64,
    devices: Vec<Arc<VhostUserDevice>>,
    changing: Mutex<ChangingStatus>,
}

/// The parts that the machine's thread changes.
pub struct ChangingStatus {
    /// The machine's state.
    pub state: MachineState,
    /// Number of resets.
    pub resets: u64,
    /// The platform process, if there is one.
    pub platform: Option<DeviceState>,
}

impl SharedStatus {
    /// The status of a machine that is about to run.
    pub fn new(
        vcpus: usize,
        memory: u64,
        devices: Vec<Arc<VhostUserDevice>>,
        has_platform: bool,
    ) -> Self {
        SharedStatus {
            vcpus,
            memory,
            devices,
            changing: Mutex::new(ChangingStatus {
                state: MachineState::Running,
                resets: 0,
                platform: has_platform.then_some(DeviceState::Running),
            }),
        }
    }

    /// All devices, in the order of their options.
    pub fn devices(&self) -> &[Arc<VhostUserDevice>] {
        &self.devices
    }

    /// The parts that change.
    pub fn lock(&self) -> MutexGuard<'_, ChangingStatus> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The answer to `status`.
    pub fn status(&self) -> MachineStatus {
        let changing = self.lock();
        MachineStatus {
            state: changing.state,
            vcpus: self.vcpus,
            memory: self.memory,
            resets: changing.resets,
            devices: self.devices.iter().map(|device| device.status()).collect(),
            platform: changing.platform,
        }
    }
}
