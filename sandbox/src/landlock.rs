//! Landlock, with every access right under its control and none allowed, or with
//! one right in one place. See landlock(7).

use std::os::fd::BorrowedFd;

use ::landlock::{
    ABI, Access, AccessFs, AccessNet, LandlockStatus, PathBeneath, RestrictionStatus, Ruleset,
    RulesetAttr, RulesetCreatedAttr, Scope,
};

use crate::Error;

/// The newest ABI that the `landlock` crate knows. Unlike a program that allows
/// this and that, we cannot be surprised by a right we know nothing of: we want
/// none.
const NEWEST: ABI = ABI::V10;

/// Forbids the calling thread, and those it starts later, to open files, bind or
/// connect, reach abstract sockets, and signal processes outside. Files and
/// sockets that are open already keep their rights.
///
/// Returns the ABI in force: the older the kernel, the fewer of these it
/// controls (files from 5.13, ABI 1; TCP from 6.7, ABI 4; sockets and signals from
/// 6.12, ABI 6), and 0 is none at all.
pub(crate) fn allow_nothing() -> Result<u32, Error> {
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?
        .restrict_self()?;
    Ok(abi(&status))
}

/// Forbids the calling thread, and those it starts later, to remove files but
/// those beneath `directory`, at any depth. Mounts, and moves between directories, are
/// forbidden by any Landlock domain; everything else stays as it was. False when the
/// kernel has no Landlock: then nothing is forbidden.
///
/// # Errors
/// When the kernel has it and would not take the rule.
pub fn remove_files_only_in(directory: BorrowedFd) -> Result<bool, Error> {
    let status = Ruleset::default()
        .handle_access(AccessFs::RemoveFile | AccessFs::RemoveDir)?
        .create()?
        .add_rule(PathBeneath::new(directory, AccessFs::RemoveFile))?
        .restrict_self()?;
    Ok(abi(&status) > 0)
}

fn abi(status: &RestrictionStatus) -> u32 {
    match status.landlock {
        LandlockStatus::Available { effective_abi, .. } => effective_abi as u32,
        LandlockStatus::NotEnabled | LandlockStatus::NotImplemented => 0,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{File, remove_file};
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn files_are_removed_in_one_directory_only() {
        let ours = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir().unwrap();
        for directory in [&ours, &other] {
            File::create(directory.path().join("file")).unwrap();
        }
        // Only the thread that asks for it is bound, so the others clean up.
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let directory = File::open(ours.path()).unwrap();
                if !remove_files_only_in(directory.as_fd()).unwrap() {
                    eprintln!("skipped: no Landlock in this kernel");
                    return;
                }
                remove_file(ours.path().join("file")).unwrap();
                let error = remove_file(other.path().join("file")).unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
                // Everything else goes on as before.
                File::create(other.path().join("new")).unwrap();
            });
            thread.join().unwrap();
        });
    }
}
