//! Parsing of command lines. A mistake on the command line is reported like every other
//! error: in one line on stderr.

use clap::Parser;
use clap::error::ErrorKind;

use crate::report_error;

/// Exit code for a command line that is not valid.
pub const USAGE: u8 = 2;

/// A mistake on the command line, or in the VM file, that the parser cannot detect. A program
/// that ends with this error exits with [`USAGE`].
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// Parses this program's command line. For `--help` and `--version` it prints the answer and
/// ends the program. For a mistake it prints one line to stderr and ends the program with
/// [`USAGE`].
pub fn parse<T: Parser>() -> T {
    T::try_parse().unwrap_or_else(|error| {
        if !error.use_stderr() {
            error.exit();
        }
        let line = match error.kind() {
            ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
                "a command is missing: see --help for the list".to_owned()
            }
            _ => one_line(&error.render().to_string()),
        };
        report_error(T::command().get_name(), line);
        std::process::exit(USAGE.into())
    })
}

/// Joins the paragraphs of clap's message to one line, without the usage summary and the
/// reference to `--help`.
fn one_line(text: &str) -> String {
    let text = text.strip_prefix("error: ").unwrap_or(text);
    let paragraphs = text.split("\n\n").map(|paragraph| {
        let words: Vec<&str> = paragraph.split_whitespace().collect();
        words.join(" ")
    });
    let kept: Vec<String> = paragraphs
        .filter(|p| !p.is_empty() && !p.starts_with("Usage:") && !p.starts_with("For more"))
        .collect();
    kept.join("; ")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[derive(Debug, Parser)]
    #[command(name = "program")]
    struct TestOptions {
        /// Colour
        #[arg(long, value_parser = ["red", "blue"])]
        colour: Option<String>,
        /// No output
        #[arg(long, conflicts_with = "colour")]
        quiet: bool,
        /// Input file
        #[arg(long)]
        path: String,
    }

    fn message(arguments: &[&str]) -> String {
        let arguments = [&["program"], arguments].concat();
        let error = TestOptions::try_parse_from(arguments).unwrap_err();
        one_line(&error.render().to_string())
    }

    #[test]
    fn every_mistake_is_one_line_that_names_the_option() {
        TestOptions::command().debug_assert();
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
            let line = message(arguments);
            for name in names {
                assert!(line.contains(name), "{arguments:?}: {line}");
            }
            let omitted = ["\n", "error:", "Usage", "For more"];
            assert!(omitted.iter().all(|n| !line.contains(n)), "{line}");
        }
    }
}
