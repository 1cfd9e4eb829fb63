//! The command line: words of the form `key=value`.

use alloc::format;
use alloc::string::String;

/// A command line. Words without `=` are ignored, as kernels do; of a key given
/// twice the last one counts.
pub struct Options<'a>(&'a str);

impl<'a> Options<'a> {
    /// Looks words up in `line`.
    pub fn new(line: &'a str) -> Self {
        Self(line)
    }

    /// The value of `key`, if it is given.
    pub fn get(&self, key: &str) -> Option<&'a str> {
        self.0
            .split_ascii_whitespace()
            .filter_map(|word| word.split_once('='))
            .rfind(|(name, _)| *name == key)
            .map(|(_, value)| value)
    }

    /// The value of `key` as a number, decimal or with `0x`; `default` without it.
    ///
    /// # Errors
    /// The value is not a number.
    pub fn number(&self, key: &str, default: u64) -> Result<u64, String> {
        let Some(value) = self.get(key) else {
            return Ok(default);
        };
        match value.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => value.parse(),
        }
        .map_err(|_| format!("option {key}: {value} is not a number"))
    }

    /// The value of `key` as an IPv4 address; `default` without it.
    ///
    /// # Errors
    /// The value is not an address.
    pub fn address(&self, key: &str, default: [u8; 4]) -> Result<[u8; 4], String> {
        let Some(value) = self.get(key) else {
            return Ok(default);
        };
        value
            .parse::<core::net::Ipv4Addr>()
            .map(|address| address.octets())
            .map_err(|_| format!("option {key}: {value} is not an IPv4 address"))
    }

    /// Whether the comma-separated list `key` contains `item`.
    pub fn lists(&self, key: &str, item: &str) -> bool {
        self.get(key)
            .is_some_and(|list| list.split(',').any(|entry| entry == item))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_found_whole_and_the_last_counts() {
        let options = Options::new("quiet job=ram xjob=no  count=0x10 job=main size=7");
        assert_eq!(options.get("job"), Some("main"));
        assert_eq!(options.get("quiet"), None);
        assert_eq!(options.number("count", 1), Ok(16));
        assert_eq!(options.number("size", 1), Ok(7));
        assert_eq!(options.number("lines", 5), Ok(5));
    }

    #[test]
    fn a_bad_number_is_named() {
        let options = Options::new("count=12k size=-1 depth=");
        assert_eq!(
            options.number("count", 1),
            Err("option count: 12k is not a number".into())
        );
        assert!(options.number("size", 1).is_err());
        assert!(options.number("depth", 1).is_err());
    }

    #[test]
    fn addresses_and_lists() {
        let options = Options::new("peer=192.168.7.1 ip=10.0.2 need=block,net");
        assert_eq!(options.address("peer", [0; 4]), Ok([192, 168, 7, 1]));
        assert!(options.address("ip", [0; 4]).is_err());
        assert_eq!(options.address("other", [1, 2, 3, 4]), Ok([1, 2, 3, 4]));
        assert!(options.lists("need", "net"));
        assert!(!options.lists("need", "console"));
        assert!(!options.lists("job", "net"));
    }
}
