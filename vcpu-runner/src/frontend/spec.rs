//! `--device ID,type=…,socket=…|fd=…[,queues=…][,queue-size=…]`.

use std::str::FromStr;

use outrigger_cli::socket::socket_path;

use crate::endpoint::Endpoint;

/// One `--device` option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSpec {
    /// The device's name.
    pub id: String,
    /// Virtio device number (virtio 1.2 section 5).
    pub virtio_id: u16,
    /// Where its back end is reached.
    pub endpoint: Endpoint,
    /// How many queues the guest sees; by default all that the back end has.
    pub queues: Option<usize>,
    /// Largest vring that the driver may choose, a power of two. The protocol has no
    /// message to ask a back end for its limit.
    pub queue_size: u16,
}

/// The default of `queue-size`: all known back ends accept it.
const DEFAULT_QUEUE_SIZE: u16 = 256;
/// Largest split ring (virtio 1.2 section 2.7).
const MAX_QUEUE_SIZE: u16 = 1 << 15;

/// Names of device types, their numbers, and how many queues a back end without
/// VHOST_USER_PROTOCOL_F_MQ has.
const DEVICE_TYPES: [(&str, u16, usize); 3] = [("net", 1, 2), ("block", 2, 1), ("console", 3, 2)];

/// Device types of which every request completes by itself, without an event from
/// outside (a frame that arrives, a key that is pressed).
const SELF_COMPLETING_TYPES: [u16; 1] = [2];

impl DeviceSpec {
    /// Whether a back end completes all its requests when no new ones are added.
    pub fn completes_all(&self) -> bool {
        SELF_COMPLETING_TYPES.contains(&self.virtio_id)
    }

    /// How many queues a back end has that cannot be asked (no GET_QUEUE_NUM).
    pub fn default_queues(&self) -> usize {
        DEVICE_TYPES
            .iter()
            .find(|t| t.1 == self.virtio_id)
            .map_or(1, |t| t.2)
    }
}

impl FromStr for DeviceSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let id = parts.next().unwrap_or_default().to_owned();
        if id.is_empty() || id.contains('=') {
            return Err("it does not begin with the name of the device: ID,type=…".into());
        }
        let (mut virtio_id, mut endpoint) = (None, None);
        let (mut queues, mut queue_size) = (None, None);
        for part in parts {
            let (key, value) = part
                .split_once('=')
                .ok_or_else(|| format!("{part:?} is not key=value"))?;
            let given_before = match key {
                "type" => virtio_id.replace(device_type(value)?).is_some(),
                "socket" => endpoint
                    .replace(Endpoint::Path(socket_path(value.into())?))
                    .is_some(),
                "fd" => endpoint
                    .replace(Endpoint::Fd(number(key, value)?))
                    .is_some(),
                "queues" => queues.replace(number(key, value)?).is_some(),
                "queue-size" => queue_size.replace(ring_size(value)?).is_some(),
                _ => {
                    let known = "type, socket, fd, queues, queue-size";
                    return Err(format!("{key:?} is not one of {known}"));
                }
            };
            if given_before {
                return Err(match key {
                    "socket" | "fd" => "give either socket= or fd=, once".into(),
                    _ => format!("{key}= is given twice"),
                });
            }
        }
        Ok(DeviceSpec {
            id,
            virtio_id: virtio_id.ok_or("type= is missing")?,
            endpoint: endpoint.ok_or("socket= or fd= is missing")?,
            queues,
            queue_size: queue_size.unwrap_or(DEFAULT_QUEUE_SIZE),
        })
    }
}

fn device_type(text: &str) -> Result<u16, String> {
    if let Some(known) = DEVICE_TYPES.iter().find(|t| t.0 == text) {
        return Ok(known.1);
    }
    match text.parse() {
        // PCI device IDs of virtio devices end at 0x107f, which is number 63.
        Ok(number @ 1..=63) => Ok(number),
        _ => Err(format!(
            "type={text} is not net, block, console or a number from 1 to 63"
        )),
    }
}

fn ring_size(text: &str) -> Result<u16, String> {
    let size: u16 = number("queue-size", text)?;
    if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
        return Err(format!(
            "queue-size={size} is not a power of two up to {MAX_QUEUE_SIZE}"
        ));
    }
    Ok(size)
}

fn number<T: FromStr>(key: &str, text: &str) -> Result<T, String> {
    text.parse()
        .map_err(|_| format!("{key}={text} is not a number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_parsed() {
        let spec: DeviceSpec = "disk0,type=block,socket=/run/d,queues=4".parse().unwrap();
        assert_eq!((spec.virtio_id, spec.queues), (2, Some(4)));
        assert_eq!(spec.endpoint, Endpoint::Path("/run/d".into()));
        let spec: DeviceSpec = "x,type=26,fd=7,queue-size=64".parse().unwrap();
        assert_eq!(spec.queue_size, 64);
        assert_eq!((spec.virtio_id, spec.default_queues()), (26, 1));
        for bad in [
            "",
            "type=block,fd=1",
            "a,fd=1",
            "a,type=block",
            "a,type=blok,fd=1",
            "a,type=64,fd=1",
            "a,type=block,fd=x",
            "a,type=block,fd=1,socket=/s",
            "a,type=block,fd=1,type=net",
            "a,type=block,fd=1,color=red",
            "a,type=block,socket=",
            &format!("a,type=block,socket={}", "x".repeat(108)),
            "a,type=block,fd=1,queue-size=100",
            "a,type=block,fd=1,queue-size=0",
            "a,type=block,fd=1,queue-size=65536",
        ] {
            assert!(bad.parse::<DeviceSpec>().is_err(), "{bad}");
        }
    }
}
