//! Sizes in bytes on the command line.

/// Parses a size in bytes: a decimal number, optionally followed by K, M, G or T for powers
/// of 1024.
///
/// # Errors
/// A message that quotes `text` when it is not a size or is 2^64 bytes or more.
pub fn parse(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().next_back() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        Some((at, 'T' | 't')) => (&text[..at], 40),
        _ => (text, 0),
    };
    let bad = || format!("{text:?} is not a size such as 512M");
    // `u64::from_str` would also accept a sign.
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(bad());
    }
    let number: u64 = digits.parse().map_err(|_| bad())?;
    number.checked_mul(1 << shift).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [("0", 0), ("4096", 4096), ("3k", 3072), ("1M", 1 << 20)] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        assert_eq!(parse("4G"), Ok(4 << 30));
        assert_eq!(parse("16777215T"), Ok(16_777_215 << 40));
        for bad in [
            "",
            "M",
            "+1",
            "-1",
            "1.5G",
            "1GB",
            "0x10",
            "16777216T",
            "1 G",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
