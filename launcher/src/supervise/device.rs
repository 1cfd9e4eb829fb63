//! A device of the machine, as the supervisor knows it.

use std::sync::mpsc::Sender;
use std::time::Instant;

use super::backoff::RestartHistory;
use super::process_spec::ProcessSpec;
use super::swap_stage::SwapStage;
use crate::messages::ProcessNumber;

/// A device of the machine. It is served by one process at a time.
pub struct SupervisedDevice {
    /// What its processes are started with.
    pub spec: ProcessSpec,
    /// Whether it is a vhost-user device. Only those can be swapped.
    pub is_vhost_user: bool,
    /// The process that serves it, if one runs.
    pub current: Option<ProcessNumber>,
    /// The recent restarts.
    pub history: RestartHistory,
    /// When the next process is started, after a delay.
    pub restart_at: Option<Instant>,
    /// Whether the process that serves it was not started by the launcher.
    pub external: bool,
    /// The swap or restart in progress.
    pub swap: Option<SwapStage>,
    /// Requests that wait for the current process to end.
    pub exit_waiters: Vec<Sender<()>>,
}

impl SupervisedDevice {
    /// A device without a process.
    pub fn new(spec: ProcessSpec, is_vhost_user: bool) -> Self {
        SupervisedDevice {
            spec,
            is_vhost_user,
            current: None,
            history: RestartHistory::default(),
            restart_at: None,
            external: false,
            swap: None,
            exit_waiters: Vec::new(),
        }
    }

    /// Returns the id.
    pub fn id(&self) -> &str {
        &self.spec.program.id
    }
}
