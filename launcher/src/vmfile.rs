//! The VM file: a [`MachineConfig`] in TOML.

use std::path::Path;

use anyhow::Context;

use crate::config::MachineConfig;
use crate::nearest;
use outrigger_cli::Usage;

/// The largest number of characters that an error quotes of a line.
const MAX_QUOTE: usize = 60;

/// Reads a VM file.
///
/// # Errors
/// The file cannot be read; or, as [`Usage`], it is not UTF-8 or does not follow the schema.
/// The message has the number of the line.
pub fn load(path: &Path) -> anyhow::Result<MachineConfig> {
    let what = || format!("VM file {}", path.display());
    let bytes = std::fs::read(path).with_context(what)?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Usage(format!("{}: not UTF-8 from byte {at} on", what()))
    })?;
    toml::from_str(&text).map_err(|error| {
        let message = explain(&text, error.message(), error.span().map(|span| span.start));
        Usage(format!("{}: {message}", what())).into()
    })
}

/// Formats one line with the mistake and its position.
fn explain(text: &str, message: &str, at: Option<usize>) -> String {
    let message = nearest::explain(&message.replace('\n', " "));
    // toml reports a missing top-level key at offset 0, which no line helps to find.
    let Some(before) = at.filter(|&at| at > 0).and_then(|at| text.get(..at)) else {
        return message;
    };
    let number = before.matches('\n').count() + 1;
    let line = text.lines().nth(number - 1).unwrap_or_default().trim();
    let quoted = line.chars().take(MAX_QUOTE);
    let quoted: String = quoted
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    format!("line {number}: {quoted}: {message}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error_of(text: &str) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let error = load(file.path()).unwrap_err();
        assert!(error.is::<Usage>());
        let message = error.to_string();
        assert!(!message.contains('\n'), "{message}");
        message.replace(file.path().to_str().unwrap(), "FILE")
    }

    #[test]
    fn a_mistake_is_reported_with_its_line() {
        for (text, expected) in [
            (
                "kernel = 'k'\ncmdlnie = 'x'",
                "line 2: cmdlnie = 'x': unknown key `cmdlnie`, the nearest known one is `cmdline`",
            ),
            (
                "kernel = 'k'\n\n[[dsik]]\npath = 'a'",
                "line 3: [[dsik]]: unknown key `dsik`, the nearest known one is `disk`",
            ),
            (
                "kernel = 'k'\n[[disk]]\npth = 'a'",
                "line 3: pth = 'a': unknown key `pth`, the nearest known one is `path`",
            ),
            (
                "kernel = 'k'\n[serial]\ntype = 'sdtio'",
                "line 3: type = 'sdtio': unknown value `sdtio`, the nearest known one is `stdio`",
            ),
        ] {
            assert_eq!(error_of(text), format!("VM file FILE: {expected}"));
        }
        for (text, parts) in [
            (
                "kernel = 'k'\ncpus = 'two'",
                ["line 2: cpus", "invalid type"],
            ),
            ("kernel = 'k'\ncpus = 256", ["line 2: cpus", "256"]),
            ("kernel = 'k'\n[[disk]]\n", ["line 2: [[disk]]", "`path`"]),
            (
                "kernel = 'k'\nkernel = 'j'",
                ["line 2: kernel", "duplicate"],
            ),
            ("kernel = 'k'\nmemory = 512M", ["line 2: memory", "512M"]),
        ] {
            let message = error_of(text);
            for part in parts {
                assert!(message.contains(part), "{message}");
            }
        }
    }
}
