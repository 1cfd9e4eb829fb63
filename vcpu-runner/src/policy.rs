//! The seccomp policy of the runner once it is set up. The runner stays in the namespaces
//! of the host, because it connects to sockets by path again. Its sandbox is therefore this
//! policy and no_new_privs.

use outrigger_sandbox::{BASE, Check, Policy, Rule, SOCKET};

// Requests of linux/kvm.h. Crate kvm-ioctls does not export their numbers.
const KVM_RUN: u32 = 0xae80;
const KVM_IRQFD: u32 = 0x4020_ae76;
const KVM_IOEVENTFD: u32 = 0x4040_ae79;
const KVM_IRQ_LINE: u32 = 0x4008_ae61;
const KVM_SET_GSI_ROUTING: u32 = 0x4008_ae6a;
const KVM_SET_IRQCHIP: u32 = 0x8208_ae63;
const KVM_SET_PIT2: u32 = 0x4070_aea0;
const KVM_GET_REGS: u32 = 0x8090_ae81;
const KVM_SET_REGS: u32 = 0x4090_ae82;
const KVM_GET_SREGS: u32 = 0x8138_ae83;
const KVM_SET_SREGS: u32 = 0x4138_ae84;
const KVM_TRANSLATE: u32 = 0xc018_ae85;
const KVM_SET_MSRS: u32 = 0x4008_ae89;
const KVM_SET_FPU: u32 = 0x41a0_ae8d;
const KVM_SET_LAPIC: u32 = 0x4400_ae8f;
const KVM_SET_MP_STATE: u32 = 0x4004_ae99;
const KVM_SET_VCPU_EVENTS: u32 = 0x4040_aea0;
const KVM_SET_DEBUGREGS: u32 = 0x4080_aea2;

const RUNNER: &[Rule] = &[
    Rule::when(
        libc::SYS_ioctl,
        &[Check::OneOf(
            1,
            &[
                KVM_RUN,
                KVM_IRQFD,
                KVM_SET_GSI_ROUTING,
                KVM_IOEVENTFD,
                KVM_IRQ_LINE,
                // For a reset, and for the registers of a vCPU that cannot continue.
                KVM_SET_IRQCHIP,
                KVM_SET_PIT2,
                KVM_GET_REGS,
                KVM_TRANSLATE,
                KVM_SET_REGS,
                KVM_GET_SREGS,
                KVM_SET_SREGS,
                KVM_SET_MSRS,
                KVM_SET_FPU,
                KVM_SET_LAPIC,
                KVM_SET_MP_STATE,
                KVM_SET_VCPU_EVENTS,
                KVM_SET_DEBUGREGS,
            ],
        )],
    ),
    // A reset reads the kernel and initrd again, and clears RAM.
    Rule::any(libc::SYS_pread64),
    // The region of a queue in an in-flight table is cleared.
    Rule::any(libc::SYS_pwrite64),
    Rule::any(libc::SYS_lseek),
    Rule::any(libc::SYS_fstat),
    Rule::any(libc::SYS_fallocate),
    // Connecting to a device process again, by path.
    Rule::when(
        libc::SYS_socket,
        &[Check::OneOf(0, &[libc::AF_UNIX as u32])],
    ),
    Rule::any(libc::SYS_connect),
    // The back-end channel of a new connection.
    Rule::when(
        libc::SYS_socketpair,
        &[Check::OneOf(0, &[libc::AF_UNIX as u32])],
    ),
    // Reading an eventfd without blocking.
    Rule::any(libc::SYS_preadv2),
    // Clients of the control socket.
    Rule::any(libc::SYS_accept4),
    // The signal thread.
    Rule::any(libc::SYS_rt_sigtimedwait),
];

/// Removing the control socket at the end, if it is still the same one. Only for a process
/// that Landlock keeps from removing files elsewhere.
const SOCKET_REMOVAL: &[Rule] = &[
    Rule::any(libc::SYS_newfstatat),
    Rule::when(libc::SYS_unlinkat, &[Check::OneOf(2, &[0])]),
];

/// The policy; `may_remove_socket`: the control socket is removed at the end.
pub fn policy(may_remove_socket: bool) -> Policy {
    Policy {
        process: "vcpu-runner",
        syscalls: if may_remove_socket {
            &[BASE, SOCKET, RUNNER, SOCKET_REMOVAL]
        } else {
            &[BASE, SOCKET, RUNNER]
        },
        keep_network: true,
        max_files: 0,
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_policy_compiles_to_a_filter() {
        super::policy(false).check().unwrap();
        super::policy(true).check().unwrap();
    }
}
