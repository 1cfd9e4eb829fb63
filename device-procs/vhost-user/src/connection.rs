//! The connection of one front end: reads its messages until it leaves.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use vhost::vhost_user::{BackendReqHandler, Error as VhostError};

use crate::DeviceProperties;
use crate::fault::{self, FaultPoint};
use crate::session::VhostUserSession;
use crate::vhost_workarounds::{SET_BACKEND_REQ_FD, SET_VRING_ENABLE, early_vring_enable, peek};

/// Handles the messages of one front end until it leaves. A message that fails is answered
/// with the failure if the front end asked for a reply. Otherwise the failure ends the
/// connection, for the front end would not learn of it.
///
/// # Errors
/// The socket fails, a message has a wrong form, or one fails whose failure the front end
/// would not see.
pub fn serve_front_end(
    stream: UnixStream,
    session: &Arc<Mutex<VhostUserSession>>,
    properties: &DeviceProperties,
) -> Result<(), VhostError> {
    let duplicate = stream.try_clone().map_err(VhostError::SocketError)?;
    let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(session));
    while let Some(next) = peek(&duplicate).map_err(VhostError::SocketError)? {
        fault::hit(FaultPoint::Message(next.request));
        let reports_failure = next.reports_failure();
        match next.request {
            SET_BACKEND_REQ_FD => properties.config.set_channel(next.fd.map(UnixStream::from)),
            SET_VRING_ENABLE => {
                let mut session = session.lock().unwrap_or_else(PoisonError::into_inner);
                if session.awaits_features() {
                    early_vring_enable(&duplicate, &mut session)
                        .map_err(VhostError::SocketError)?;
                    continue;
                }
            }
            _ => {}
        }
        match handler.handle_request() {
            Ok(()) => {}
            Err(VhostError::Disconnected) => break,
            Err(error @ VhostError::ReqHandlerError(_)) if reports_failure => {
                tracing::warn!("{error}");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
