//! Landlock (landlock(7)): a rule set that controls every right and allows none, and one that
//! allows removing files in a single directory.

use std::os::fd::BorrowedFd;

use ::landlock::{
    ABI, Access, AccessFs, AccessNet, LandlockStatus, PathBeneath, RestrictionStatus, Ruleset,
    RulesetAttr, RulesetCreatedAttr, Scope,
};

use crate::SandboxError;

/// The newest ABI that the `landlock` crate knows. A program that allows some rights has to
/// know every one of them; this one allows none, so it can always use the newest.
const NEWEST: ABI = ABI::V10;

/// Forbids the calling thread, and the threads that it starts later, to open files, to bind
/// or connect TCP sockets, to reach abstract unix sockets, and to signal processes outside
/// the domain. Open files and sockets keep their rights.
///
/// Returns the ABI in force, or 0 without Landlock. An older kernel controls fewer rights:
/// files from Linux 5.13 (ABI 1), TCP from 6.7 (ABI 4), abstract sockets and signals from
/// 6.12 (ABI 6).
pub(crate) fn allow_nothing() -> Result<u32, SandboxError> {
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?
        .restrict_self()?;
    Ok(abi(&status))
}

/// Forbids the calling thread, and the threads that it starts later, to remove files anywhere
/// except below `directory`. Landlock then also forbids mounting and moving files between
/// directories; everything else stays allowed. Returns false, and forbids nothing, in a kernel
/// without Landlock.
///
/// # Errors
/// The kernel has Landlock, but rejected the rule set.
pub fn remove_files_only_in(directory: BorrowedFd) -> Result<bool, SandboxError> {
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
    fn files_can_be_removed_in_one_directory_only() {
        let allowed = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir().unwrap();
        for directory in [&allowed, &other] {
            File::create(directory.path().join("file")).unwrap();
        }
        // Only this thread is restricted, so the test can still clean up.
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let directory = File::open(allowed.path()).unwrap();
                if !remove_files_only_in(directory.as_fd()).unwrap() {
                    eprintln!("skipped: no Landlock in this kernel");
                    return;
                }
                remove_file(allowed.path().join("file")).unwrap();
                let error = remove_file(other.path().join("file")).unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
                // Everything else stays allowed.
                File::create(other.path().join("new")).unwrap();
            });
            thread.join().unwrap();
        });
    }
}
