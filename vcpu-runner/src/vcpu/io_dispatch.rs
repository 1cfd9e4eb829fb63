//! Dispatches the port and memory accesses of vCPUs: to the PCI bus, else over the trap
//! channel to the platform process, else to nothing.

use std::sync::Arc;

use outrigger_protocol::trap::{Access, Space};

use super::handle::VcpuHandle;
use crate::pci::bus::PciBus;
use crate::trap::TrapChannel;

/// What handles accesses.
pub struct IoDispatch {
    /// The PCI bus.
    pub bus: Arc<PciBus>,
    /// The channel to the platform process, if there is one.
    pub trap: Option<Arc<TrapChannel>>,
}

impl IoDispatch {
    /// `in` by vCPU `vcpu`: fills `data`, which is one item.
    pub fn read_port(&self, vcpu: usize, handle: &VcpuHandle, port: u16, data: &mut [u8]) {
        if !self.bus.read_port(port, data) {
            self.read(vcpu, handle, Space::Port, port.into(), data);
        }
    }

    /// `out` by vCPU `vcpu` of `data`, which is one item.
    pub fn write_port(&self, vcpu: usize, handle: &VcpuHandle, port: u16, data: &[u8]) {
        if !self.bus.write_port(port, data) {
            self.write(vcpu, handle, Space::Port, port.into(), data);
        }
    }

    /// A load from an address that is not RAM.
    pub fn read_memory(&self, vcpu: usize, handle: &VcpuHandle, address: u64, data: &mut [u8]) {
        if !self.bus.read_memory(address, data) {
            self.read(vcpu, handle, Space::Memory, address, data);
        }
    }

    /// A store to an address that is not RAM.
    pub fn write_memory(&self, vcpu: usize, handle: &VcpuHandle, address: u64, data: &[u8]) {
        if !self.bus.write_memory(address, data) {
            self.write(vcpu, handle, Space::Memory, address, data);
        }
    }

    fn read(&self, vcpu: usize, handle: &VcpuHandle, space: Space, address: u64, data: &mut [u8]) {
        let access = Access {
            space,
            address,
            size: data.len() as u8,
            write: None,
        };
        match self
            .trap
            .as_ref()
            .and_then(|t| t.read(vcpu, handle, &access))
        {
            Some(value) => {
                for (byte, part) in data.iter_mut().zip(value.to_le_bytes()) {
                    *byte = part;
                }
            }
            // As on hardware: no device drives the bus, so all bits read as 1.
            None => data.fill(0xff),
        }
    }

    fn write(&self, vcpu: usize, handle: &VcpuHandle, space: Space, address: u64, data: &[u8]) {
        let Some(trap) = &self.trap else { return };
        let mut value = [0; 8];
        for (byte, part) in value.iter_mut().zip(data) {
            *byte = *part;
        }
        trap.write(
            vcpu,
            handle,
            &Access {
                space,
                address,
                size: data.len() as u8,
                write: Some(u64::from_le_bytes(value)),
            },
        );
    }
}
