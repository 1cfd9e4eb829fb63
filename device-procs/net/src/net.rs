//! The two queues of the interface.

use std::collections::VecDeque;
use std::io;

use device_core::{DescriptorChain, Device, DeviceContext, Poller};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_HDR_F_NEEDS_CSUM,
};

use crate::tap::{HEADER, Tap};

/// receiveq1 and transmitq1 (virtio 1.2 section 5.1.2).
pub const RX: usize = 0;
pub const TX: usize = 1;

const TAP: u64 = 0;

/// Ethernet's header and a VLAN tag, in bytes.
const ETHERNET: usize = 14 + 4;
/// The longest that segmentation offload makes of an IP packet, in bytes.
const LONGEST_PACKET: usize = 65_535;
/// Most iovecs in a call, less one for what is too long.
const MAX_IOVECS: usize = libc::UIO_MAXIOV as usize - 1;
/// Where num_buffers is in the header.
const NUM_BUFFERS: usize = 10;

/// Frames that went nowhere since the front end came.
#[derive(Debug, Default)]
struct Dropped {
    /// From the guest, shorter than their header.
    short: u64,
    /// From the guest, not to the host's taste.
    refused: u64,
    /// Buffers from the guest without room for a header.
    runts: u64,
    /// For the guest, longer than its buffers.
    oversized: u64,
    /// For the guest, with offloads that it did not accept.
    unwanted: u64,
}

/// Counts, and says so the first time.
fn count(counter: &mut u64, what: &str) {
    if *counter == 0 {
        tracing::warn!("{what}; others like it are only counted");
    }
    *counter += 1;
}

/// The interface. Frames go between tap and guest memory without a stop; what
/// there is no room for yet stays in the tap device's own queue.
pub struct VirtioNet {
    tap: Tap,
    mtu: u16,
    features: u64,
    dropped: Dropped,
}

impl VirtioNet {
    /// An interface before any driver; `mtu` in bytes.
    pub fn new(tap: Tap, mtu: u16) -> Self {
        VirtioNet {
            tap,
            mtu,
            features: 0,
            dropped: Dropped::default(),
        }
    }

    fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    /// The room that any frame for the guest fits into.
    fn longest_frame(&self) -> usize {
        let segments = self.has(VIRTIO_NET_F_GUEST_TSO4) || self.has(VIRTIO_NET_F_GUEST_TSO6);
        let packet = if segments {
            LONGEST_PACKET
        } else {
            self.mtu.into()
        };
        HEADER + ETHERNET + packet
    }

    fn transmit(&mut self, cx: &mut DeviceContext<'_>) {
        let memory = cx.memory;
        let Some(ring) = cx.ring(TX) else { return };
        while let Some(chain) = ring.pop(memory) {
            if chain.readable.len() < HEADER {
                count(
                    &mut self.dropped.short,
                    "a frame shorter than its header was dropped",
                );
                ring.add_used(chain.head, 0);
                continue;
            }
            // SAFETY: the pieces are guest memory, mapped for as long as `chain`
            // borrows it.
            match unsafe { self.tap.write(&chain.readable.iovecs()) } {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // The tap device reports when there is room again.
                    ring.undo_pop(&chain);
                    return;
                }
                Err(error) => count(
                    &mut self.dropped.refused,
                    &format!("{} refused a frame: {error}", self.tap.name()),
                ),
            }
            ring.add_used(chain.head, 0);
        }
    }

    fn receive(&mut self, cx: &mut DeviceContext<'_>) {
        let memory = cx.memory;
        let Some(ring) = cx.ring(RX) else { return };
        let longest = self.longest_frame();
        let mergeable = self.has(VIRTIO_NET_F_MRG_RXBUF);
        let mut chains: VecDeque<DescriptorChain<'_>> = VecDeque::new();
        let mut iovecs = Vec::new();
        // What does not fit goes here, and is thereby noticed.
        let mut excess = [0u8; 1];
        loop {
            // Without mergeable buffers a frame has one chain, of whatever length.
            let mut room: usize = chains.iter().map(|chain| chain.writable.len()).sum();
            while room < longest && (mergeable || chains.is_empty()) {
                let Some(chain) = ring.pop(memory) else { break };
                if chain.writable.len() < HEADER {
                    count(
                        &mut self.dropped.runts,
                        "a receive buffer has no room for a header",
                    );
                    // Not at once: those before it may be put back.
                    ring.refuse(&chain);
                    continue;
                }
                room += chain.writable.len();
                chains.push_back(chain);
            }
            if chains.is_empty() {
                return;
            }
            iovecs.clear();
            iovecs.extend(chains.iter().flat_map(|chain| chain.writable.iovecs()));
            iovecs.truncate(MAX_IOVECS);
            let room: usize = iovecs.iter().map(|iovec| iovec.iov_len).sum();
            iovecs.push(libc::iovec {
                iov_base: excess.as_mut_ptr().cast(),
                iov_len: excess.len(),
            });
            // SAFETY: the pieces are guest memory, mapped for as long as `chains`
            // borrow it, and `excess`.
            match unsafe { self.tap.read(&iovecs) } {
                Ok(len) if len <= room && self.acceptable(&chains[0]) => {
                    let used = share_out(&mut chains, len);
                    ring.add_used_batch(&used);
                    continue;
                }
                Ok(len) if len > room => count(
                    &mut self.dropped.oversized,
                    "a frame too long for the guest's buffers was dropped",
                ),
                Ok(_) => count(
                    &mut self.dropped.unwanted,
                    "a frame with offloads that the guest does not know was dropped",
                ),
                Err(error) => {
                    if error.kind() != io::ErrorKind::WouldBlock {
                        tracing::error!("reading from {}: {error}", self.tap.name());
                    }
                    ring.undo_pop(&chains[0]);
                    return;
                }
            }
            // The buffers are taken anew, so that a flood of frames to be dropped
            // comes to the end of the batch like one of good frames.
            ring.undo_pop(&chains[0]);
            chains.clear();
        }
    }

    /// Puts right what the kernel says in the header of a frame to a driver that
    /// does not know checksum offload (virtio 1.2 section 5.1.6.4.1). False for a
    /// frame that it cannot receive at all: one from the time of the last driver.
    fn acceptable(&self, first: &DescriptorChain<'_>) -> bool {
        if self.has(VIRTIO_NET_F_GUEST_CSUM) {
            return true;
        }
        let mut header = [0; 2];
        first.writable.copy_to(&mut header);
        let [flags, gso] = header;
        first.writable.copy_from(&[0, 0]);
        u32::from(flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM == 0 && gso == 0
    }
}

/// Takes from `chains` those that hold a frame of `len` bytes, header and all;
/// returns their heads and how much of each is used.
fn share_out(chains: &mut VecDeque<DescriptorChain<'_>>, len: usize) -> Vec<(u16, u32)> {
    let mut left = len;
    let mut used = Vec::new();
    let first = chains.front().map(|chain| chain.writable.clone());
    while left > 0 {
        let Some(chain) = chains.pop_front() else {
            break;
        };
        let here = left.min(chain.writable.len());
        used.push((chain.head, here as u32));
        left -= here;
    }
    if let Some(first) = first {
        let count = used.len() as u16; // at most a ring's size
        first.copy_from_at(NUM_BUFFERS, &count.to_le_bytes());
    }
    used
}

impl Device for VirtioNet {
    fn register_sources(&mut self, poller: &Poller) -> io::Result<()> {
        poller.add(&self.tap, TAP)
    }

    fn set_features(&mut self, features: u64) {
        self.features = features;
        if let Err(error) = self.tap.set_offload(features) {
            tracing::error!("{}: setting offloads: {error}", self.tap.name());
        }
    }

    fn process_queue(&mut self, queue: usize, cx: &mut DeviceContext<'_>) {
        match queue {
            RX => self.receive(cx),
            TX => self.transmit(cx),
            _ => {}
        }
    }

    fn handle_event(&mut self, _token: u64, cx: &mut DeviceContext<'_>) {
        self.receive(cx);
        self.transmit(cx);
    }

    fn frontend_disconnected(&mut self) {
        let dropped = std::mem::take(&mut self.dropped);
        let Dropped {
            short,
            refused,
            runts,
            oversized,
            unwanted,
        } = &dropped;
        if short + refused + runts + oversized + unwanted > 0 {
            tracing::warn!("frames dropped: {dropped:?}");
        }
        self.set_features(0);
    }
}
