//! The session of one front end: handles its messages, for the request handler of crate
//! vhost.

use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error as VhostError, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::inflight::{self, InflightLayout, InflightTable};
use crate::memory::{MAX_REGIONS, MemoryTable, RegionInfo};
use crate::ring::RingAddresses;
use crate::worker::Worker;
use crate::{DeviceProperties, Error};

const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

impl From<Error> for VhostError {
    fn from(error: Error) -> Self {
        VhostError::ReqHandlerError(std::io::Error::other(error))
    }
}

/// The state of one connection. Rings and memory belong to the workers; this is only what
/// the protocol needs to remember.
pub struct VhostUserSession {
    properties: Arc<DeviceProperties>,
    workers: Arc<[Worker]>,
    table: MemoryTable,
    /// SET_INFLIGHT_FD; rings that start from now on use it.
    inflight: Option<Arc<InflightTable>>,
    /// SET_FEATURES; `None` before it.
    features: Option<u64>,
    /// SET_PROTOCOL_FEATURES; `None` before it.
    protocol_features: Option<u64>,
}

impl VhostUserSession {
    /// A session in which nothing is negotiated yet.
    pub fn new(properties: Arc<DeviceProperties>, workers: Arc<[Worker]>) -> Self {
        VhostUserSession {
            properties,
            workers,
            table: MemoryTable::default(),
            inflight: None,
            features: None,
            protocol_features: None,
        }
    }

    /// The front end has connected on `socket`.
    pub fn frontend_connected(&self, socket: BorrowedFd<'_>) {
        for worker in self.workers.iter() {
            worker.control(|state, _| state.frontend_connected(socket));
        }
    }

    /// The front end has left: all rings stop.
    pub fn close(&mut self) {
        for worker in self.workers.iter() {
            worker.control(|state, poller| state.close(poller));
        }
        self.table = MemoryTable::default();
        self.inflight = None;
        self.properties.config.set_channel(None);
    }

    /// Whether the front end has acknowledged this protocol feature.
    pub fn has_protocol_feature(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.protocol_features
            .is_some_and(|features| features & feature.bits() != 0)
    }

    /// Whether the front end has sent SET_PROTOCOL_FEATURES and not yet SET_FEATURES; see
    /// `early_vring_enable` in `vhost_workarounds`.
    pub fn awaits_features(&self) -> bool {
        self.protocol_features.is_some() && self.features.is_none()
    }

    fn offered(&self) -> u64 {
        self.properties.features
            | (1 << VIRTIO_F_VERSION_1)
            | (1 << VIRTIO_RING_F_INDIRECT_DESC)
            | (1 << VIRTIO_RING_F_EVENT_IDX)
            | PROTOCOL_FEATURES
    }

    /// The worker that serves queue `index`.
    fn worker(&self, index: usize) -> Result<&Worker> {
        let queues = self.properties.queues.len();
        self.properties
            .queues
            .get(index)
            .and_then(|&worker| self.workers.get(worker))
            .ok_or(Error::NoSuchQueue { index, queues }.into())
    }

    fn replace_table(&mut self, table: MemoryTable) {
        for worker in self.workers.iter() {
            worker.control(|state, poller| state.set_memory(&table, poller));
        }
        self.table = table;
    }
}

/// Makes an eventfd of the front end non-blocking: if its counter is full, a write must not
/// block a worker.
fn nonblocking(file: File, name: &str) -> Result<OwnedFd> {
    let fd = OwnedFd::from(file);
    device_core::fd::set_nonblocking(&fd).map_err(Error::io(name))?;
    Ok(fd)
}

fn layout(inflight: &VhostUserInflight) -> InflightLayout {
    InflightLayout {
        queues: inflight.num_queues,
        size: inflight.queue_size,
    }
}

fn unsupported<T>(message: &'static str) -> Result<T> {
    Err(Error::Unsupported(message).into())
}

impl VhostUserBackendReqHandlerMut for VhostUserSession {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        for worker in self.workers.iter() {
            worker.control(|state, poller| state.reset(poller));
        }
        self.table = MemoryTable::default();
        self.inflight = None;
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        unsupported("RESET_DEVICE")
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.offered();
        if unknown != 0 {
            return Err(Error::Features(unknown).into());
        }
        self.features = Some(features);
        for worker in self.workers.iter() {
            worker.control(|state, _| state.set_features(features));
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let infos = regions.iter().map(|r| RegionInfo {
            guest: r.guest_phys_addr,
            size: r.memory_size,
            user: r.user_addr,
            offset: r.mmap_offset,
        });
        let table = MemoryTable::new(infos.zip(files))?;
        self.replace_table(table);
        Ok(None)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        let info = RegionInfo {
            guest: region.guest_phys_addr,
            size: region.memory_size,
            user: region.user_addr,
            offset: region.mmap_offset,
        };
        let mut table = self.table.clone();
        table.add(info, file)?;
        self.replace_table(table);
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let mut table = self.table.clone();
        table.remove(region.guest_phys_addr, region.user_addr, region.memory_size)?;
        self.replace_table(table);
        Ok(())
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let index = index as usize;
        Ok(self
            .worker(index)?
            .control(|state, _| state.ring(index)?.set_size(num))?)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let index = index as usize;
        let addresses = RingAddresses {
            descriptors,
            available,
            used,
        };
        Ok(self
            .worker(index)?
            .control(|state, poller| state.set_addresses(index, addresses, &self.table, poller))?)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let index = index as usize;
        // Split rings have a 16-bit index; the upper half means something only
        // for packed ones.
        Ok(self.worker(index)?.control(|state, _| {
            state.ring(index)?.set_base(base as u16);
            Ok::<(), Error>(())
        })?)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let queue = index as usize;
        let base = self
            .worker(queue)?
            .control(|state, poller| state.stop(queue, poller))?;
        Ok(VhostUserVringState::new(index, base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let Some(fd) = fd else {
            return unsupported("SET_VRING_KICK without a descriptor (polling)");
        };
        let queue = usize::from(index);
        let kick = nonblocking(fd, "kick eventfd")?;
        let enable = self.features.unwrap_or(0) & PROTOCOL_FEATURES == 0;
        let inflight = self.inflight.as_ref();
        Ok(self.worker(queue)?.control(|state, poller| {
            state.start(queue, kick, enable, &self.table, inflight, poller)
        })?)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let queue = usize::from(index);
        let call = fd.map(|fd| nonblocking(fd, "call eventfd")).transpose()?;
        Ok(self.worker(queue)?.control(|state, _| {
            state.ring(queue)?.set_call(call);
            Ok::<(), Error>(())
        })?)
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let queue = usize::from(index);
        let err = fd.map(|fd| nonblocking(fd, "err eventfd")).transpose()?;
        Ok(self.worker(queue)?.control(|state, _| {
            state.ring(queue)?.set_err(err);
            Ok::<(), Error>(())
        })?)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        let inflight = match self.properties.inflight {
            true => VhostUserProtocolFeatures::INFLIGHT_SHMFD,
            false => VhostUserProtocolFeatures::empty(),
        };
        Ok(inflight
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::REPLY_ACK)
    }

    // Crate vhost keeps them, too, and refuses messages that need others.
    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        self.protocol_features = Some(features);
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.properties.queues.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let index = index as usize;
        Ok(self
            .worker(index)?
            .control(|state, poller| state.set_enabled(index, enable, poller))?)
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        Ok(self.properties.config.read(offset, size as usize)?)
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        let Some(worker) = self.workers.first() else {
            return unsupported("SET_CONFIG");
        };
        Ok(worker.control(|state, _| state.write_config(offset, buf))?)
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        unsupported("GPU_SET_SOCKET")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        unsupported("GET_SHARED_OBJECT")
    }

    // The table is not kept: a front end may ask for several, and sends the one that it uses
    // with SET_INFLIGHT_FD.
    fn get_inflight_fd(
        &mut self,
        inflight: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File)> {
        let layout = layout(inflight);
        let DeviceProperties {
            queues, queue_size, ..
        } = &*self.properties;
        let (file, len) = inflight::create(layout, queues.len(), *queue_size)?;
        let table = VhostUserInflight::new(len, 0, layout.queues, layout.size);
        Ok((table, file))
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        let table = InflightTable::map(
            layout(inflight),
            file,
            inflight.mmap_offset,
            inflight.mmap_size,
            self.properties.queues.len(),
            self.properties.queue_size,
        )?;
        self.inflight = Some(Arc::new(table));
        Ok(())
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        unsupported("SET_DEVICE_STATE_FD")
    }

    fn check_device_state(&mut self) -> Result<()> {
        unsupported("CHECK_DEVICE_STATE")
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        unsupported("GET_SHMEM_CONFIG")
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        unsupported("SET_LOG_BASE")
    }
}
