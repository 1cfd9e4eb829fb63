//! The runner alone: its errors, and what it leaves behind.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::process::Launch;

/// A wrong command line, or a guest that fails.
pub struct Mistake<'a> {
    /// Arguments.
    pub args: Vec<String>,
    /// The expected exit code.
    pub code: i32,
    /// Text that the line on stderr must contain.
    pub words: &'a [&'a str],
}

/// Shorthand for a [`Mistake`]; the arguments are split at white space.
pub fn mistake<'a>(args: &str, code: i32, words: &'a [&'a str]) -> Mistake<'a> {
    Mistake {
        args: args.split_whitespace().map(str::to_owned).collect(),
        code,
        words,
    }
}

/// A directory for the files of such command lines.
pub struct Place(TempDir);

impl Default for Place {
    fn default() -> Self {
        Place(tempfile::tempdir().unwrap())
    }
}

impl Place {
    /// Its path.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// A name in it, as text.
    pub fn name(&self, name: &str) -> String {
        self.path().join(name).display().to_string()
    }

    /// Writes a file; returns its name as text.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        std::fs::write(self.path().join(name), content).unwrap();
        self.name(name)
    }

    fn list(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.path()).unwrap();
        let mut names: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).collect();
        names.sort();
        names
    }

    /// Runs all `mistakes` in parallel. Each must exit with its code and one line that names
    /// what is wrong, and leave nothing in this directory.
    ///
    /// # Panics
    /// One does not.
    pub fn expect(&self, mistakes: &[Mistake]) {
        let before = self.list();
        // A few at a time: some wait for a deadline, and all use memory.
        for group in mistakes.chunks(8) {
            let running: Vec<_> = group
                .iter()
                .map(|mistake| {
                    let launch = Launch::new("vcpu-runner").args(["--log-level", "off"]);
                    launch.args(&mistake.args).spawn()
                })
                .collect();
            for (mistake, process) in group.iter().zip(running) {
                let code = process.wait().code();
                check_line(mistake, code, &process.log());
            }
        }
        assert_eq!(self.list(), before, "something was left behind");
    }
}

/// Checks the output for `mistake`.
///
/// # Panics
/// It is not one line that names what is wrong.
pub fn check_line(mistake: &Mistake, code: Option<i32>, said: &str) {
    let what = format!("{:?}: {code:?}: {said}", mistake.args);
    assert_eq!(code, Some(mistake.code), "{what}");
    assert_eq!(said.lines().count(), 1, "{what}");
    assert!(said.starts_with("vcpu-runner: "), "{what}");
    for word in mistake.words {
        assert!(said.contains(word), "{word:?} is missing: {what}");
    }
}
