//! The way out of a console that takes all keys.

/// The key that announces a command to us: Ctrl-A.
const PREFIX: u8 = 1;

/// What the user types, on its way to the guest.
#[derive(Debug, Default)]
pub struct Escape {
    announced: bool,
}

impl Escape {
    /// Passes `typed` on into `out`. True when the user wants out (Ctrl-A x); what
    /// comes after that is not looked at. Ctrl-A twice is one for the guest;
    /// anything else is not for us, and the guest gets both.
    pub fn filter(&mut self, typed: &[u8], out: &mut Vec<u8>) -> bool {
        for &byte in typed {
            match (std::mem::take(&mut self.announced), byte) {
                (false, PREFIX) => self.announced = true,
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
    fn keys_pass_and_the_way_out_is_found() {
        for (typed, passed, out) in [
            (&b"plain\x00\xff\x03"[..], &b"plain\x00\xff\x03"[..], false),
            (b"\x01\x01", b"\x01", false),
            (b"a\x01bc", b"a\x01bc", false),
            (b"x\x01xy", b"x", true),
            (b"\x01\x01x", b"\x01x", false),
            (b"\x01", b"", false),
        ] {
            // At once, and key by key.
            for size in [typed.len(), 1] {
                let mut escape = Escape::default();
                let mut got = Vec::new();
                let ended = typed.chunks(size).any(|keys| escape.filter(keys, &mut got));
                assert_eq!((&got[..], ended), (passed, out), "{typed:?}");
            }
        }
    }
}
