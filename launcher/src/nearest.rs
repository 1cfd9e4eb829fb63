//! What somebody may have meant by a name that nobody knows.

/// Serde's message about an unknown name with the nearest known one in place of
/// all of them; any other message as it is.
///
/// Serde has the names only in its text, in backquotes: the unknown one first.
pub fn explain(message: &str) -> String {
    let what = match message.split('`').next() {
        Some("unknown field ") => "key",
        Some("unknown variant ") => "value",
        _ => return message.to_owned(),
    };
    let mut names = message.split('`').skip(1).step_by(2);
    let unknown = names.next().unwrap_or_default();
    match names.min_by_key(|name| strsim::damerau_levenshtein(unknown, name)) {
        Some(known) => format!("unknown {what} `{unknown}`, the nearest known one is `{known}`"),
        None => message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use crate::config::{Disk, Net};
    use crate::keyval;

    /// These fail should serde ever put it in other words.
    #[test]
    fn the_nearest_known_name_is_told() {
        let nearest = |unknown: &str, known: &str| {
            format!("unknown {unknown}, the nearest known one is `{known}`")
        };
        assert_eq!(
            keyval::parse::<Disk>("path=a,raedonly=on").unwrap_err(),
            nearest("key `raedonly`", "readonly")
        );
        assert_eq!(
            keyval::parse::<Net>("isolate").unwrap_err(),
            nearest("value `isolate`", "isolated")
        );
        let missing = keyval::parse::<Disk>("readonly=on").unwrap_err();
        assert_eq!(missing, "missing field `path`");
    }
}
