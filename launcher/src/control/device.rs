//! Commands that the device process carries out: sends them to its control socket.

use std::time::{Duration, Instant};

use outrigger_control_socket::ControlClient;
use outrigger_protocol::ErrorCode;
use outrigger_protocol::control::ControlReply;
use outrigger_protocol::device::{DeviceCommand, DeviceReply};

use super::{ControlContext, error_code};
use crate::messages::{CommandError, SupervisorRequest};

/// How long the process may take to accept the connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// How long the process may take to answer.
fn reply_limit(command: &DeviceCommand) -> Duration {
    match command {
        DeviceCommand::Stats {} => Duration::from_secs(10),
        // Writing back the page cache to a slow medium can take long.
        DeviceCommand::Flush {} | DeviceCommand::Resize { .. } => Duration::from_secs(60),
    }
}

/// Sends `command` to the process of the device `id`, and returns its reply.
pub fn send(context: &ControlContext, id: &str, command: &DeviceCommand) -> ControlReply {
    try_send(context, id, command).unwrap_or_else(ControlReply::from)
}

fn try_send(
    context: &ControlContext,
    id: &str,
    command: &DeviceCommand,
) -> Result<ControlReply, CommandError> {
    let path = context.request(|reply| SupervisorRequest::ControlSocket {
        id: id.to_owned(),
        exclusive: matches!(command, DeviceCommand::Resize { .. }),
        reply,
    })??;
    let deadline = Instant::now() + CONNECT_LIMIT;
    let reply: DeviceReply = ControlClient::connect(&path, Some(deadline))
        .and_then(|mut client| client.request(command, reply_limit(command)))
        .map_err(|error| {
            let code = error_code(&error, ErrorCode::DeviceLost);
            CommandError::new(code, format!("{id}: its process: {error}"))
        })?;
    Ok(ControlReply {
        ok: reply.ok,
        error: reply.error.map(|why| format!("{id}: {why}")),
        code: reply.code,
        capacity: reply.capacity,
        stats: reply.stats,
        ..ControlReply::default()
    })
}
