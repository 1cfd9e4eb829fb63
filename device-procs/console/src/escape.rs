//! The escape key of a console that passes all other keys to the guest.

/// The escape key: Ctrl-A.
const PREFIX: u8 = 1;

/// Filters what the user types.
#[derive(Debug, Default)]
pub struct Escape {
    /// The last key was the escape key.
    pending: bool,
}

impl Escape {
    /// Appends the keys for the guest to `out`. Returns true at Ctrl-A x, by which the user
    /// leaves the console; later keys are ignored. Ctrl-A Ctrl-A is one Ctrl-A for the guest;
    /// after Ctrl-A and any other key the guest gets both.
    pub fn filter(&mut self, typed: &[u8], out: &mut Vec<u8>) -> bool {
        for &byte in typed {
            match (std::mem::take(&mut self.pending), byte) {
                (false, PREFIX) => self.pending = true,
                (true, b'x') => return true,
                (true, PREFIX) | (false, _) => out.push(byte),
                (true, _) => out.extend([PREFIX, byte]),
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_pass_and_ctrl_a_x_leaves() {
        for (typed, passed, out) in [
            (&b"plain\x00\xff\x03"[..], &b"plain\x00\xff\x03"[..], false),
            (b"\x01\x01", b"\x01", false),
            (b"a\x01bc", b"a\x01bc", false),
            (b"x\x01xy", b"x", true),
            (b"\x01\x01x", b"\x01x", false),
            (b"\x01", b"", false),
        ] {
            // All at once, and key by key.
            for size in [typed.len(), 1] {
                let mut escape = Escape::default();
                let mut got = Vec::new();
                let ended = typed.chunks(size).any(|keys| escape.filter(keys, &mut got));
                assert_eq!((&got[..], ended), (passed, out), "{typed:?}");
            }
        }
    }
}
