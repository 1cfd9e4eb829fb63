//! The registers of a vCPU at power-on, which a reset restores.

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_fpu, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events,
};
use kvm_ioctls::{Cap, VcpuFd};

use crate::Error;
use crate::boot::{EntryPoint, registers};
use crate::vm::Vm;
use crate::vm::memory::GuestRam;

/// MSR IA32_MISC_ENABLE and its bit for fast string operations.
const MISC_ENABLE: (u32, u64) = (0x1a0, 1);
/// MSR IA32_MTRR_DEF_TYPE: enabled, write-back everywhere.
const MTRR_DEF_TYPE: (u32, u64) = (0x2ff, 1 << 11 | 6);
/// Local vector table entries of the local APIC, offsets in bytes.
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
/// Delivery modes: ExtINT (the vector comes from the PIC) and NMI.
const EXTINT: u32 = 7 << 8;
const NMI: u32 = 4 << 8;

/// All state that a reset restores.
pub struct PowerOnState {
    sregs: kvm_sregs,
    fpu: kvm_fpu,
    lapic: kvm_lapic_state,
    mp_state: kvm_mp_state,
    events: kvm_vcpu_events,
    debug: Option<kvm_debugregs>,
    msrs: Vec<kvm_msr_entry>,
}

impl PowerOnState {
    /// Reads the registers of a vCPU that has never run.
    ///
    /// # Errors
    /// When a KVM ioctl fails.
    pub fn capture(vm: &Vm, fd: &VcpuFd, index: usize) -> Result<Self, Error> {
        let what = |ioctl: &str| Error::kvm(format!("vCPU {index}: {ioctl}"));
        let mut lapic = fd.get_lapic().map_err(what("KVM_GET_LAPIC"))?;
        // What firmware does: interrupts of the PIC reach the first CPU until the guest sets
        // up its local APIC.
        set_lapic_register(&mut lapic, LVT_LINT0, EXTINT);
        set_lapic_register(&mut lapic, LVT_LINT1, NMI);
        let debug = vm.kvm().check_extension(Cap::Debugregs);
        Ok(PowerOnState {
            sregs: fd.get_sregs().map_err(what("KVM_GET_SREGS"))?,
            fpu: fd.get_fpu().map_err(what("KVM_GET_FPU"))?,
            lapic,
            mp_state: fd.get_mp_state().map_err(what("KVM_GET_MP_STATE"))?,
            events: fd.get_vcpu_events().map_err(what("KVM_GET_VCPU_EVENTS"))?,
            debug: debug.then(|| fd.get_debug_regs().ok()).flatten(),
            msrs: read_msrs(vm, fd)?,
        })
    }

    /// Sets all registers. The first vCPU starts at `entry`; the others wait until it
    /// starts them.
    ///
    /// # Errors
    /// When a KVM ioctl fails, or the tables at `entry` cannot be written.
    pub fn apply(
        &self,
        fd: &VcpuFd,
        index: usize,
        entry: EntryPoint,
        ram: &GuestRam,
    ) -> Result<(), Error> {
        let what = |ioctl: &str| Error::kvm(format!("vCPU {index}: {ioctl}"));
        let mut sregs = self.sregs;
        let mut regs = kvm_regs {
            rflags: 2,
            ..Default::default()
        };
        if index == 0 {
            registers::special(entry, ram, &mut sregs)?;
            regs = registers::general(entry);
        }
        fd.set_mp_state(self.mp_state)
            .map_err(what("KVM_SET_MP_STATE"))?;
        fd.set_sregs(&sregs).map_err(what("KVM_SET_SREGS"))?;
        fd.set_regs(&regs).map_err(what("KVM_SET_REGS"))?;
        fd.set_fpu(&self.fpu).map_err(what("KVM_SET_FPU"))?;
        fd.set_lapic(&self.lapic).map_err(what("KVM_SET_LAPIC"))?;
        fd.set_vcpu_events(&self.events)
            .map_err(what("KVM_SET_VCPU_EVENTS"))?;
        if let Some(debug) = &self.debug {
            fd.set_debug_regs(debug)
                .map_err(what("KVM_SET_DEBUGREGS"))?;
        }
        write_msrs(fd, &self.msrs);
        Ok(())
    }
}

fn set_lapic_register(lapic: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (place, byte) in lapic.regs[offset..].iter_mut().zip(value.to_le_bytes()) {
        *place = byte as _;
    }
}

/// All MSRs that KVM can save, and the two that firmware sets.
fn read_msrs(vm: &Vm, fd: &VcpuFd) -> Result<Vec<kvm_msr_entry>, Error> {
    let list = vm
        .kvm()
        .get_msr_index_list()
        .map_err(Error::kvm("KVM_GET_MSR_INDEX_LIST"))?;
    let entries: Vec<_> = list
        .as_slice()
        .iter()
        .map(|&index| kvm_msr_entry {
            index,
            ..Default::default()
        })
        .collect();
    let mut values = Vec::with_capacity(entries.len() + 2);
    let mut rest = &entries[..];
    // KVM stops at the first MSR that it cannot read: continue behind it.
    while !rest.is_empty() {
        let Ok(mut msrs) = Msrs::from_entries(rest) else {
            break;
        };
        let count = fd.get_msrs(&mut msrs).unwrap_or(0);
        values.extend_from_slice(&msrs.as_slice()[..count]);
        rest = rest.get(count + 1..).unwrap_or_default();
    }
    for (index, data) in [MISC_ENABLE, MTRR_DEF_TYPE] {
        values.retain(|msr| msr.index != index);
        values.push(kvm_msr_entry {
            index,
            data,
            ..Default::default()
        });
    }
    Ok(values)
}

/// Writes the MSRs that this host lets a program set. Hosts differ in that, and the guest
/// runs without the others.
fn write_msrs(fd: &VcpuFd, mut rest: &[kvm_msr_entry]) {
    while !rest.is_empty() {
        let Ok(msrs) = Msrs::from_entries(rest) else {
            return;
        };
        let count = fd.set_msrs(&msrs).unwrap_or(0);
        if let Some(msr) = rest.get(count) {
            tracing::debug!(
                msr = format_args!("{:#x}", msr.index),
                "the host does not set an MSR"
            );
        }
        rest = rest.get(count + 1..).unwrap_or_default();
    }
}
