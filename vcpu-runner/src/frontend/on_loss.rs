//! `--on-loss wait|error[:SECONDS]|stop[:SECONDS]`.

use std::str::FromStr;
use std::time::Duration;

use crate::endpoint::Endpoint;

/// What happens when the back end of a device is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnLoss {
    /// The driver's requests wait for another back end, without a limit.
    Wait,
    /// If no other one has come after this time, the device sets DEVICE_NEEDS_RESET
    /// (virtio 1.2 section 2.1.2).
    Error(Duration),
    /// If no other one has come after this time, the runner exits with code 5.
    Stop(Duration),
}

impl OnLoss {
    /// The default for a device at `endpoint`. Another process may listen at a path; an
    /// inherited connection cannot come back.
    pub fn default_for(endpoint: &Endpoint) -> Self {
        match endpoint {
            Endpoint::Path(_) => OnLoss::Wait,
            Endpoint::Fd(_) => OnLoss::Stop(Duration::ZERO),
        }
    }

    /// How long to wait for another back end; `None`: without a limit.
    pub fn limit(self) -> Option<Duration> {
        match self {
            OnLoss::Wait => None,
            OnLoss::Error(limit) | OnLoss::Stop(limit) => Some(limit),
        }
    }
}

impl FromStr for OnLoss {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (word, seconds) = match text.split_once(':') {
            Some((word, seconds)) => (word, Some(seconds)),
            None => (text, None),
        };
        let limit = match seconds.map(str::parse::<u32>) {
            None => Duration::ZERO,
            Some(Ok(seconds)) => Duration::from_secs(seconds.into()),
            Some(Err(_)) => {
                return Err("what follows the colon is not a number of seconds".into());
            }
        };
        match word {
            "wait" if seconds.is_none() => Ok(OnLoss::Wait),
            "wait" => Err("wait takes no time limit; error and stop do".into()),
            "error" => Ok(OnLoss::Error(limit)),
            "stop" => Ok(OnLoss::Stop(limit)),
            _ => Err(format!("{word:?} is not one of wait, error, stop")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_parsed() {
        let parse = str::parse::<OnLoss>;
        assert_eq!(parse("wait"), Ok(OnLoss::Wait));
        assert_eq!(parse("error"), Ok(OnLoss::Error(Duration::ZERO)));
        assert_eq!(parse("stop:30"), Ok(OnLoss::Stop(Duration::from_secs(30))));
        for bad in ["", "wait:3", "stop:", "stop:-1", "error:1.5", "die"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
