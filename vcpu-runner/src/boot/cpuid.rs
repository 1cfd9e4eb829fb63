//! The CPUID leaves of the vCPUs: all features that KVM supports, and the number and
//! topology of each vCPU.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::Kvm;

use crate::Error;

/// All that KVM supports.
///
/// # Errors
/// When KVM_GET_SUPPORTED_CPUID fails.
pub fn supported(kvm: &Kvm) -> Result<CpuId, Error> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(Error::kvm("KVM_GET_SUPPORTED_CPUID"))
}

/// The leaves of vCPU `index` of `count`.
pub fn for_vcpu(supported: &CpuId, index: usize, count: usize) -> CpuId {
    let mut cpuid = supported.clone();
    let (apic_id, count) = (index as u32, count as u32);
    // Bits of an APIC ID that number the cores of a package; there is one package.
    let bits = count.next_power_of_two().trailing_zeros();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => {
                entry.ebx = (entry.ebx & 0x0000_ffff) | apic_id << 24 | count << 16;
                entry.ecx |= HYPERVISOR | TSC_DEADLINE;
                entry.edx = set(entry.edx, HTT, count > 1);
            }
            // Caches: how many cores share this one, and how many are in the package.
            4 => {
                let sharing = if entry.eax >> 5 & 7 < 3 { 0 } else { count - 1 };
                entry.eax = (entry.eax & 0x3fff) | sharing << 14 | (count - 1) << 26;
            }
            // Topology: level 0 is a core with one thread, level 1 is the package.
            0xb | 0x1f => {
                entry.edx = apic_id;
                match entry.index {
                    0 => (entry.eax, entry.ebx, entry.ecx) = (0, 1, 1 << 8),
                    1 => (entry.eax, entry.ebx, entry.ecx) = (bits, count, 2 << 8 | 1),
                    _ => (entry.eax, entry.ebx, entry.ecx) = (0, 0, entry.index),
                }
            }
            // AMD: number of cores and of APIC ID bits.
            0x8000_0008 => entry.ecx = bits << 12 | (count - 1),
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (apic_id, apic_id, 0),
            _ => {}
        }
    }
    cpuid
}

const HYPERVISOR: u32 = 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
const HTT: u32 = 1 << 28;

fn set(word: u32, bit: u32, on: bool) -> u32 {
    if on { word | bit } else { word & !bit }
}
