//! A template for a vhost-user device: a disk whose sectors are in memory.
//!
//! The crate `vhost-user-backend` implements the protocol: it handles the front end's
//! messages, maps guest memory and waits for the doorbells. This file has the rest:
//!
//! 1. the execution of a request (`RamDisk::serve`);
//! 2. the properties of the device: features, queues and configuration space (the trait);
//! 3. a program that listens on a socket (`main`).
//!
//! The guest is not trusted: a malformed request leads to an error and not to a panic.

use std::io::{self, Read, Write};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::{QueueT, Reader, Writer};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap, Le32, Le64};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::*;

const SECTOR: usize = 512; // bytes (virtio 1.2 section 5.2.4)

/// The device: its data, and the guest's memory.
struct RamDisk {
    data: Vec<u8>,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
}

impl RamDisk {
    /// Executes a request (virtio 1.2 section 5.2.6): type, a reserved word and the sector,
    /// then the data to write, or a buffer for the data to read. The driver may split these
    /// into any descriptors; `Reader` and `Writer` hide that.
    fn serve(&mut self, from: &mut Reader, to: &mut Writer) -> io::Result<u32> {
        let kind: Le32 = from.read_obj()?;
        let _reserved: Le32 = from.read_obj()?;
        let sector: Le64 = from.read_obj()?;
        match kind.into() {
            VIRTIO_BLK_T_IN => to.write_all(self.at(sector.into(), to.available_bytes())?)?,
            VIRTIO_BLK_T_OUT => from.read_exact(self.at(sector.into(), from.available_bytes())?)?,
            VIRTIO_BLK_T_FLUSH => {} // there is no medium to flush to
            VIRTIO_BLK_T_GET_ID => to.write_all(b"template-device\0\0\0\0\0")?,
            _ => return Ok(VIRTIO_BLK_S_UNSUPP),
        }
        Ok(VIRTIO_BLK_S_OK)
    }

    /// Returns `len` bytes from `sector` on, or an error beyond the end of the disk.
    fn at(&mut self, sector: u64, len: usize) -> io::Result<&mut [u8]> {
        let start = (sector as usize).saturating_mul(SECTOR);
        let range = self.data.get_mut(start..start.saturating_add(len));
        range.ok_or(io::ErrorKind::InvalidInput.into())
    }
}

impl VhostUserBackendMut for RamDisk {
    type Bitmap = (); // no dirty log, so no live migration
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        1
    }
    fn max_queue_size(&self) -> usize {
        256
    }

    /// The feature bits of the device type, and two that every device needs.
    fn features(&self) -> u64 {
        let own = 1 << VIRTIO_BLK_F_FLUSH;
        own | 1 << VIRTIO_F_VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    /// Without CONFIG, the front end does not read the configuration space.
    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&mut self, _enabled: bool) {} // not offered

    /// The event that ends the thread of the queue.
    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    /// The number of sectors. The other fields belong to features that are not offered.
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let sectors = ((self.data.len() / SECTOR) as u64).to_le_bytes();
        let space = sectors.into_iter().chain(std::iter::repeat(0));
        space.skip(offset as usize).take(size as usize).collect()
    }

    fn update_memory(&mut self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    /// Handles a doorbell: serves the requests in the queue, then notifies the driver.
    fn handle_event(
        &mut self,
        queue: u16,
        _events: EventSet,
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        let mem = self.memory.memory();
        let mut vring = vrings[usize::from(queue)].get_mut();
        while let Some(chain) = vring.get_queue_mut().pop_descriptor_chain(mem.clone()) {
            let head = chain.head_index();
            let written = match (Reader::new(&*mem, chain.clone()), Writer::new(&*mem, chain)) {
                (Ok(mut from), Ok(mut to)) if to.available_bytes() > 0 => {
                    // The last byte is the status. Any failure is reported as an I/O error.
                    let last = to.available_bytes() - 1;
                    let mut end = to.split_at(last).map_err(io::Error::other)?;
                    let status = self.serve(&mut from, &mut to).unwrap_or(VIRTIO_BLK_S_IOERR);
                    end.write_all(&[status as u8])?;
                    to.bytes_written() as u32 + 1
                }
                _ => 0, // no byte for the status: the buffer is returned unchanged
            };
            vring.add_used(head, written).map_err(io::Error::other)?;
        }
        vring.signal_used_queue()
    }
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    let size = words.get(2).and_then(|mib| mib.parse::<u16>().ok());
    let (Some(socket), Some(mib), 3) = (words.get(1), size, words.len()) else {
        eprintln!("template-device: usage: template-device SOCKET MIB");
        return ExitCode::from(2);
    };
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let disk = Arc::new(Mutex::new(RamDisk {
        data: vec![0; usize::from(mib) << 20],
        memory: memory.clone(),
    }));
    let daemon = VhostUserDaemon::new("device".into(), disk, memory);
    // Serves one front end, and ends when it disconnects.
    if let Err(error) = daemon.and_then(|mut daemon| daemon.serve(socket)) {
        eprintln!("template-device: {socket}: {error}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
