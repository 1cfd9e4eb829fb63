//! Compiles a policy to a seccomp filter and installs it. See seccomp(2).

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter_all_threads,
};

use crate::{Check, Policy, Rule, SandboxError, SandboxMode};

/// Stage 2: restricts the process, with all its threads, to the system calls of `policy`. Any
/// other system call kills it with SIGSYS ([`SandboxMode::Enforce`]). Sets no_new_privs.
///
/// Afterwards the process cannot start threads, and it must not call functions of the standard
/// library that open files (`available_parallelism`, `File::metadata`, the local time zone). A
/// panic still prints its message and aborts; with RUST_BACKTRACE set, the backtrace opens
/// files and the process is killed by SIGSYS.
///
/// # Errors
/// [`Policy::check`] refuses the policy, or the kernel rejects the filter. No filter is
/// installed then.
pub fn seal(policy: &Policy, mode: SandboxMode) -> Result<(), SandboxError> {
    let default_action = match mode {
        SandboxMode::Enforce => SeccompAction::KillProcess,
        SandboxMode::Log => SeccompAction::Log,
        SandboxMode::Off => return Ok(()),
    };
    let program = compile(policy, default_action)?;
    keep_malloc_off_files();
    apply_filter_all_threads(&program).map_err(SandboxError::Seccomp)
}

impl Policy {
    /// Checks that the policy compiles to a filter. Meant for a unit test beside each policy.
    ///
    /// # Errors
    /// [`SandboxError::DuplicateRule`] or [`SandboxError::Filter`].
    pub fn check(&self) -> Result<(), SandboxError> {
        compile(self, SeccompAction::KillProcess).map(drop)
    }
}

fn compile(policy: &Policy, default_action: SeccompAction) -> Result<BpfProgram, SandboxError> {
    let process = policy.process;
    let filter_error = |cause| SandboxError::Filter { process, cause };
    let mut rules = BTreeMap::new();
    for rule in policy.syscalls.iter().copied().flatten() {
        let alternatives = alternatives(rule).map_err(filter_error)?;
        if rules.insert(rule.syscall, alternatives).is_some() {
            let syscall = rule.syscall;
            return Err(SandboxError::DuplicateRule { process, syscall });
        }
    }
    // The compiled filter first checks the architecture, which excludes 32-bit system calls.
    // System calls of the x32 ABI have different numbers.
    SeccompFilter::new(
        rules,
        default_action,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )
    .and_then(BpfProgram::try_from)
    .map_err(filter_error)
}

/// Returns the alternatives of a rule: the filter compiler combines the conditions of one
/// rule with "and", and several rules for a system call with "or". An empty list means that
/// there is no condition.
fn alternatives(rule: &Rule) -> Result<Vec<SeccompRule>, BackendError> {
    let mut alternatives: Vec<Vec<SeccompCondition>> = vec![vec![]];
    for check in rule.when {
        let choices = choices(*check)?;
        alternatives = alternatives
            .iter()
            .flat_map(|conditions| {
                choices
                    .iter()
                    .map(|choice| conditions.iter().chain([choice]).cloned().collect())
            })
            .collect();
    }
    if rule.when.is_empty() {
        return Ok(vec![]);
    }
    if alternatives.is_empty() {
        // An empty `OneOf`. The compiler would treat it as a rule without conditions.
        return Err(BackendError::EmptyRule);
    }
    alternatives.into_iter().map(SeccompRule::new).collect()
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

/// Keeps glibc's allocator from opening files, for which a sealed process would be killed. It
/// opens `/proc/sys/vm/overcommit_memory` when it first shrinks a thread's arena and, up to
/// version 2.34, `/sys/devices/system/cpu/online` to determine the number of arenas. So set
/// the number of arenas, and never shrink one.
#[cfg(target_env = "gnu")]
fn keep_malloc_off_files() {
    const ARENAS: libc::c_int = 8;
    // Setting either threshold stops the automatic growth of this one, which starts at
    // 128 KiB. Without a higher value, each larger buffer would be mapped and unmapped.
    const MMAP_THRESHOLD: libc::c_int = 4 << 20;
    for (parameter, value) in [
        (libc::M_ARENA_MAX, ARENAS),
        (libc::M_TRIM_THRESHOLD, libc::c_int::MAX),
        (libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD),
    ] {
        // SAFETY: mallopt(3) takes any values and changes them under the allocator's lock.
        unsafe { libc::mallopt(parameter, value) };
    }
}

#[cfg(not(target_env = "gnu"))]
fn keep_malloc_off_files() {}
