//! The stages of a swap.

use std::process::ExitStatus;
use std::sync::mpsc::Sender;

use super::process_spec::ProcessSpec;
use crate::config::MachineConfig;
use crate::messages::{ProcessNumber, SwapReady};

/// The stages of a swap.
pub enum SwapStage {
    /// The old process has been told to end. Its successor follows at the same socket.
    AwaitingExit {
        /// Takes the answer when the successor is ready.
        reply: Sender<SwapReady>,
    },
    /// The successor was started, and is not ready yet.
    Starting {
        /// The successor.
        process: ProcessNumber,
        /// What changes when the swap is committed.
        successor: Successor,
        /// Takes the answer when the successor is ready.
        reply: Sender<SwapReady>,
        /// The first line on its stderr; empty if it will print none.
        first_line: Option<String>,
        /// How it ended.
        status: Option<ExitStatus>,
    },
    /// The successor is ready, and the control socket's thread commits or aborts the swap.
    Ready {
        /// The successor, if the launcher started it and it still runs.
        process: Option<ProcessNumber>,
        /// What changes when the swap is committed.
        successor: Successor,
    },
}

/// What serves the device after the swap.
pub enum Successor {
    /// A process at the same socket. It is the current process already.
    SameSocket,
    /// A process with sockets of its own.
    NewSocket {
        /// What it was started with.
        spec: Box<ProcessSpec>,
        /// The description of the machine with it, if that differs.
        config: Option<Box<MachineConfig>>,
    },
    /// A process that the launcher did not start.
    External,
}

impl SwapStage {
    /// Returns the successor, if the launcher started it and it has not ended since it was
    /// ready.
    pub fn process(&self) -> Option<ProcessNumber> {
        match self {
            SwapStage::AwaitingExit { .. } => None,
            SwapStage::Starting { process, .. } => Some(*process),
            SwapStage::Ready { process, .. } => *process,
        }
    }

    /// The process `number` is ready: if it is the successor, answers the request and goes to
    /// the last stage.
    pub fn process_ready(self, number: ProcessNumber) -> Self {
        match self {
            SwapStage::Starting {
                process,
                successor,
                reply,
                ..
            } if process == number => {
                let path = match &successor {
                    Successor::NewSocket { spec, .. } => Some(spec.socket.path.clone()),
                    Successor::SameSocket | Successor::External => None,
                };
                // Fails if the client's thread has given up.
                let _ = reply.send(Ok(path));
                SwapStage::Ready {
                    process: Some(process),
                    successor,
                }
            }
            other => other,
        }
    }

    /// The process `number` printed its first line to stderr.
    pub fn set_first_line(&mut self, number: ProcessNumber, line: &str) {
        if let SwapStage::Starting {
            process,
            first_line,
            ..
        } = self
            && *process == number
        {
            *first_line = Some(line.to_owned());
        }
    }

    /// The process `number` has ended.
    pub fn process_exited(&mut self, number: ProcessNumber, exit_status: ExitStatus) {
        match self {
            SwapStage::Starting {
                process, status, ..
            } if *process == number => *status = Some(exit_status),
            SwapStage::Ready { process, .. } if *process == Some(number) => *process = None,
            _ => {}
        }
    }

    /// Whether the successor has ended before it was ready, and its first line is known.
    pub fn has_failed(&self) -> bool {
        matches!(
            self,
            SwapStage::Starting {
                first_line: Some(_),
                status: Some(_),
                ..
            }
        )
    }
}
