//! Distributes the runner's events to the supervisor and to the clients that watch.

use std::time::Instant;

use outrigger_control_socket::{ControlClient, ControlServer};
use outrigger_protocol::control::{ControlCommand, ControlReply};
use serde_json::value::RawValue;

use super::{ControlContext, RUNNER_REPLY_LIMIT, RUNNER_SOCKET_LIMIT};
use crate::messages::SupervisorEvent;

/// Receives events until the runner ends.
pub fn relay(context: &ControlContext, server: Option<&ControlServer>) {
    let deadline = Instant::now() + RUNNER_SOCKET_LIMIT;
    if let Ok(mut client) = ControlClient::connect(&context.runner, Some(deadline))
        && let Ok(reply) =
            client.request::<ControlReply>(&ControlCommand::Watch {}, RUNNER_REPLY_LIMIT)
        && reply.ok
    {
        while let Ok(Some(line)) = client.next_line(None) {
            if let Ok(event) = serde_json::from_slice(&line) {
                context.notify(SupervisorEvent::Machine(event));
            }
            // Clients also get the events of a newer runner that this program does not know.
            if let Some(server) = server
                && let Ok(event) = serde_json::from_slice::<&RawValue>(&line)
            {
                server.broadcast(&event);
            }
        }
    }
    if let Some(server) = server {
        server.end_events();
    }
}
