//! Translates a KVM exit into the action that it asks for (KVM API documentation, section
//! 5, "The kvm_run structure").

use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_EXCEPTION, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_IN, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MMIO,
    KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT, KVM_INTERNAL_ERROR_DELIVERY_EV,
    KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run,
};

/// The action that an exit asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum VcpuExit<'a> {
    /// Fill `data` from `port`, `size` bytes at a time.
    PortRead {
        /// Port number.
        port: u16,
        /// 1, 2 or 4 bytes.
        size: usize,
        /// One item or, for a string instruction, several.
        data: &'a mut [u8],
    },
    /// Write `data` to `port`, `size` bytes at a time.
    PortWrite {
        /// Port number.
        port: u16,
        /// 1, 2 or 4 bytes.
        size: usize,
        /// One item or several.
        data: &'a [u8],
    },
    /// Fill `data` from an address that is not RAM.
    MemoryRead {
        /// Guest-physical address.
        address: u64,
        /// 1 to 8 bytes.
        data: &'a mut [u8],
    },
    /// Write `data` to an address that is not RAM.
    MemoryWrite {
        /// Guest-physical address.
        address: u64,
        /// 1 to 8 bytes.
        data: &'a [u8],
    },
    /// None: run again.
    Again,
    /// A triple fault.
    Shutdown,
    /// Power off.
    PowerOff,
    /// Reset.
    Reset,
    /// This vCPU cannot continue, and why.
    Fatal(String),
}

/// Decodes the exit in `run`.
pub fn decode(run: &mut kvm_run) -> VcpuExit<'_> {
    match run.exit_reason {
        KVM_EXIT_IO => port(run),
        KVM_EXIT_MMIO => memory(run),
        KVM_EXIT_INTR | KVM_EXIT_IRQ_WINDOW_OPEN | KVM_EXIT_HLT => VcpuExit::Again,
        KVM_EXIT_SHUTDOWN => VcpuExit::Shutdown,
        KVM_EXIT_SYSTEM_EVENT => {
            // SAFETY: the exit reason says that this member is the valid one.
            let event = unsafe { run.__bindgen_anon_1.system_event.type_ };
            match event {
                KVM_SYSTEM_EVENT_SHUTDOWN => VcpuExit::PowerOff,
                KVM_SYSTEM_EVENT_RESET => VcpuExit::Reset,
                KVM_SYSTEM_EVENT_CRASH => VcpuExit::Fatal("the guest crashed".into()),
                other => VcpuExit::Fatal(format!("unknown system event {other}")),
            }
        }
        KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: as above.
            let entry = unsafe { run.__bindgen_anon_1.fail_entry };
            VcpuExit::Fatal(format!(
                "the hardware refuses to enter the guest, reason {:#x} on CPU {}: the host's \
                 processor does not accept the values of the guest's registers",
                entry.hardware_entry_failure_reason, entry.cpu
            ))
        }
        KVM_EXIT_INTERNAL_ERROR => {
            // SAFETY: as above.
            VcpuExit::Fatal(internal_error(
                unsafe { run.__bindgen_anon_1.internal }.suberror,
            ))
        }
        KVM_EXIT_EXCEPTION | KVM_EXIT_DEBUG => VcpuExit::Fatal("unexpected debug exit".into()),
        other => VcpuExit::Fatal(format!("unknown exit reason {other}")),
    }
}

/// What a KVM internal error means.
fn internal_error(suberror: u32) -> String {
    let why = match suberror {
        KVM_INTERNAL_ERROR_EMULATION => {
            "the instruction emulator of this host's KVM does not know the instruction at rip, \
             and on a host with KVM-PVM all guest kernel code goes through it"
        }
        KVM_INTERNAL_ERROR_SIMUL_EX => {
            "an exception occurred while another one was being delivered"
        }
        KVM_INTERNAL_ERROR_DELIVERY_EV => {
            "this host's KVM cannot deliver an interrupt or exception whose handler or stack is \
             no ordinary memory"
        }
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
            "the processor left the guest for a reason that this host's KVM does not know"
        }
        _ => "this host's KVM does not say more",
    };
    format!("KVM internal error, suberror {suberror}: {why}")
}

fn port(run: &mut kvm_run) -> VcpuExit<'_> {
    // SAFETY: the caller saw KVM_EXIT_IO, so this member is the valid one.
    let io = unsafe { run.__bindgen_anon_1.io };
    let size = usize::from(io.size);
    let len = size * io.count as usize;
    let area = std::ptr::from_mut(run).cast::<u8>();
    // SAFETY: KVM puts the data into the same mapping, one page after the
    // structure, and never more than a page of it.
    let data = unsafe { std::slice::from_raw_parts_mut(area.add(io.data_offset as usize), len) };
    if u32::from(io.direction) == KVM_EXIT_IO_IN {
        VcpuExit::PortRead {
            port: io.port,
            size,
            data,
        }
    } else {
        VcpuExit::PortWrite {
            port: io.port,
            size,
            data,
        }
    }
}

fn memory(run: &mut kvm_run) -> VcpuExit<'_> {
    // SAFETY: the caller saw KVM_EXIT_MMIO, so this member is the valid one.
    let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
    let len = (mmio.len as usize).min(mmio.data.len());
    let (address, data) = (mmio.phys_addr, &mut mmio.data[..len]);
    if mmio.is_write != 0 {
        VcpuExit::MemoryWrite { address, data }
    } else {
        VcpuExit::MemoryRead { address, data }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(reason: u32) -> kvm_run {
        kvm_run {
            exit_reason: reason,
            ..Default::default()
        }
    }

    #[test]
    fn memory_accesses_are_decoded() {
        let mut run = run(KVM_EXIT_MMIO);
        run.__bindgen_anon_1.mmio.phys_addr = 0xc000_0014;
        run.__bindgen_anon_1.mmio.len = 1;
        run.__bindgen_anon_1.mmio.is_write = 1;
        run.__bindgen_anon_1.mmio.data = [7, 0, 0, 0, 0, 0, 0, 0];
        let expected = VcpuExit::MemoryWrite {
            address: 0xc000_0014,
            data: &[7],
        };
        assert_eq!(decode(&mut run), expected);
        run.__bindgen_anon_1.mmio.is_write = 0;
        assert!(matches!(decode(&mut run), VcpuExit::MemoryRead { data, .. } if data.len() == 1));
    }

    #[test]
    fn port_accesses_are_decoded_with_all_items() {
        #[repr(C)]
        struct RunArea {
            run: kvm_run,
            data: [u8; 8],
        }
        let mut area = RunArea {
            run: run(KVM_EXIT_IO),
            data: [1, 2, 3, 4, 5, 6, 7, 8],
        };
        // SAFETY: an integer-only union member, written before it is read.
        let io = unsafe { &mut area.run.__bindgen_anon_1.io };
        (io.port, io.size, io.count, io.direction) = (0x3f8, 2, 3, 1);
        io.data_offset = std::mem::offset_of!(RunArea, data) as u64;
        // The slice extends beyond `run`, as it does in KVM's mapping.
        let pointer = &raw mut area;
        // SAFETY: the area outlives the reference and nothing else uses it.
        let run = unsafe { &mut *pointer.cast::<kvm_run>() };
        let expected = VcpuExit::PortWrite {
            port: 0x3f8,
            size: 2,
            data: &[1, 2, 3, 4, 5, 6],
        };
        assert_eq!(decode(run), expected);
    }

    #[test]
    fn exits_that_end_the_run_are_distinguished() {
        assert_eq!(decode(&mut run(KVM_EXIT_INTR)), VcpuExit::Again);
        assert_eq!(decode(&mut run(KVM_EXIT_SHUTDOWN)), VcpuExit::Shutdown);
        let mut event = run(KVM_EXIT_SYSTEM_EVENT);
        event.__bindgen_anon_1.system_event.type_ = KVM_SYSTEM_EVENT_RESET;
        assert_eq!(decode(&mut event), VcpuExit::Reset);
        assert!(matches!(decode(&mut run(12345)), VcpuExit::Fatal(_)));
        assert!(matches!(
            decode(&mut run(KVM_EXIT_INTERNAL_ERROR)),
            VcpuExit::Fatal(_)
        ));
    }

    #[test]
    fn kvm_failures_are_explained() {
        let text = |run: &mut kvm_run| match decode(run) {
            VcpuExit::Fatal(why) => why,
            other => panic!("{other:?}"),
        };
        for (suberror, words) in [(1, "emulator"), (3, "deliver"), (99, "suberror 99")] {
            let mut run = run(KVM_EXIT_INTERNAL_ERROR);
            run.__bindgen_anon_1.internal.suberror = suberror;
            assert!(text(&mut run).contains(words));
        }
        let mut run = run(KVM_EXIT_FAIL_ENTRY);
        run.__bindgen_anon_1
            .fail_entry
            .hardware_entry_failure_reason = 0x8000_0021;
        run.__bindgen_anon_1.fail_entry.cpu = 3;
        assert!(text(&mut run).contains("reason 0x80000021 on CPU 3"));
    }
}
