//! The one line with which a program reports an error on stderr.

use std::fmt::Display;

/// Prints `program: error` to stderr, as one line whatever the error quotes.
pub fn report_error(program: &str, error: impl Display) {
    eprintln!("{}", line(program, error));
}

/// Formats the line. The alternate form `{:#}` makes anyhow print the whole chain of causes.
fn line(program: &str, error: impl Display) -> String {
    escape(&format!("{program}: {error:#}"))
}

/// Escapes control characters, which file names for example may contain, so that `text` stays
/// one line and cannot control a terminal.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() {
            escaped.extend(character.escape_default());
        } else {
            escaped.push(character);
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    #[test]
    fn only_control_characters_are_escaped() {
        let line = super::line("program", "/a\nb\t\u{1b}[1m/\u{e9}\"\\: not there");
        assert_eq!(line, r#"program: /a\nb\t\u{1b}[1m/é"\: not there"#);
    }
}
