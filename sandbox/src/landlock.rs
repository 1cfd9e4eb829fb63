//! Landlock with every access right under its control and none allowed. See
//! landlock(7).

use ::landlock::{ABI, Access, AccessFs, AccessNet, LandlockStatus, Ruleset, RulesetAttr, Scope};

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
    Ok(match status.landlock {
        LandlockStatus::Available { effective_abi, .. } => effective_abi as u32,
        LandlockStatus::NotEnabled | LandlockStatus::NotImplemented => 0,
    })
}
