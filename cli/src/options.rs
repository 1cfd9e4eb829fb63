//! Command lines, and what is said when one makes no sense: a line, as with
//! every other mistake.

use clap::Parser;
use clap::error::ErrorKind;

use crate::report_error;

/// Exit code for a command line that makes no sense.
pub const USAGE: u8 = 2;

/// What is wrong with a command line, where the parser cannot see it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// Parses this program's command line. `--help` and `--version` are answered and
/// end the program; so does a mistake, with one line on stderr and exit code 2.
pub fn parse<T: Parser>() -> T {
    T::try_parse().unwrap_or_else(|error| {
        if !error.use_stderr() {
            error.exit();
        }
        let line = match error.kind() {
            ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
                "a command is missing: see --help".to_owned()
            }
            _ => one_line(&error.render().to_string()),
        };
        report_error(T::command().get_name(), line);
        std::process::exit(USAGE.into())
    })
}

/// What clap says in several paragraphs, without those that are always the same.
fn one_line(text: &str) -> String {
    let text = text.strip_prefix("error: ").unwrap_or(text);
    let paragraphs = text.split("\n\n").map(|paragraph| {
        let words: Vec<&str> = paragraph.split_whitespace().collect();
        words.join(" ")
    });
    let telling: Vec<String> = paragraphs
        .filter(|p| !p.is_empty() && !p.starts_with("Usage:") && !p.starts_with("For more"))
        .collect();
    telling.join("; ")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[derive(Debug, Parser)]
    #[command(name = "program")]
    struct Options {
        /// First
        #[arg(long, value_parser = ["red", "blue"])]
        colour: Option<String>,
        /// Second
        #[arg(long, conflicts_with = "colour")]
        quiet: bool,
        /// Third
        #[arg(long)]
        path: String,
    }

    fn said(arguments: &[&str]) -> String {
        let arguments = [&["program"], arguments].concat();
        let error = Options::try_parse_from(arguments).unwrap_err();
        one_line(&error.render().to_string())
    }

    #[test]
    fn every_mistake_is_one_line_that_names_the_option() {
        Options::command().debug_assert();
        for (arguments, names) in [
            (&["--pth", "x"][..], &["'--pth'", "'--path'"][..]),
            (&["--path"], &["--path"]),
            (&[], &["--path", "not provided"]),
            (&["--path", "a", "--path", "b"], &["--path", "multiple"]),
            (&["--colour", "green"], &["green", "--colour", "red, blue"]),
            (
                &["--path", "a", "--colour", "red", "--quiet"],
                &["--quiet", "--colour"],
            ),
        ] {
            let line = said(arguments);
            for name in names {
                assert!(line.contains(name), "{arguments:?}: {line}");
            }
            let noise = ["\n", "error:", "Usage", "For more"];
            assert!(noise.iter().all(|n| !line.contains(n)), "{line}");
        }
    }
}
