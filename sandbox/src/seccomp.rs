//! From a policy to a seccomp filter. See seccomp(2).

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter_all_threads,
};

use crate::{Check, Error, Mode, Policy, Rule};

/// Stage 2: from here on the process, with all its threads, makes the system
/// calls of `policy` and no others; any other kills it with SIGSYS
/// ([`Mode::Enforce`]). Sets no_new_privs.
///
/// Two habits to leave before: starting threads, and asking the standard library
/// what it reads from files (`available_parallelism`, `File::metadata`, the
/// local time zone). A panic still prints its message and aborts, but with
/// RUST_BACKTRACE set the backtrace opens files and the process ends by SIGSYS.
///
/// # Errors
/// A policy that [`Policy::check`] refuses, or a kernel without seccomp. Nothing is
/// in force then.
pub fn seal(policy: &Policy, mode: Mode) -> Result<(), Error> {
    let otherwise = match mode {
        Mode::Enforce => SeccompAction::KillProcess,
        Mode::Log => SeccompAction::Log,
        Mode::Off => return Ok(()),
    };
    let program = compile(policy, otherwise)?;
    keep_malloc_off_files();
    apply_filter_all_threads(&program).map_err(Error::Seccomp)
}

impl Policy {
    /// Whether [`seal`] can make a filter of this policy: for a test beside it.
    ///
    /// # Errors
    /// [`Error::DuplicateRule`] or [`Error::Filter`].
    pub fn check(&self) -> Result<(), Error> {
        compile(self, SeccompAction::KillProcess).map(drop)
    }
}

fn compile(policy: &Policy, otherwise: SeccompAction) -> Result<BpfProgram, Error> {
    let process = policy.process;
    let filter_error = |cause| Error::Filter { process, cause };
    let mut rules = BTreeMap::new();
    for rule in policy.syscalls.iter().copied().flatten() {
        let alternatives = alternatives(rule).map_err(filter_error)?;
        if rules.insert(rule.syscall, alternatives).is_some() {
            let syscall = rule.syscall;
            return Err(Error::DuplicateRule { process, syscall });
        }
    }
    // The compiled filter begins with a look at the architecture, so 32-bit calls
    // are refused whatever their number; x32 ones have numbers of their own.
    SeccompFilter::new(rules, otherwise, SeccompAction::Allow, TargetArch::x86_64)
        .and_then(BpfProgram::try_from)
        .map_err(filter_error)
}

/// All the ways to fulfil a rule: the filter compiler knows "this and that" in
/// one of its rules and "or" between them. None means no condition.
fn alternatives(rule: &Rule) -> Result<Vec<SeccompRule>, BackendError> {
    let mut ways: Vec<Vec<SeccompCondition>> = vec![vec![]];
    for check in rule.when {
        let choices = choices(*check)?;
        ways = ways
            .iter()
            .flat_map(|way| {
                choices
                    .iter()
                    .map(|choice| way.iter().chain([choice]).cloned().collect())
            })
            .collect();
    }
    if rule.when.is_empty() {
        return Ok(vec![]);
    }
    if ways.is_empty() {
        // `OneOf` nothing: to the compiler it would look like no condition.
        return Err(BackendError::EmptyRule);
    }
    ways.into_iter().map(SeccompRule::new).collect()
}

fn choices(check: Check) -> Result<Vec<SeccompCondition>, BackendError> {
    let condition = |argument, operator, value: u32| {
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value.into())
    };
    match check {
        Check::OneOf(argument, values) => values
            .iter()
            .map(|&value| condition(argument, SeccompCmpOp::Eq, value))
            .collect(),
        Check::Without(argument, bits) => {
            condition(argument, SeccompCmpOp::MaskedEq(bits.into()), 0).map(|c| vec![c])
        }
        Check::OwnPid(argument) => {
            condition(argument, SeccompCmpOp::Eq, std::process::id()).map(|c| vec![c])
        }
    }
}

/// glibc's allocator opens files, which a sealed process does not survive:
/// `/proc/sys/vm/overcommit_memory` when it first shrinks a thread's arena, and,
/// up to 2.34, `/sys/devices/system/cpu/online` to find how many arenas to have.
/// So it is told not to shrink and how many.
#[cfg(target_env = "gnu")]
fn keep_malloc_off_files() {
    const ARENAS: libc::c_int = 8;
    // Setting one of these ends the automatic growth of the other, which starts
    // at 128 KiB: without it, each larger buffer would be mapped and unmapped.
    const MMAP_THRESHOLD: libc::c_int = 4 << 20;
    for (parameter, value) in [
        (libc::M_ARENA_MAX, ARENAS),
        (libc::M_TRIM_THRESHOLD, libc::c_int::MAX),
        (libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD),
    ] {
        // SAFETY: sets a parameter of the allocator under the allocator's lock.
        unsafe { libc::mallopt(parameter, value) };
    }
}

#[cfg(not(target_env = "gnu"))]
fn keep_malloc_off_files() {}
