//! virtio-console from the driver's side (virtio 1.2 section 5.3).

use crate::guest::Guest;
use crate::queue::Buffer;

/// Index of the receive queue.
pub const RX: usize = 0;
/// Index of the transmit queue.
pub const TX: usize = 1;

/// Sends `bytes` and waits until the device has completed them.
pub fn send(guest: &mut Guest, bytes: &[u8]) {
    let buffer = Buffer::readable(guest.ram.put(bytes), bytes.len() as u32);
    guest.queues[TX].run(&[buffer]);
}

/// Offers `count` receive buffers of `len` bytes.
pub fn post(guest: &mut Guest, count: usize, len: u32) {
    for _ in 0..count {
        let buffer = Buffer::writable(guest.ram.alloc(len.into()), len);
        guest.queues[RX].add(&[buffer]);
    }
    guest.queues[RX].kick();
}

/// Waits until a receive buffer is filled; returns its content.
pub fn receive(guest: &mut Guest) -> Vec<u8> {
    let queue = &mut guest.queues[RX];
    let used = queue.wait();
    let buffer = queue.buffer(used.head);
    guest.ram.get(buffer.address, used.len as usize)
}

/// Receives `len` bytes; offers each buffer again.
pub fn receive_all(guest: &mut Guest, len: usize) -> Vec<u8> {
    let mut all = Vec::new();
    while all.len() < len {
        let queue = &mut guest.queues[RX];
        let used = queue.wait();
        let buffer = queue.buffer(used.head);
        all.extend(guest.ram.get(buffer.address, used.len as usize));
        queue.add(&[buffer]);
        queue.kick();
    }
    all
}
