//! What can be done with the disk while it serves (`--control`).

use std::time::Duration;

use device_core::Control;
use outrigger_protocol::device::DeviceStats;

use crate::block_backend::BlockBackend;

impl Control for BlockBackend {
    fn resize(&self, size: Option<u64>) -> Result<u64, String> {
        self.grow(size).map_err(|error| error.to_string())
    }

    fn flush(&self) -> Result<(), String> {
        BlockBackend::flush(self).map_err(|error| error.to_string())
    }

    // Each queue has a worker of its own.
    fn stats(&self, cpu: &[Option<Duration>]) -> DeviceStats {
        let queues = self.recorders.iter().enumerate().map(|(index, recorder)| {
            let mut queue = recorder.snapshot();
            let time = cpu.get(index).copied().flatten();
            queue.cpu_us = time.and_then(|time| u64::try_from(time.as_micros()).ok());
            queue
        });
        DeviceStats {
            queues: queues.collect(),
        }
    }
}
