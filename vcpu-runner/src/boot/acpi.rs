//! ACPI tables (ACPI 6.5) for CPUs, PCI, power-off and reset. The platform process emulates
//! the registers for the last two.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Memory32Fixed, Name, Package, Path,
    ResourceTemplate, Scope, ZERO,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress};

use crate::Error;
use crate::layout::{self, INTX_COUNT, INTX_FIRST};
use crate::vm::memory::GuestRam;

const OEM: [u8; 6] = *b"OUTRIG";
const OEM_TABLE: [u8; 8] = *b"OUTRIGGR";
const OEM_REVISION: u32 = 1;
/// There are legacy devices and an i8042 (ACPI 6.5 table 5.11).
const BOOT_ARCH: u16 = 0b11;
/// The value that resets the machine when it is written to the reset register.
const RESET_VALUE: u8 = 6;
const IO_APIC_ID: u8 = 0;
const PCI_SLOTS: u32 = 32;

/// The bytes of one table.
#[derive(Default)]
struct TableBytes(Vec<u8>);

impl AmlSink for TableBytes {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut sink = TableBytes::default();
    aml.to_aml_bytes(&mut sink);
    sink.0
}

/// Writes tables one after the other into the ACPI area.
struct TableWriter<'a> {
    ram: &'a GuestRam,
    next: u64,
}

impl TableWriter<'_> {
    fn write(&mut self, table: &[u8]) -> Result<u64, Error> {
        let at = self.next;
        // The FACS must be aligned to 64 bytes; the others need less.
        self.next = (at + table.len() as u64).next_multiple_of(64);
        if self.next > layout::ACPI + layout::ACPI_SIZE {
            return Err(Error::BootSetup(format!(
                "the ACPI tables need more than {} bytes",
                layout::ACPI_SIZE
            )));
        }
        self.ram
            .memory()
            .write_slice(table, GuestAddress(at))
            .map_err(|e| Error::BootSetup(format!("ACPI tables: {e}")))?;
        Ok(at)
    }
}

/// Writes all tables for `cpus` vCPUs; returns the address of the RSDP.
///
/// # Errors
/// When the tables do not fit into their area.
pub fn write(ram: &GuestRam, cpus: usize) -> Result<u64, Error> {
    // The RSDP comes first, so that a scan of the BIOS area finds it quickly.
    let mut writer = TableWriter {
        ram,
        next: layout::ACPI + 64,
    };
    let dsdt = writer.write(&dsdt())?;
    let facs = writer.write(&bytes(&FACS::new()))?;
    let fadt = writer.write(&fadt(dsdt, facs))?;
    let madt = writer.write(&madt(cpus))?;
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM, 0, 0, 0);
    let mcfg = writer.write(&bytes(&mcfg))?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table);
    }
    let xsdt = writer.write(&bytes(&xsdt))?;
    writer.next = layout::ACPI;
    writer.write(&bytes(&Rsdp::new(OEM, xsdt)))
}

fn io_register(port: u16, bits: u8) -> GAS {
    let size = if bits == 8 {
        AccessSize::ByteAccess
    } else {
        AccessSize::WordAccess
    };
    GAS::new(GasSpace::SystemIo, bits, 0, size, port.into())
}

fn fadt(dsdt: u64, facs: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .firmware_ctrl_32(facs as u32)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.dsdt = (dsdt as u32).into();
    fadt.sci_int = u16::from(layout::SCI).into();
    fadt.pm1a_evt_blk = u32::from(layout::PM1_EVENT).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = u32::from(layout::PM1_CONTROL).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_evt_blk = io_register(layout::PM1_EVENT, 32);
    fadt.x_pm1a_cnt_blk = io_register(layout::PM1_CONTROL, 16);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = io_register(layout::RESET_CONTROL, 8);
    fadt.reset_value = RESET_VALUE;
    bytes(&fadt.finalize())
}

/// Interrupt source override of the SCI: level-triggered, active high (ACPI 6.5
/// section 5.2.12.5). Crate acpi_tables has no structure for it.
#[derive(Clone, Copy, zerocopy::IntoBytes, zerocopy::Immutable)]
#[repr(C, packed)]
struct SciOverride([u8; 10]);

impl Aml for SciOverride {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn madt(cpus: usize) -> Vec<u8> {
    let address = LocalInterruptController::Address(layout::LAPIC);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, address);
    for id in 0..cpus as u8 {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(IO_APIC_ID, layout::IOAPIC, 0));
    let flags = 0b1101; // level, active high
    madt.add_structure(SciOverride([
        2,
        10,
        0,
        layout::SCI,
        layout::SCI,
        0,
        0,
        0,
        flags,
        0,
    ]));
    bytes(&madt)
}

fn dsdt() -> Vec<u8> {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, OEM_REVISION);
    let body = [pci_root(), power_states()].concat();
    dsdt.append_slice(&body);
    dsdt.as_slice().to_vec()
}

/// `_S5`: sleep type 0 for the PM1a control register (soft off).
fn power_states() -> Vec<u8> {
    let package = Package::new(vec![&ZERO, &ZERO, &ZERO, &ZERO]);
    bytes(&Name::new(Path::new("_S5_"), &package))
}

/// The PCI host bridge with its windows and interrupt lines.
fn pci_root() -> Vec<u8> {
    let window_end = (layout::PCI_WINDOW + layout::PCI_WINDOW_SIZE - 1) as u32;
    let bus = AddressSpace::new_bus_number(0u16, 0u16);
    let config = IO::new(layout::PCI_CONFIG_ADDRESS, layout::PCI_CONFIG_ADDRESS, 1, 8);
    let window = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        layout::PCI_WINDOW as u32,
        window_end,
        None,
    );
    let windows = ResourceTemplate::new(vec![&bus, &config, &window]);

    // INTA of PCI slot n is I/O APIC input INTX_FIRST + n % INTX_COUNT. Slots with one
    // function use INTA only.
    let lines: Vec<(u32, u32)> = (0..PCI_SLOTS)
        .map(|slot| (slot << 16 | 0xffff, INTX_FIRST + slot % INTX_COUNT))
        .collect();
    let entries: Vec<Package> = lines
        .iter()
        .map(|(address, line)| Package::new(vec![address, &ZERO, &ZERO, line]))
        .collect();
    let routing = Package::new(entries.iter().map(|e| e as &dyn Aml).collect());

    let (pci_express, pci) = (EISAName::new("PNP0A08"), EISAName::new("PNP0A03"));
    let root = [
        Name::new(Path::new("_HID"), &pci_express),
        Name::new(Path::new("_CID"), &pci),
        Name::new(Path::new("_UID"), &ZERO),
        Name::new(Path::new("_CRS"), &windows),
        Name::new(Path::new("_PRT"), &routing),
    ];
    let root = Device::new(
        Path::new("PCI0"),
        root.iter().map(|n| n as &dyn Aml).collect(),
    );
    // Linux uses the ECAM only if a motherboard resource covers it.
    let ecam = Memory32Fixed::new(true, layout::ECAM as u32, layout::ECAM_SIZE as u32);
    let resources = ResourceTemplate::new(vec![&ecam]);
    let id = EISAName::new("PNP0C02");
    let (hid, crs) = (
        Name::new(Path::new("_HID"), &id),
        Name::new(Path::new("_CRS"), &resources),
    );
    let motherboard = Device::new(Path::new("MBRD"), vec![&hid, &crs]);
    bytes(&Scope::new(Path::new("_SB_"), vec![&root, &motherboard]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checksum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, &b| sum.wrapping_add(b))
    }

    #[test]
    fn every_table_is_reachable_and_has_a_valid_checksum() {
        let ram = GuestRam::new("64M".parse().unwrap()).unwrap();
        let rsdp = write(&ram, 3).unwrap();
        assert_eq!(rsdp, layout::ACPI);
        let memory = ram.memory();
        let read = |at: u64, len: usize| {
            let mut bytes = vec![0; len];
            memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
            bytes
        };
        let table_at = |at: u64| {
            let len = u32::from_le_bytes(read(at + 4, 4).try_into().unwrap());
            read(at, len as usize)
        };
        let pointer = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
        let rsdp = read(rsdp, 36);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!(checksum(&rsdp[..20]), 0);
        let xsdt = table_at(pointer(&rsdp[24..32]));
        assert_eq!((&xsdt[..4], checksum(&xsdt)), (&b"XSDT"[..], 0));
        let mut names = Vec::new();
        for entry in xsdt[36..].chunks(8) {
            let table = table_at(pointer(entry));
            assert_eq!(checksum(&table), 0);
            names.push(String::from_utf8(table[..4].to_vec()).unwrap());
            if &table[..4] == b"FACP" {
                let dsdt = table_at(pointer(&table[140..148]));
                assert_eq!((&dsdt[..4], checksum(&dsdt)), (&b"DSDT"[..], 0));
            }
            if &table[..4] == b"APIC" {
                let cpus = table[44..].chunks(8).take_while(|c| c[0] == 0).count();
                assert_eq!(cpus, 3);
            }
        }
        assert_eq!(names, ["FACP", "APIC", "MCFG"]);
    }
}
