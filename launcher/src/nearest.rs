//! The known name that is most similar to an unknown one.

/// Rewrites a message of serde about an unknown name, so that it has the nearest known name
/// instead of the list of all known names. Returns any other message unchanged.
///
/// Serde has the names only in its message, in backquotes, the unknown one first.
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
    use crate::config::{DiskConfig, NetConfig};
    use crate::keyval;

    /// This fails if serde ever changes the wording of its messages.
    #[test]
    fn the_nearest_known_name_is_suggested() {
        let nearest = |unknown: &str, known: &str| {
            format!("unknown {unknown}, the nearest known one is `{known}`")
        };
        assert_eq!(
            keyval::parse::<DiskConfig>("path=a,raedonly=on").unwrap_err(),
            nearest("key `raedonly`", "readonly")
        );
        assert_eq!(
            keyval::parse::<NetConfig>("isolate").unwrap_err(),
            nearest("value `isolate`", "isolated")
        );
        let missing = keyval::parse::<DiskConfig>("readonly=on").unwrap_err();
        assert_eq!(missing, "missing field `path`");
    }
}
