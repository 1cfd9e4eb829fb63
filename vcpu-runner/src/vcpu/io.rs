//! Where a vCPU's port and memory accesses go: to the PCI bus, else over the
//! trap channel to the platform process, else nowhere.

use std::sync::Arc;

use outrigger_protocol::trap::{Access, Space};

use super::state::Control;
use crate::pci::bus::Bus;
use crate::trap::TrapChannel;

/// Everything that answers accesses.
pub struct Io {
    /// The PCI bus.
    pub bus: Arc<Bus>,
    /// The way to the platform process, if there is one.
    pub trap: Option<Arc<TrapChannel>>,
}

impl Io {
    /// `in` by vCPU `vcpu`: fills `data`, one item.
    pub fn read_port(&self, vcpu: usize, control: &Control, port: u16, data: &mut [u8]) {
        if !self.bus.read_port(port, data) {
            self.read(vcpu, control, Space::Port, port.into(), data);
        }
    }

    /// `out` by vCPU `vcpu`: takes `data`, one item.
    pub fn write_port(&self, vcpu: usize, control: &Control, port: u16, data: &[u8]) {
        if !self.bus.write_port(port, data) {
            self.write(vcpu, control, Space::Port, port.into(), data);
        }
    }

    /// A load from memory that is not RAM.
    pub fn read_memory(&self, vcpu: usize, control: &Control, address: u64, data: &mut [u8]) {
        if !self.bus.read_memory(address, data) {
            self.read(vcpu, control, Space::Memory, address, data);
        }
    }

    /// A store to memory that is not RAM.
    pub fn write_memory(&self, vcpu: usize, control: &Control, address: u64, data: &[u8]) {
        if !self.bus.write_memory(address, data) {
            self.write(vcpu, control, Space::Memory, address, data);
        }
    }

    fn read(&self, vcpu: usize, control: &Control, space: Space, address: u64, data: &mut [u8]) {
        let access = Access {
            space,
            address,
            size: data.len() as u8,
            write: None,
        };
        match self
            .trap
            .as_ref()
            .and_then(|t| t.read(vcpu, control, &access))
        {
            Some(value) => {
                for (byte, part) in data.iter_mut().zip(value.to_le_bytes()) {
                    *byte = part;
                }
            }
            // As on real hardware: nobody pulls the lines low.
            None => data.fill(0xff),
        }
    }

    fn write(&self, vcpu: usize, control: &Control, space: Space, address: u64, data: &[u8]) {
        let Some(trap) = &self.trap else { return };
        let mut value = [0; 8];
        for (byte, part) in value.iter_mut().zip(data) {
            *byte = *part;
        }
        trap.write(
            vcpu,
            control,
            &Access {
                space,
                address,
                size: data.len() as u8,
                write: Some(u64::from_le_bytes(value)),
            },
        );
    }
}
