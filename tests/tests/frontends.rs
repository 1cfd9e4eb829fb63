//! device-disk with the front end and the driver of crate virtio-driver, without a VM.

use outrigger_tests::disk::pattern_of;
use outrigger_tests::driver::Driver;
use outrigger_tests::process::{Launch, Process};

const SIZE: usize = 4 << 20;
const BLOCK: usize = 4096;
const BLOCKS: usize = SIZE / BLOCK;
const DEPTH: usize = 32;

fn disk(queues: usize) -> (Process, Driver) {
    let launch = Launch::new("device-disk");
    let image = launch.directory().join("image");
    std::fs::write(&image, pattern_of(0, SIZE)).unwrap();
    let process = launch
        .args(["--blk-file".as_ref(), image.as_os_str()])
        .args(["--queues", &queues.to_string()])
        .listening();
    let socket = process.directory().join("socket");
    let driver = Driver::connect(&socket, queues, DEPTH, BLOCK);
    (process, driver)
}

fn image(process: &Process) -> Vec<u8> {
    std::fs::read(process.directory().join("image")).unwrap()
}

#[test]
fn reads_writes_and_flushes_one_at_a_time() {
    let (process, mut driver) = disk(1);
    assert_eq!(driver.capacity(), SIZE as u64);
    let queue = &mut driver.queues[0];
    for block in [0, 1, BLOCKS / 2, BLOCKS - 1] {
        let at = block * BLOCK;
        queue.read(0, at as u64);
        assert_eq!(queue.run(), 0);
        assert_eq!(queue.content(0), pattern_of(at, BLOCK));
        queue.fill(1, &[block as u8 ^ 0x5a; BLOCK]);
        queue.write(1, at as u64);
        assert_eq!(queue.run(), 0);
        queue.flush(2);
        assert_eq!(queue.run(), 0);
        assert_eq!(image(&process)[at..at + BLOCK], [block as u8 ^ 0x5a; BLOCK]);
        queue.read(3, at as u64);
        assert_eq!(queue.run(), 0);
        assert_eq!(queue.content(3), [block as u8 ^ 0x5a; BLOCK]);
    }
    // A request beyond the end of the disk fails, and no other.
    queue.read(0, SIZE as u64);
    assert_eq!(queue.run(), -libc::EIO);
    queue.read(0, 4 * BLOCK as u64);
    assert_eq!(queue.run(), 0);
}

/// Reads every block once, with as many requests in flight as there are buffers, and writes
/// it back reversed.
fn turn_around(driver: &mut Driver, index: usize, blocks: &[usize]) {
    let queue = &mut driver.queues[index];
    let mut todo = blocks.iter().copied();
    let mut at = [None; DEPTH];
    let mut busy = 0;
    loop {
        for (buffer, at) in at.iter_mut().enumerate().filter(|(_, at)| at.is_none()) {
            let Some(block) = todo.next() else { break };
            *at = Some((block, false));
            queue.read(buffer, (block * BLOCK) as u64);
            busy += 1;
        }
        if busy == 0 {
            break;
        }
        queue.kick();
        for (buffer, result) in queue.wait() {
            assert_eq!(result, 0);
            let (block, written) = at[buffer].unwrap();
            if written {
                at[buffer] = None;
                busy -= 1;
                continue;
            }
            let mut data = queue.content(buffer);
            assert_eq!(data, pattern_of(block * BLOCK, BLOCK), "block {block}");
            data.reverse();
            queue.fill(buffer, &data);
            queue.write(buffer, (block * BLOCK) as u64);
            at[buffer] = Some((block, true));
        }
        queue.kick();
    }
    queue.flush(0);
    assert_eq!(queue.run(), 0);
}

fn turns_the_whole_disk_around(queues: usize) {
    let (process, mut driver) = disk(queues);
    // A stride that visits each block once.
    let order: Vec<usize> = (0..BLOCKS).map(|i| i * 397 % BLOCKS).collect();
    for index in 0..queues {
        let own: Vec<usize> = order.iter().copied().skip(index).step_by(queues).collect();
        turn_around(&mut driver, index, &own);
    }
    let image = image(&process);
    for (block, bytes) in image.chunks(BLOCK).enumerate() {
        let mut expected = pattern_of(block * BLOCK, BLOCK);
        expected.reverse();
        assert_eq!(bytes, expected, "block {block}");
    }
}

#[test]
fn reads_and_writes_32_at_a_time() {
    turns_the_whole_disk_around(1);
}

#[test]
fn reads_and_writes_32_at_a_time_on_each_of_four_queues() {
    turns_the_whole_disk_around(4);
}
