//! What a program says when it cannot go on.

use std::fmt::Display;

/// Prints `program: error` on stderr: one line, whatever the error quotes.
pub fn report_error(program: &str, error: impl Display) {
    eprintln!("{}", line(program, error));
}

/// Control characters are escaped: a file's name may have some. `{:#}` is how anyhow
/// gives the causes, too.
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
    fn control_characters_are_escaped_and_nothing_else() {
        let said = super::line("program", "/a\nb\t\u{1b}[1m/\u{e9}\"\\: not there");
        assert_eq!(said, r#"program: /a\nb\t\u{1b}[1m/é"\: not there"#);
    }
}
