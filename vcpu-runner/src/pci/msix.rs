//! MSI-X: a table of vectors, each with a message and a mask (PCI Local Bus 3.0
//! section 6.8.2). What is pending is not kept here: a masked vector's event
//! stays in its eventfd.

use crate::vm::irq::Message;

/// Bytes of one table entry.
pub const ENTRY_SIZE: usize = 16;
/// MSI-X Enable in the message control register.
const ENABLE: u16 = 1 << 15;
/// Function Mask in the message control register.
const FUNCTION_MASK: u16 = 1 << 14;
/// Mask bit in an entry's vector control.
const VECTOR_MASK: u32 = 1;
/// The bits of message control that software can write.
pub const WRITABLE_CONTROL: u16 = ENABLE | FUNCTION_MASK;

#[derive(Clone, Copy)]
struct Entry {
    words: [u32; 4],
}

/// Entries are masked after a reset.
const RESET_ENTRY: Entry = Entry {
    words: [0, 0, 0, VECTOR_MASK],
};

/// The table and the control register.
pub struct Table {
    entries: Vec<Entry>,
    control: u16,
}

impl Table {
    /// A table of `vectors` entries, after reset.
    pub fn new(vectors: usize) -> Self {
        Table {
            entries: vec![RESET_ENTRY; vectors],
            control: 0,
        }
    }

    /// Takes over the message control register.
    pub fn set_control(&mut self, control: u16) {
        self.control = control;
    }

    /// Whether MSI-X is in use, and INTx therefore not.
    pub fn is_enabled(&self) -> bool {
        self.control & ENABLE != 0
    }

    /// What `vector` sends if it may: `None` for a masked vector and one that
    /// does not exist.
    pub fn message(&self, vector: u16) -> Option<Message> {
        let entry = self.entries.get(usize::from(vector))?;
        let masked = self.control & FUNCTION_MASK != 0 || entry.words[3] & VECTOR_MASK != 0;
        (self.is_enabled() && !masked).then_some(Message {
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

    /// Writes the table at `offset`; other than 4 or 8 aligned bytes are ignored
    /// (undefined by the specification). Returns the vector that changed.
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

    /// Back to the state after reset.
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
        let mut table = Table::new(2);
        assert_eq!(table.write(0, &0xfee0_0000_u64.to_le_bytes()), Some(0));
        assert_eq!(table.write(8, &(0x41_u64).to_le_bytes()), Some(0));
        assert_eq!(table.message(0), None, "not enabled");
        table.set_control(ENABLE | FUNCTION_MASK);
        assert_eq!(table.message(0), None, "function masked");
        table.set_control(ENABLE);
        let message = Message {
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
