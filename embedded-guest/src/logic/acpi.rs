//! From the ACPI root pointer to the PCI configuration area (ACPI 6.5, chapter 5.2;
//! PCI Firmware 3.3, 4.1.2).

/// Where ECAM configuration space of segment 0 starting at bus 0 is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ecam {
    /// Physical address of bus 0, device 0, function 0.
    pub base: u64,
    /// The last bus it covers.
    pub last_bus: u8,
}

/// Follows RSDP, XSDT or RSDT, and MCFG. `read` gives the bytes at a physical
/// address, or `None` where nothing can be read. Tables with a wrong checksum are
/// passed over.
pub fn find_ecam<'a>(rsdp: u64, read: impl Fn(u64, usize) -> Option<&'a [u8]>) -> Option<Ecam> {
    let root = read(rsdp, 20)?;
    if !root.starts_with(b"RSD PTR ") || sum(root) != 0 {
        return None;
    }
    let extended = match root[15] {
        0 => 0,
        _ => u64::from_le_bytes(read(rsdp + 24, 8)?.try_into().ok()?),
    };
    let (list, width) = match extended {
        0 => (u64::from(long(root, 16)?), 4),
        address => (address, 8),
    };
    table(list, &read)?
        .get(36..)?
        .chunks_exact(width)
        .filter_map(|entry| {
            let mut address = [0; 8];
            address[..width].copy_from_slice(entry);
            table(u64::from_le_bytes(address), &read)
        })
        .find(|table| table.starts_with(b"MCFG"))
        .and_then(parse_mcfg)
}

/// The whole table at `address`.
fn table<'a>(address: u64, read: &impl Fn(u64, usize) -> Option<&'a [u8]>) -> Option<&'a [u8]> {
    let length = long(read(address, 36)?, 4)?;
    let table = read(address, length as usize)?;
    (table.len() >= 36 && sum(table) == 0).then_some(table)
}

/// The entry of segment 0 and bus 0 in an MCFG table.
fn parse_mcfg(table: &[u8]) -> Option<Ecam> {
    table.get(44..)?.chunks_exact(16).find_map(|entry| {
        let segment_and_first_bus = (entry[8], entry[9], entry[10]);
        (segment_and_first_bus == (0, 0, 0)).then(|| Ecam {
            base: u64::from(long(entry, 0).unwrap_or(0))
                | u64::from(long(entry, 4).unwrap_or(0)) << 32,
            last_bus: entry[11],
        })
    })
}

fn long(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_le_bytes(
        bytes.get(offset..offset + 4)?.try_into().ok()?,
    ))
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finished(mut table: Vec<u8>) -> Vec<u8> {
        let length = table.len() as u32;
        table[4..8].copy_from_slice(&length.to_le_bytes());
        table[9] = 0u8.wrapping_sub(sum(&table));
        table
    }

    fn header(signature: &[u8; 4]) -> Vec<u8> {
        let mut table = signature.to_vec();
        table.resize(36, 0);
        table
    }

    /// Root pointer at 0, list at 0x40, FADT at 0x80, MCFG at 0xc0.
    fn memory(revision: u8) -> Vec<u8> {
        let mut root = b"RSD PTR ".to_vec();
        root.resize(36, 0);
        root[15] = revision;
        let mut list = header(if revision == 0 { b"RSDT" } else { b"XSDT" });
        for address in [0x80u64, 0xc0] {
            list.extend(&address.to_le_bytes()[..if revision == 0 { 4 } else { 8 }]);
        }
        match revision {
            0 => root[16..20].copy_from_slice(&0x40u32.to_le_bytes()),
            _ => root[24..32].copy_from_slice(&0x40u64.to_le_bytes()),
        }
        root[8] = 0u8.wrapping_sub(sum(&root[..20]));
        let mut mcfg = header(b"MCFG");
        mcfg.resize(44, 0);
        mcfg.extend(0xe000_0000u64.to_le_bytes());
        mcfg.extend([0, 0, 0, 7, 0, 0, 0, 0]);
        let mut memory = vec![0; 0x200];
        for (at, bytes) in [
            (0, root),
            (0x40, finished(list)),
            (0x80, finished(header(b"FACP"))),
            (0xc0, finished(mcfg)),
        ] {
            memory[at..at + bytes.len()].copy_from_slice(&bytes);
        }
        memory
    }

    fn find(memory: &[u8]) -> Option<Ecam> {
        find_ecam(0, |address, length| {
            memory.get(address as usize..)?.get(..length)
        })
    }

    #[test]
    fn found_by_either_list() {
        let ecam = Some(Ecam {
            base: 0xe000_0000,
            last_bus: 7,
        });
        assert_eq!(find(&memory(0)), ecam);
        assert_eq!(find(&memory(2)), ecam);
    }

    #[test]
    fn nothing_is_found_in_damaged_tables() {
        for at in [0, 8, 0x41, 0x49, 0xc0, 0xc9] {
            let mut memory = memory(2);
            memory[at] ^= 1;
            assert_eq!(find(&memory), None, "byte {at:#x} changed");
        }
        for length in 0..0xfc {
            assert_eq!(find(&memory(2)[..length]), None, "cut to {length} bytes");
        }
    }
}
