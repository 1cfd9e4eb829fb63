//! The control socket of the disk (`--control`): statistics, flush, resize.

use std::os::fd::RawFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use device_core::listener::inherit_listener;
use device_vhost_user::WorkerClocks;
use outrigger_cli::socket::{self, BoundSocket};
use outrigger_control_socket::Responder;
use outrigger_protocol::ErrorCode;
use outrigger_protocol::device::{DeviceCommand, DeviceReply, DeviceStats};

use crate::block_backend::BlockBackend;

/// The options for the control socket.
#[derive(Args, Clone, Debug)]
pub struct ControlOptions {
    /// Unix socket to create for control commands: statistics, flush, resize
    #[arg(long, value_name = "PATH", conflicts_with = "control_fd",
          value_parser = socket::path_parser())]
    control: Option<PathBuf>,

    /// Inherited socket that listens for control commands
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(RawFd).range(0..))]
    control_fd: Option<RawFd>,
}

impl ControlOptions {
    /// Opens the socket of the options, if there is one. The path of a socket that this
    /// made is removed if the start fails.
    ///
    /// # Errors
    /// The socket cannot be used. The error names the option.
    pub fn open(&self) -> anyhow::Result<Option<(UnixListener, Option<BoundSocket>)>> {
        if let Some(path) = &self.control {
            let (listener, bound) = socket::bind(path)
                .map_err(|e| anyhow::anyhow!("--control {}: {e}", path.display()))?;
            return Ok(Some((listener, Some(bound))));
        }
        let Some(fd) = self.control_fd else {
            return Ok(None);
        };
        let listener =
            inherit_listener(fd).map_err(|e| anyhow::anyhow!("--control-fd {fd}: {e}"))?;
        Ok(Some((listener, None)))
    }
}

/// Starts the thread that carries out control commands, one after the other.
///
/// # Errors
/// No descriptor or thread is left.
pub fn start(
    listener: UnixListener,
    backend: Arc<BlockBackend>,
    clocks: WorkerClocks,
) -> anyhow::Result<()> {
    let handle = move |command, responder: Responder| {
        responder.reply(&carry_out(&command, &backend, &clocks));
    };
    outrigger_control_socket::start(listener, None, handle)
        .map_err(|error| anyhow::anyhow!("starting the control socket: {error}"))?;
    Ok(())
}

fn carry_out(
    command: &DeviceCommand,
    backend: &BlockBackend,
    clocks: &WorkerClocks,
) -> DeviceReply {
    let result = match command {
        DeviceCommand::Stats {} => Ok(DeviceReply {
            stats: Some(stats(backend, &clocks.read())),
            ..DeviceReply::ok()
        }),
        DeviceCommand::Flush {} => backend.flush().map(|()| DeviceReply::ok()),
        DeviceCommand::Resize { size } => backend.grow(*size).map(|capacity| DeviceReply {
            capacity: Some(capacity),
            ..DeviceReply::ok()
        }),
    };
    result.unwrap_or_else(|error| DeviceReply::error(ErrorCode::Failed, error.to_string()))
}

/// The statistics of the queues, each of which has its own worker.
fn stats(backend: &BlockBackend, cpu_times: &[Option<Duration>]) -> DeviceStats {
    let queues = backend
        .recorders
        .iter()
        .enumerate()
        .map(|(index, recorder)| {
            let mut queue = recorder.snapshot();
            let time = cpu_times.get(index).copied().flatten();
            queue.cpu_us = time.and_then(|time| u64::try_from(time.as_micros()).ok());
            queue
        });
    DeviceStats {
        queues: queues.collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::block_backend::CacheMode;
    use crate::image::{BackingPolicy, ImageFormat, ImageOrigin, open, open_file};

    /// Serves an image of `size` bytes; returns a client.
    fn serve(dir: &std::path::Path, size: u64, clocks: WorkerClocks) -> BufReader<UnixStream> {
        let image = dir.join("image");
        std::fs::File::create(&image)
            .unwrap()
            .set_len(size)
            .unwrap();
        let origin = ImageOrigin {
            name: "image",
            directory: None,
            backing: BackingPolicy::Deny,
            lock: false,
            depth: 0,
        };
        let file = open_file(&image, false).unwrap();
        let image = open(file, Some(ImageFormat::Raw), false, &origin).unwrap();
        let backend = BlockBackend::new(image, CacheMode::Writeback, None, String::new(), 2);
        let options = ControlOptions {
            control: Some(dir.join("control")),
            control_fd: None,
        };
        let (listener, bound) = options.open().unwrap().unwrap();
        bound.unwrap().keep();
        start(listener, Arc::new(backend.unwrap()), clocks).unwrap();
        let stream = UnixStream::connect(dir.join("control")).unwrap();
        let limit = Some(Duration::from_secs(30));
        stream.set_read_timeout(limit).unwrap();
        BufReader::new(stream)
    }

    fn request(client: &mut BufReader<UnixStream>, line: &str) -> DeviceReply {
        client
            .get_mut()
            .write_all(format!("{line}\n").as_bytes())
            .unwrap();
        let mut reply = String::new();
        client.read_line(&mut reply).unwrap();
        serde_json::from_str(&reply).unwrap()
    }

    #[test]
    fn commands_are_answered_one_by_one() {
        let dir = tempfile::tempdir().unwrap();
        let clocks = WorkerClocks::new(2);
        clocks.register(0);
        let mut client = serve(dir.path(), 4096, clocks);
        let grown = request(&mut client, r#"{"command":"resize","size":8192}"#);
        assert_eq!((grown.ok, grown.capacity), (true, Some(8192)));
        let checked = request(&mut client, r#"{"command":"resize"}"#);
        assert_eq!((checked.ok, checked.capacity), (true, Some(8192)));
        let refused = request(&mut client, r#"{"command":"resize","size":512}"#);
        let why = refused.error.unwrap();
        assert!(!refused.ok && why.contains("8192 bytes"), "{why}");
        assert_eq!(
            request(&mut client, r#"{"command":"flush"}"#),
            DeviceReply::ok()
        );
        for invalid in ["", "{", "[]", r#"{"command":"halt"}"#, "\u{0}"] {
            let reply = request(&mut client, invalid);
            assert!(!reply.ok && reply.error.is_some(), "{invalid}");
        }
        let stats = request(&mut client, r#"{"command":"stats"}"#)
            .stats
            .unwrap();
        assert!(stats.queues[0].cpu_us.is_some() && stats.queues[1].cpu_us.is_none());
    }

    #[test]
    fn several_commands_at_once_are_all_answered() {
        let dir = tempfile::tempdir().unwrap();
        let mut client = serve(dir.path(), 1024, WorkerClocks::default());
        let lines = "{\"command\":\"resize\"}\n".repeat(500);
        client.get_mut().write_all(lines.as_bytes()).unwrap();
        for _ in 0..500 {
            let mut reply = String::new();
            client.read_line(&mut reply).unwrap();
            assert_eq!(reply, "{\"ok\":true,\"capacity\":1024}\n");
        }
    }

    #[test]
    fn a_socket_that_does_not_listen_is_refused() {
        use std::os::fd::IntoRawFd;
        let dir = tempfile::tempdir().unwrap();
        let options = |control, control_fd| ControlOptions {
            control,
            control_fd,
        };
        let missing = options(Some(dir.path().join("none/control")), None);
        let error = missing.open().err().unwrap().to_string();
        assert!(error.starts_with("--control "), "{error}");
        let (one, _two) = UnixStream::pair().unwrap();
        let connected = options(None, Some(one.into_raw_fd()));
        let error = connected.open().err().unwrap().to_string();
        assert!(error.contains("listens"), "{error}");
        assert!(options(None, None).open().unwrap().is_none());
    }
}
