//! The console device with its receive and transmit queue (virtio 1.2 section 5.3),
//! without multiport.

use std::io;

use device_core::Poller;
use device_vhost_user::{ConfigSpace, Device, DeviceContext};

use crate::backend::{ConsoleBackend, TerminalSize, Written};
use crate::backlog::Backlog;
use crate::stream::CHUNK;

/// receiveq and transmitq of port 0 (virtio 1.2 section 5.3.2).
pub const RX: usize = 0;
pub const TX: usize = 1;

/// Most output of one batch, in bytes: a chain may be as long as guest memory.
const BATCH_BYTES: usize = 256 * CHUNK;

/// The bytes of `struct virtio_console_config`.
pub fn config_space((columns, rows): TerminalSize) -> Vec<u8> {
    let mut space = columns.to_le_bytes().to_vec();
    space.extend(rows.to_le_bytes());
    space.extend([0; 8]); // max_nr_ports and emerg_wr: not offered
    space
}

/// The console device. Input stays at its source until the guest has a buffer for it, and
/// output stays in the guest's ring until it is written, so neither is lost with this
/// process. While there is no reader, the last output is kept in the backlog.
pub struct VirtioConsole {
    backend: Box<dyn ConsoleBackend>,
    config: ConfigSpace,
    backlog: Backlog,
    /// Bytes of the first chain in the transmit queue that are written already.
    sent: usize,
    /// The last write found no reader.
    was_absent: bool,
    /// A driver has used this process. Before, events are ignored, because the previous
    /// process may still serve the same descriptors.
    served: bool,
}

impl VirtioConsole {
    /// A console device on `backend`.
    pub fn new(backend: Box<dyn ConsoleBackend>, config: ConfigSpace, backlog: Backlog) -> Self {
        VirtioConsole {
            backend,
            config,
            backlog,
            sent: 0,
            was_absent: false,
            served: false,
        }
    }

    fn update_size(&self) {
        if let Some(size) = self.backend.size() {
            self.config.update(config_space(size));
        }
    }

    fn receive(&mut self, cx: &mut DeviceContext<'_>) {
        let (memory, poller) = (cx.memory, cx.poller);
        let Some(ring) = cx.ring(RX) else { return };
        loop {
            let Some(chain) = ring.pop(memory) else {
                return;
            };
            // An empty buffer is completed at once.
            let room = chain.writable.len().min(CHUNK);
            let mut buf = [0; CHUNK];
            let len = match room {
                0 => 0,
                _ => self.backend.read(&mut buf[..room], poller),
            };
            if len == 0 && room > 0 {
                ring.undo_pop(&chain);
                return;
            }
            chain.writable.copy_from(&buf[..len]);
            ring.add_used(chain.head, len as u32);
        }
    }

    fn transmit(&mut self, cx: &mut DeviceContext<'_>) {
        let (memory, poller) = (cx.memory, cx.poller);
        if !self.write_backlog(poller) {
            return;
        }
        let Some(ring) = cx.ring(TX) else { return };
        let mut left_in_batch = BATCH_BYTES;
        while let Some(chain) = ring.pop(memory) {
            let mut rest = chain.readable.clone();
            rest.take(self.sent);
            while !rest.is_empty() {
                if left_in_batch == 0 {
                    ring.undo_pop(&chain);
                    ring.process_again();
                    return;
                }
                let mut buf = [0; CHUNK];
                let Some(piece) = rest.clone().take(rest.len().min(CHUNK)) else {
                    break; // never: the length is at most that of `rest`
                };
                let len = piece.copy_to(&mut buf);
                let len = match self.write(&buf[..len], poller) {
                    Some(len) => len,
                    None => {
                        // The reader is slow: the chain stays in the ring.
                        ring.undo_pop(&chain);
                        return;
                    }
                };
                rest.take(len);
                self.sent += len;
                left_in_batch = left_in_batch.saturating_sub(len);
            }
            self.sent = 0;
            ring.add_used(chain.head, 0);
        }
    }

    /// Moves the rest of a partly written chain to the backlog and completes the chain,
    /// because the next process would write it from the start. A chain that does not fit into
    /// the backlog stays in the ring.
    fn finish_chain(&mut self, cx: &mut DeviceContext<'_>) {
        let memory = cx.memory;
        let Some(ring) = cx.ring(TX).filter(|_| self.sent > 0) else {
            return;
        };
        let Some(chain) = ring.pop(memory) else {
            return;
        };
        let mut rest = chain.readable.clone();
        rest.take(self.sent);
        if rest.len() > self.backlog.room() {
            return ring.undo_pop(&chain);
        }
        let mut bytes = vec![0; rest.len()];
        rest.copy_to(&mut bytes);
        self.backlog.append(&bytes);
        self.sent = 0;
        ring.add_used(chain.head, 0);
    }

    /// Writes some of `bytes`, or keeps all of them if there is no reader; returns how many,
    /// or `None` when the reader has no room.
    fn write(&mut self, bytes: &[u8], poller: &Poller) -> Option<usize> {
        match self.backend.write(bytes, poller) {
            Written::Some(len) => {
                self.was_absent = false;
                Some(len)
            }
            Written::Full => None,
            Written::Absent => {
                if !std::mem::replace(&mut self.was_absent, true) {
                    tracing::debug!(queue = TX, "there is no reader; the last output is kept");
                }
                self.backlog.append(bytes);
                Some(bytes.len())
            }
        }
    }

    /// Writes the backlog; returns false while some of it has to be written before new
    /// output.
    fn write_backlog(&mut self, poller: &Poller) -> bool {
        let mut buf = [0; CHUNK];
        loop {
            let len = self.backlog.peek(&mut buf);
            if len == 0 {
                break;
            }
            match self.backend.write(&buf[..len], poller) {
                Written::Some(len) => self.backlog.consume(len),
                Written::Full => return false,
                Written::Absent => return true,
            }
        }
        let lost = self.backlog.take_lost();
        if lost > 0 {
            tracing::warn!(
                queue = TX,
                bytes = lost,
                "{lost} bytes of output were discarded while there was no reader"
            );
        }
        true
    }
}

impl Device for VirtioConsole {
    fn register_sources(&mut self, poller: &Poller) -> io::Result<()> {
        self.backend.register_sources(poller)
    }

    fn set_features(&mut self, _features: u64) {
        self.sent = 0;
        self.served = true;
        self.backend.driver_connected();
    }

    fn process_queue(&mut self, queue: usize, cx: &mut DeviceContext<'_>) {
        self.update_size();
        match queue {
            RX => self.receive(cx),
            TX => self.transmit(cx),
            _ => {}
        }
    }

    fn handle_event(&mut self, token: u64, cx: &mut DeviceContext<'_>) {
        self.backend.handle_event(token, cx.poller);
        if !self.served {
            return;
        }
        self.update_size();
        self.receive(cx);
        self.transmit(cx);
    }

    fn drain_queue(&mut self, queue: usize, cx: &mut DeviceContext<'_>) {
        if queue == TX {
            self.finish_chain(cx);
        }
    }

    fn frontend_disconnected(&mut self) {
        self.sent = 0;
        self.backend.driver_disconnected();
    }
}
