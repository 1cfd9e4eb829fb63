//! The capabilities of this host's KVM. CPU flags do not matter here: every /dev/kvm that
//! has the capabilities is good enough.

use std::io;

use kvm_ioctls::{Cap, Kvm};

use crate::Error;

/// KVM_GET_API_VERSION, since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// Path of the KVM device.
pub const DEVICE: &str = "/dev/kvm";

/// A capability of KVM, and what the runner uses it for.
pub struct KvmCapability {
    /// Its name in linux/kvm.h.
    pub name: &'static str,
    /// The capability.
    pub cap: Cap,
    /// What the runner uses it for.
    pub why: &'static str,
}

macro_rules! capabilities {
    ($($name:literal $cap:ident $why:literal),* $(,)?) => {
        &[$(KvmCapability { name: $name, cap: Cap::$cap, why: $why }),*]
    };
}

/// Guests cannot run without these.
pub const REQUIRED_CAPABILITIES: &[KvmCapability] = capabilities![
    "KVM_CAP_USER_MEMORY" UserMemory "guest RAM is shared with the device processes",
    "KVM_CAP_IRQCHIP" Irqchip "the kernel emulates the interrupt controllers",
    "KVM_CAP_PIT2" Pit2 "the kernel emulates the timer that guests boot with",
    "KVM_CAP_IRQ_ROUTING" IrqRouting "message-signalled interrupts need routes",
    "KVM_CAP_IRQFD" Irqfd "device processes raise interrupts by eventfd",
    "KVM_CAP_IOEVENTFD" Ioeventfd "doorbells go to device processes by eventfd",
    "KVM_CAP_IOEVENTFD_NO_LENGTH" IoeventfdNoLength "a driver may ring a doorbell by a write of any size",
    "KVM_CAP_IMMEDIATE_EXIT" ImmediateExit "a vCPU is interrupted without a race",
    "KVM_CAP_MP_STATE" MpState "the first vCPU starts the others",
    "KVM_CAP_EXT_CPUID" ExtCpuid "guests read the features of their CPU",
    "KVM_CAP_SET_TSS_ADDR" SetTssAddr "needed on Intel hosts",
    "KVM_CAP_SET_IDENTITY_MAP_ADDR" SetIdentityMapAddr "needed on Intel hosts",
];

/// The runner uses these if they exist.
pub const OPTIONAL_CAPABILITIES: &[KvmCapability] = capabilities![
    "KVM_CAP_DEBUGREGS" Debugregs "a reset clears the debug registers as well",
    "KVM_CAP_TSC_DEADLINE_TIMER" TscDeadlineTimer "guests have a precise timer on each vCPU",
    "KVM_CAP_NR_VCPUS" NrVcpus "how many vCPUs this host recommends",
    "KVM_CAP_MAX_VCPUS" MaxVcpus "how many vCPUs a guest can have here",
    "KVM_CAP_MAX_VCPU_ID" MaxVcpuId "how high their numbers can be",
];

/// Opens /dev/kvm and checks it.
///
/// # Errors
/// Says why the device cannot be used.
pub fn open() -> Result<Kvm, Error> {
    let kvm = Kvm::new().map_err(|e| Error::KvmOpen(io::Error::from_raw_os_error(e.errno())))?;
    check(&kvm)?;
    Ok(kvm)
}

/// Checks that `kvm` has the required capabilities.
///
/// # Errors
/// Names the first one that is missing, and what it is needed for.
pub fn check(kvm: &Kvm) -> Result<(), Error> {
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Err(Error::KvmVersion(version));
    }
    match REQUIRED_CAPABILITIES
        .iter()
        .find(|need| !kvm.check_extension(need.cap))
    {
        Some(&KvmCapability { name, why, .. }) => Err(Error::KvmCapability { name, why }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_capability_is_named_with_its_purpose() {
        for &KvmCapability { name, why, .. } in
            REQUIRED_CAPABILITIES.iter().chain(OPTIONAL_CAPABILITIES)
        {
            let text = Error::KvmCapability { name, why }.to_string();
            assert!(name.starts_with("KVM_CAP_"), "{text}");
            assert!(
                text.contains(name) && text.ends_with(why) && why.len() > 15,
                "{text}"
            );
        }
    }
}
