//! Flat images: files that are copied to guest memory as they are, and the mode to start
//! in. Memory holds nothing else, not even ACPI tables. This is for tests of processors
//! and for firmware.

use std::ops::Range;
use std::path::PathBuf;
use std::str::FromStr;

use super::entry::{CpuMode, EntryPoint};
use super::file::NamedFile;
use super::registers;
use crate::Error;
use crate::vm::memory::GuestRam;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// The first instruction of a PC: 16 bytes below the end of the BIOS area.
const RESET_VECTOR: u64 = 0xf_fff0;

/// `--load FILE@ADDR`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadSpec {
    /// The file.
    pub path: PathBuf,
    /// Guest-physical address of its first byte.
    pub address: u64,
}

impl FromStr for LoadSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.rsplit_once('@') {
            Some((path, at)) if !path.is_empty() => Ok(LoadSpec {
                path: path.into(),
                address: address(at)?,
            }),
            _ => Err("it is not FILE@ADDR, such as bios.bin@0xf0000".into()),
        }
    }
}

/// Parses an address: decimal, or hexadecimal with 0x.
fn address(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x").or(text.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| format!("{text:?} is not an address such as 0x100000 or 1048576"))
}

impl CpuMode {
    const ALL: [(&'static str, CpuMode); 3] = [
        ("real", CpuMode::Real),
        ("protected", CpuMode::Protected),
        ("long", CpuMode::Long),
    ];

    fn name(self) -> &'static str {
        Self::ALL.iter().find(|m| m.1 == self).map_or("", |m| m.0)
    }

    fn default_address(self) -> u64 {
        match self {
            CpuMode::Real => RESET_VECTOR,
            CpuMode::Protected | CpuMode::Long => MIB,
        }
    }

    /// First address that cannot be jumped to in this mode.
    fn end(self) -> u64 {
        match self {
            CpuMode::Real => MIB,
            CpuMode::Protected | CpuMode::Long => 4 * GIB,
        }
    }
}

/// `--entry MODE[=ADDR]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntrySpec {
    /// The mode.
    pub mode: CpuMode,
    /// Guest-physical address of the first instruction.
    pub address: u64,
}

impl Default for EntrySpec {
    /// The first instruction of a PC.
    fn default() -> Self {
        EntrySpec {
            mode: CpuMode::Real,
            address: RESET_VECTOR,
        }
    }
}

impl FromStr for EntrySpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, at) = match text.split_once('=') {
            Some((name, at)) => (name, Some(address(at)?)),
            None => (text, None),
        };
        let mode = CpuMode::ALL
            .iter()
            .find(|m| m.0 == name)
            .ok_or_else(|| format!("{name:?} is not one of real, protected, long"))?
            .1;
        let address = at.unwrap_or(mode.default_address());
        if address >= mode.end() {
            return Err(format!(
                "{name} mode cannot start at {address:#x}: its last address is {:#x}",
                mode.end() - 1
            ));
        }
        Ok(EntrySpec { mode, address })
    }
}

/// Flat images and the entry point.
pub struct FlatImages {
    images: Vec<(NamedFile, u64)>,
    entry: EntrySpec,
}

impl FlatImages {
    /// Opens the files.
    ///
    /// # Errors
    /// Names the file that is missing, empty or not a regular file.
    pub fn open(loads: &[LoadSpec], entry: EntrySpec) -> Result<Self, Error> {
        let images = loads
            .iter()
            .map(|load| Ok((NamedFile::open(&load.path)?, load.address)))
            .collect::<Result<_, Error>>()?;
        Ok(FlatImages { images, entry })
    }

    /// Copies the images to `ram`.
    ///
    /// # Errors
    /// Names the image that lies outside of `ram` or overlaps something else, or says that
    /// no image contains the entry point.
    pub(super) fn load(&self, ram: &GuestRam) -> Result<EntryPoint, Error> {
        let EntrySpec { mode, address } = self.entry;
        let entry = EntryPoint::Flat(mode, address);
        let mut occupied: Vec<(Range<u64>, String)> = registers::tables(entry)
            .iter()
            .map(|table| {
                (
                    table.clone(),
                    format!("the start-up tables of {} mode", mode.name()),
                )
            })
            .collect();
        let mut contains_entry = false;
        for (image, start) in &self.images {
            let size = image.size()?;
            let range = *start..start.saturating_add(size);
            if !within(&range, ram) {
                return Err(image.error(format!(
                    "its {size} bytes at {start:#x} are not all in memory: {}",
                    describe(ram)
                )));
            }
            if let Some((other, what)) = occupied.iter().find(|(other, _)| overlap(other, &range)) {
                return Err(image.error(format!(
                    "its range {:#x}-{:#x} overlaps {what} at {:#x}-{:#x}",
                    range.start,
                    range.end - 1,
                    other.start,
                    other.end - 1
                )));
            }
            image.read_to(ram, *start, size)?;
            contains_entry |= range.contains(&address);
            occupied.push((range, image.name()));
        }
        if !contains_entry {
            return Err(Error::BootSetup(format!(
                "--entry {}: no --load image is at its address {address:#x}",
                mode.name()
            )));
        }
        Ok(entry)
    }
}

fn within(range: &Range<u64>, ram: &GuestRam) -> bool {
    ram.ranges()
        .iter()
        .any(|&(start, size)| start <= range.start && range.end <= start + size)
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

fn describe(ram: &GuestRam) -> String {
    let ranges: Vec<String> = ram
        .ranges()
        .iter()
        .map(|(start, size)| format!("{start:#x}-{:#x}", start + size - 1))
        .collect();
    format!("RAM is at {}", ranges.join(" and "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn options_are_parsed() {
        let load: LoadSpec = "a@b/bios@0xf0000".parse().unwrap();
        assert_eq!((load.path, load.address), ("a@b/bios".into(), 0xf_0000));
        assert_eq!("x@1048576".parse::<LoadSpec>().unwrap().address, MIB);
        for bad in [
            "",
            "x",
            "@1",
            "x@",
            "x@0x",
            "x@-1",
            "x@1M",
            "x@0x10000000000000000",
        ] {
            assert!(bad.parse::<LoadSpec>().is_err(), "{bad}");
        }
        for (text, mode, address) in [
            ("real", CpuMode::Real, RESET_VECTOR),
            ("protected", CpuMode::Protected, MIB),
            ("long", CpuMode::Long, MIB),
            ("real=0x7c00", CpuMode::Real, 0x7c00),
            ("long=4096", CpuMode::Long, 4096),
        ] {
            assert_eq!(text.parse(), Ok(EntrySpec { mode, address }));
        }
        for bad in ["", "32", "real=", "real=0x100000", "protected=0x100000000"] {
            assert!(bad.parse::<EntrySpec>().is_err(), "{bad}");
        }
    }

    #[test]
    fn images_are_copied_and_a_wrong_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let ram = GuestRam::new("16M".parse().unwrap()).unwrap();
        let file = |name: &str, content: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, content).unwrap();
            path.display().to_string()
        };
        let (one, two) = (file("one", b"first"), file("two", &[7; 0x1000]));
        let load = |loads: &[(&str, u64)], entry: &str| {
            let loads: Vec<LoadSpec> = loads
                .iter()
                .map(|(path, at)| format!("{path}@{at:#x}").parse().unwrap())
                .collect();
            FlatImages::open(&loads, entry.parse().unwrap())
                .and_then(|flat| flat.load(&ram))
                .map_err(|e| e.to_string())
        };
        let entry = load(&[(&one, 0xf_fff0), (&two, MIB)], "real").unwrap();
        assert_eq!(entry, EntryPoint::Flat(CpuMode::Real, RESET_VECTOR));
        let mut got = [0; 5];
        let at = GuestAddress(0xf_fff0);
        ram.memory().read_slice(&mut got, at).unwrap();
        assert_eq!(&got, b"first");
        for (loads, entry, words) in [
            (
                &[(&*one, 16 * MIB - 4)][..],
                "long",
                &[&*one, "0xffffff"][..],
            ),
            (&[(&one, u64::MAX)], "long", &[&one, "not all in memory"]),
            (
                &[(&one, MIB + 9), (&two, MIB)],
                "long",
                &[&two, &one, "overlaps"],
            ),
            (&[(&two, 0x8000)], "real", &["real", "0xffff0"]),
            (
                &[(&two, 0xe800)],
                "long=0xe800",
                &[&two, "tables of long mode"],
            ),
            (
                &[(&two, 0)],
                "protected=0",
                &[&two, "tables of protected mode"],
            ),
        ] {
            let error = load(loads, entry).unwrap_err();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
        assert!(
            load(&[(&two, 0)], "real=0").is_ok(),
            "real mode needs no tables"
        );
    }
}
