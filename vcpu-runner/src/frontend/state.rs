//! The device state that `status` shows. It decides nothing: it is derived from what
//! the device task owns, each time that the task publishes its status.

use outrigger_protocol::control::DeviceState;

/// What the device task has to do with a back end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkState {
    /// A back end serves the device.
    Connected,
    /// A back end serves the device, and a swap is about to stop it.
    Draining,
    /// The back end is lost, and no other one has answered.
    Lost,
    /// Another back end has answered; the handshake is in progress.
    Handshake,
}

/// The state to show for a device whose machine is `paused` or not.
pub fn displayed_state(link: LinkState, paused: bool) -> DeviceState {
    match link {
        LinkState::Connected if paused => DeviceState::Paused,
        LinkState::Connected => DeviceState::Running,
        LinkState::Draining => DeviceState::Draining,
        LinkState::Lost => DeviceState::Lost,
        LinkState::Handshake => DeviceState::Connecting,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_displayed_state_follows_the_link_and_the_pause() {
        let table = [
            (
                LinkState::Connected,
                DeviceState::Running,
                DeviceState::Paused,
            ),
            (
                LinkState::Draining,
                DeviceState::Draining,
                DeviceState::Draining,
            ),
            (LinkState::Lost, DeviceState::Lost, DeviceState::Lost),
            (
                LinkState::Handshake,
                DeviceState::Connecting,
                DeviceState::Connecting,
            ),
        ];
        for (link, running, paused) in table {
            assert_eq!(displayed_state(link, false), running, "{link:?}");
            assert_eq!(displayed_state(link, true), paused, "{link:?}");
        }
    }
}
