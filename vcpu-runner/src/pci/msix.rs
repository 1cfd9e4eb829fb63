//! MSI-X: a table of vectors, each with a message and a mask bit (PCI Local Bus 3.0
//! section 6.8.2). Pending bits are not kept here: the event of a masked vector stays in
//! its eventfd.

use crate::vm::irq::MsiMessage;

/// Bytes of one table entry.
pub const ENTRY_SIZE: usize = 16;
/// MSI-X Enable in the message control register.
const ENABLE: u16 = 1 << 15;
/// Function Mask in the message control register.
const FUNCTION_MASK: u16 = 1 << 14;
/// Mask bit in an entry's vector control.
const VECTOR_MASK: u32 = 1;
/// The bits of message control that the guest can write.
pub const WRITABLE_CONTROL: u16 = ENABLE | FUNCTION_MASK;

#[derive(Clone, Copy)]
struct MsixEntry {
    words: [u32; 4],
}

/// An entry is masked after reset.
const RESET_ENTRY: MsixEntry = MsixEntry {
    words: [0, 0, 0, VECTOR_MASK],
};

/// The table and the message control register.
pub struct MsixTable {
    entries: Vec<MsixEntry>,
    control: u16,
}

impl MsixTable {
    /// A table of `vectors` entries, after reset.
    pub fn new(vectors: usize) -> Self {
        MsixTable {
            entries: vec![RESET_ENTRY; vectors],
            control: 0,
        }
    }

    /// Sets the message control register.
    pub fn set_control(&mut self, control: u16) {
        self.control = control;
    }

    /// Whether MSI-X is in use, and INTx therefore not.
    pub fn is_enabled(&self) -> bool {
        self.control & ENABLE != 0
    }

    /// The message of `vector`; `None` if it is masked or does not exist.
    pub fn message(&self, vector: u16) -> Option<MsiMessage> {
        let entry = self.entries.get(usize::from(vector))?;
        let masked = self.control & FUNCTION_MASK != 0 || entry.words[3] & VECTOR_MASK != 0;
        (self.is_enabled() && !masked).then_some(MsiMessage {
            address: u64::from(entry.words[1]) << 32 | u64::from(entry.words[0]),
            data: entry.words[2],
        })
    }

    /// Reads the table at `offset`; 4 or 8 bytes, aligned.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        for (word, bytes) in (offset / 4..).zip(data.chunks_exact_mut(4)) {
            if let Some(entry) = self.entries.get(word / 4) {
                bytes.copy_from_slice(&entry.words[word % 4].to_le_bytes());
            }
        }
    }

    /// Writes the table at `offset` and returns the vector that changed. A write other
    /// than 4 or 8 aligned bytes, which the specification leaves undefined, is ignored.
    pub fn write(&mut self, offset: usize, data: &[u8]) -> Option<u16> {
        if !offset.is_multiple_of(4) || !data.len().is_multiple_of(4) {
            return None;
        }
        for (word, bytes) in (offset / 4..).zip(data.chunks_exact(4)) {
            let value = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            let entry = self.entries.get_mut(word / 4)?;
            entry.words[word % 4] = if word % 4 == 3 {
                value & VECTOR_MASK
            } else {
                value
            };
        }
        Some((offset / ENTRY_SIZE) as u16)
    }

    /// Resets the table.
    pub fn reset(&mut self) {
        self.entries.fill(RESET_ENTRY);
        self.control = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vector_sends_only_when_nothing_masks_it() {
        let mut table = MsixTable::new(2);
        assert_eq!(table.write(0, &0xfee0_0000_u64.to_le_bytes()), Some(0));
        assert_eq!(table.write(8, &(0x41_u64).to_le_bytes()), Some(0));
        assert_eq!(table.message(0), None, "not enabled");
        table.set_control(ENABLE | FUNCTION_MASK);
        assert_eq!(table.message(0), None, "function masked");
        table.set_control(ENABLE);
        let message = MsiMessage {
            address: 0xfee0_0000,
            data: 0x41,
        };
        assert_eq!(table.message(0), Some(message));
        assert_eq!(table.message(1), None, "masked since reset");
        assert_eq!(table.message(2), None, "does not exist");
        assert_eq!(table.write(32, &[0; 4]), None);
        assert_eq!(table.write(1, &[0; 4]), None);
        table.write(12, &1u32.to_le_bytes());
        assert_eq!(table.message(0), None, "masked");
    }
}
