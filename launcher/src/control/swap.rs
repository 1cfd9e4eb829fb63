//! The sequence of a swap: the supervisor starts the new process, the runner swaps to it, and
//! the supervisor ends the old process. If the runner refuses, the new process ends instead.

use outrigger_protocol::ErrorCode;
use outrigger_protocol::control::{ControlCommand, ControlReply};

use super::ControlContext;
use crate::messages::{CommandError, SupervisorEvent, SupervisorRequest, SwapSource};

/// A swap that the supervisor has started. Dropping it without [`StartedSwap::commit`] aborts
/// the swap.
struct StartedSwap<'a> {
    context: &'a ControlContext,
    id: &'a str,
    committed: bool,
}

impl StartedSwap<'_> {
    fn commit(mut self) -> Result<(), CommandError> {
        self.committed = true;
        let id = self.id.to_owned();
        self.context
            .request(|reply| SupervisorRequest::CommitSwap { id, reply })
    }
}

impl Drop for StartedSwap<'_> {
    fn drop(&mut self) {
        if !self.committed {
            let id = self.id.to_owned();
            let abort = SupervisorRequest::AbortSwap { id };
            self.context.notify(SupervisorEvent::Request(abort));
        }
    }
}

/// Swaps the device `id` to another process.
pub fn swap(context: &ControlContext, id: &str, source: SwapSource) -> ControlReply {
    try_swap(context, id, source).unwrap_or_else(ControlReply::from)
}

fn try_swap(
    context: &ControlContext,
    id: &str,
    source: SwapSource,
) -> Result<ControlReply, CommandError> {
    let path = context.request(|reply| SupervisorRequest::StartSwap {
        id: id.to_owned(),
        source,
        reply,
    })??;
    let started = StartedSwap {
        context,
        id,
        committed: false,
    };
    let Some(path) = path else {
        // The runner reconnects to the same socket by itself.
        started.commit()?;
        return Ok(ControlReply::ok());
    };
    let command = ControlCommand::Swap {
        id: id.to_owned(),
        socket: Some(path),
        device: None,
    };
    let mut reply = context.forward(&command);
    if reply.code == Some(ErrorCode::DeviceLost) {
        // The runner has lost the old process, but it may still run without answering, and
        // could write to guest memory later. So kill it before the second attempt.
        let id = id.to_owned();
        context.request(|reply| SupervisorRequest::KillProcess { id, reply })?;
        reply = context.forward(&command);
    }
    if reply.ok {
        started.commit()?;
    }
    Ok(reply)
}
