//! The one line with which a program reports an error on stderr.

use std::fmt::Display;

/// Prints `program: error` to stderr, as one line whatever the error quotes.
pub fn report_error(program: &str, error: impl Display) {
    eprintln!("{}", line(program, error));
}

/// Formats the line. File names may contain control characters, so these are escaped. The
/// alternate form `{:#}` makes anyhow print the whole chain of causes.
fn line(program: &str, error: impl Display) -> String {
    let mut line = format!("{program}: ");
    for character in format!("{error:#}").chars() {
        if character.is_control() {
            line.extend(character.escape_default());
        } else {
            line.push(character);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    #[test]
    fn only_control_characters_are_escaped() {
        let line = super::line("program", "/a\nb\t\u{1b}[1m/\u{e9}\"\\: not there");
        assert_eq!(line, r#"program: /a\nb\t\u{1b}[1m/é"\: not there"#);
    }
}
