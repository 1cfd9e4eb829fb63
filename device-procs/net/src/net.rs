//! The network device with its receive and transmit queue.

use std::collections::VecDeque;
use std::io;

use device_core::Poller;
use device_vhost_user::{DescriptorChain, Device, DeviceContext};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_HDR_F_NEEDS_CSUM,
};

use crate::tap::{HEADER, Tap};

/// receiveq1 and transmitq1 (virtio 1.2 section 5.1.2).
pub const RX: usize = 0;
pub const TX: usize = 1;

/// Event token of the tap device.
const TAP: u64 = 0;

/// Length of an Ethernet header with a VLAN tag, in bytes.
const ETHERNET: usize = 14 + 4;
/// Largest IP packet with segmentation offload, in bytes.
const LONGEST_PACKET: usize = 65_535;
/// Most iovecs in a call (IOV_MAX), less the one that detects oversized frames.
const MAX_IOVECS: usize = libc::UIO_MAXIOV as usize - 1;
/// Offset of num_buffers in the virtio-net header.
const NUM_BUFFERS: usize = 10;

/// Counts frames and buffers that were dropped since the front end connected.
#[derive(Debug, Default)]
struct DropCounters {
    /// Frames from the guest that are shorter than their header.
    short: u64,
    /// Frames from the guest that the tap device refused.
    refused: u64,
    /// Receive buffers without room for a header.
    runts: u64,
    /// Frames for the guest that are longer than its buffers.
    oversized: u64,
    /// Frames for the guest with offloads that its driver did not negotiate.
    unwanted: u64,
}

/// Increments `counter`; logs `what` the first time.
fn count(queue: usize, counter: &mut u64, what: &str) {
    if *counter == 0 {
        tracing::warn!(queue, "{what}; further ones are only counted");
    }
    *counter += 1;
}

/// The network device. Frames go directly between tap device and guest memory. Frames
/// that the guest has no buffers for stay in the tap device's queue.
pub struct VirtioNet {
    tap: Tap,
    mtu: u16,
    features: u64,
    dropped: DropCounters,
}

impl VirtioNet {
    /// A device on `tap`; `mtu` in bytes.
    pub fn new(tap: Tap, mtu: u16) -> Self {
        VirtioNet {
            tap,
            mtu,
            features: 0,
            dropped: DropCounters::default(),
        }
    }

    fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    /// Bytes that the longest possible frame for the guest needs, header included.
    fn max_frame_size(&self) -> usize {
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
                    TX,
                    &mut self.dropped.short,
                    "a frame shorter than its header was dropped",
                );
                ring.add_used(chain.head, 0);
                continue;
            }
            // SAFETY: the iovecs are guest memory, which stays mapped as long as `chain`
            // borrows it.
            match unsafe { self.tap.write(&chain.readable.iovecs()) } {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // The tap device becomes ready when it has room again.
                    ring.undo_pop(&chain);
                    return;
                }
                Err(error) => count(
                    TX,
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
        let longest = self.max_frame_size();
        let mergeable = self.has(VIRTIO_NET_F_MRG_RXBUF);
        let mut chains: VecDeque<DescriptorChain<'_>> = VecDeque::new();
        let mut iovecs = Vec::new();
        // A frame that reaches this byte is too long.
        let mut excess = [0u8; 1];
        loop {
            // Without mergeable buffers each frame has one chain, of any length.
            let mut room: usize = chains.iter().map(|chain| chain.writable.len()).sum();
            while room < longest && (mergeable || chains.is_empty()) {
                let Some(chain) = ring.pop(memory) else { break };
                if chain.writable.len() < HEADER {
                    count(
                        RX,
                        &mut self.dropped.runts,
                        "a receive buffer has no room for a header",
                    );
                    // It is completed with the batch: chains before it may be put back.
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
            // SAFETY: the iovecs are `excess` and guest memory, which stays mapped as long
            // as `chains` borrow it.
            match unsafe { self.tap.read(&iovecs) } {
                Ok(len) if len <= room && self.fix_header(&chains[0]) => {
                    let used = used_chains(&mut chains, len);
                    ring.add_used_batch(&used);
                    continue;
                }
                Ok(len) if len > room => count(
                    RX,
                    &mut self.dropped.oversized,
                    "a frame too long for the guest's buffers was dropped",
                ),
                Ok(_) => count(
                    RX,
                    &mut self.dropped.unwanted,
                    "a frame with offloads that the guest's driver did not negotiate was dropped",
                ),
                Err(error) => {
                    if error.kind() != io::ErrorKind::WouldBlock {
                        tracing::error!(queue = RX, %error, "reading from tap device {} failed", self.tap.name());
                    }
                    ring.undo_pop(&chains[0]);
                    return;
                }
            }
            // The chains are popped again, so that a flood of dropped frames uses up the
            // batch as a flood of good frames does.
            ring.undo_pop(&chains[0]);
            chains.clear();
        }
    }

    /// Clears the header's flags for a driver without checksum offload (virtio 1.2 section
    /// 5.1.6.4.1). Returns false for a frame that this driver cannot receive, because the tap
    /// device queued it while the previous driver's offloads were in force.
    fn fix_header(&self, first: &DescriptorChain<'_>) -> bool {
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

/// Takes from `chains` those that contain a frame of `len` bytes, header included, and sets
/// num_buffers. Returns their heads and the used bytes of each.
fn used_chains(chains: &mut VecDeque<DescriptorChain<'_>>, len: usize) -> Vec<(u16, u32)> {
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
        let count = used.len() as u16; // at most the ring's size
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
            tracing::error!(%error, "setting offloads of tap device {} failed", self.tap.name());
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
        let DropCounters {
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
