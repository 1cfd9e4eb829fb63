//! `--on-loss wait|error[:SECONDS]|stop[:SECONDS]`.

use std::str::FromStr;
use std::time::Duration;

use super::spec::Endpoint;

/// What becomes of a device whose process is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnLoss {
    /// Its requests wait for another process, as long as it takes.
    Wait,
    /// If none has come by then, the device tells its driver that it needs a reset
    /// (virtio 1.2 section 2.1.2).
    Error(Duration),
    /// If none has come by then, the machine ends with code 5.
    Stop(Duration),
}

impl OnLoss {
    /// What goes for a device at `endpoint` if nothing is said: to a path another
    /// process may come, to an inherited connection none can.
    pub fn usual(endpoint: &Endpoint) -> Self {
        match endpoint {
            Endpoint::Path(_) => OnLoss::Wait,
            Endpoint::Fd(_) => OnLoss::Stop(Duration::ZERO),
        }
    }

    /// How long to wait before something else happens; for ever if `None`.
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
                return Err(format!(
                    "{text:?}: after the colon goes a number of seconds"
                ));
            }
        };
        match word {
            "wait" if seconds.is_none() => Ok(OnLoss::Wait),
            "wait" => Err("wait has no limit; error and stop may have one".into()),
            "error" => Ok(OnLoss::Error(limit)),
            "stop" => Ok(OnLoss::Stop(limit)),
            _ => Err(format!("{word:?} is none of wait, error, stop")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_limits() {
        let parse = str::parse::<OnLoss>;
        assert_eq!(parse("wait"), Ok(OnLoss::Wait));
        assert_eq!(parse("error"), Ok(OnLoss::Error(Duration::ZERO)));
        assert_eq!(parse("stop:30"), Ok(OnLoss::Stop(Duration::from_secs(30))));
        for bad in ["", "wait:3", "stop:", "stop:-1", "error:1.5", "die"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
