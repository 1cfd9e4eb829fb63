//! Sizes as people write them.

/// Bytes, or a number with K, M, G or T for powers of 1024.
///
/// # Errors
/// What is wrong with it.
pub fn parse(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        other => return Err(format!("{other:?} is none of K, M, G and T")),
    };
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) || digits.is_empty() {
        return Err("a size is a number, which K, M, G or T may follow".into());
    }
    let number: u64 = digits.parse().map_err(|error| format!("{error}"))?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "too large".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_numbers_with_a_letter() {
        for (text, size) in [
            ("0", 0),
            ("512", 512),
            ("4k", 4096),
            ("3M", 3 << 20),
            ("20G", 20 << 30),
            ("1T", 1 << 40),
        ] {
            assert_eq!(parse(text), Ok(size));
        }
        for text in [
            "",
            "G",
            "-1",
            "+1G",
            "1.5G",
            "1GB",
            "1 G",
            "99999999T",
            "1P",
            "1\u{e9}",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
