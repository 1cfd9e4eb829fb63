//! A vhost-user device to start your own from: a disk whose sectors are memory.
//!
//! The crate `vhost-user-backend` does the talking: it takes the front end's
//! requests, maps guest memory and watches the doorbells. What is left is what
//! makes a device the device it is, in three parts:
//!
//! 1. what a request means (`RamDisk::serve`), the heart of it;
//! 2. what the device offers: features, queues, configuration space (the trait);
//! 3. a program that listens on a socket (`main`).
//!
//! The guest is not trusted: nonsense in a queue ends in an error, not in a panic.

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

/// The device: its contents, and the guest's memory.
struct RamDisk {
    data: Vec<u8>,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
}

impl RamDisk {
    /// Serves a request (virtio 1.2 section 5.2.6): type, a reserved word and sector,
    /// then data to write, or room for what is read. How the driver cuts that into
    /// buffers is its own affair, and `Reader` and `Writer` hide it.
    fn serve(&mut self, from: &mut Reader, to: &mut Writer) -> io::Result<u32> {
        let kind: Le32 = from.read_obj()?;
        let _reserved: Le32 = from.read_obj()?;
        let sector: Le64 = from.read_obj()?;
        match kind.into() {
            VIRTIO_BLK_T_IN => to.write_all(self.at(sector.into(), to.available_bytes())?)?,
            VIRTIO_BLK_T_OUT => from.read_exact(self.at(sector.into(), from.available_bytes())?)?,
            VIRTIO_BLK_T_FLUSH => {} // memory is as durable as it gets
            VIRTIO_BLK_T_GET_ID => to.write_all(b"template-device\0\0\0\0\0")?,
            _ => return Ok(VIRTIO_BLK_S_UNSUPP),
        }
        Ok(VIRTIO_BLK_S_OK)
    }

    /// `len` bytes from `sector` on, which must be there.
    fn at(&mut self, sector: u64, len: usize) -> io::Result<&mut [u8]> {
        let start = (sector as usize).saturating_mul(SECTOR);
        let found = self.data.get_mut(start..start.saturating_add(len));
        found.ok_or(io::ErrorKind::InvalidInput.into())
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

    /// The device's own feature bits, and the two that every device has.
    fn features(&self) -> u64 {
        let own = 1 << VIRTIO_BLK_F_FLUSH;
        own | 1 << VIRTIO_F_VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    /// Without CONFIG, nobody asks for the configuration space.
    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&mut self, _enabled: bool) {} // not offered

    /// By which the thread that serves the queue is ended.
    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    /// The number of sectors; the rest belongs to features that are not offered.
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let sectors = ((self.data.len() / SECTOR) as u64).to_le_bytes();
        let space = sectors.into_iter().chain(std::iter::repeat(0));
        space.skip(offset as usize).take(size as usize).collect()
    }

    fn update_memory(&mut self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    /// A doorbell: serves what the driver has put into the queue, then says so.
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
                    // The last byte is the status. What goes wrong is an I/O error.
                    let last = to.available_bytes() - 1;
                    let mut end = to.split_at(last).map_err(io::Error::other)?;
                    let status = self.serve(&mut from, &mut to).unwrap_or(VIRTIO_BLK_S_IOERR);
                    end.write_all(&[status as u8])?;
                    to.bytes_written() as u32 + 1
                }
                _ => 0, // no room for an answer: given back as it came
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
        eprintln!("template-device: needs two words: SOCKET MIB");
        return ExitCode::from(2);
    };
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let disk = Arc::new(Mutex::new(RamDisk {
        data: vec![0; usize::from(mib) << 20],
        memory: memory.clone(),
    }));
    let daemon = VhostUserDaemon::new("device".into(), disk, memory);
    // Serves one front end and ends with it.
    if let Err(error) = daemon.and_then(|mut daemon| daemon.serve(socket)) {
        eprintln!("template-device: {socket}: {error}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
