//! Rings: start, operation, stop.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::Duration;

use outrigger_tests::guest::{EVENT_IDX, Guest, INDIRECT_DESC, PROTOCOL_FEATURES, VERSION_1};
use outrigger_tests::queue::{Buffer, DriverQueue};
use outrigger_tests::ram::Ram;
use outrigger_tests::{raw, wait_until};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::subject::{Device, Subject};

/// Long enough to see that something does not happen, which a wrong device would do within
/// microseconds.
const A_WHILE: Duration = Duration::from_millis(50);

/// Fills queue [`Subject::REQUESTS`] with requests; returns their number.
fn fill<S: Subject>(guest: &mut Guest) -> usize {
    let request = S::request(&guest.ram);
    let queue = &mut guest.queues[S::REQUESTS];
    let count = queue.room() / request.len();
    for _ in 0..count {
        queue.add(&request);
    }
    count
}

pub fn are_enabled_from_the_start_without_protocol_features<S: Subject>() {
    let mut device = Device::<S>::listening();
    let mut guest = Guest::new(device.process.connect(), Ram::small());
    guest.frontend.set_owner().unwrap();
    let offered = guest.frontend.get_features().unwrap();
    assert_ne!(offered & PROTOCOL_FEATURES, 0);
    guest.features = VERSION_1 | S::FEATURES & offered;
    guest.frontend.set_features(guest.features).unwrap();
    guest.share_memory();
    for _ in 0..S::QUEUES {
        guest.add_queue(32);
    }
    device.round_trip(&mut guest);
}

/// QEMU enables the rings of a network device as soon as the protocol features are
/// negotiated, before it sets the features.
pub fn may_be_enabled_before_the_features_are_set<S: Subject>() {
    let mut device = Device::<S>::listening();
    let mut guest = Guest::new(device.process.connect(), Ram::small());
    let enable = |guest: &Guest, index: usize, state: u32, flags: u32| {
        let body = [index as u32, state].map(u32::to_le_bytes).concat();
        let request = FrontendReq::SET_VRING_ENABLE as u32;
        raw::send(&guest.stream, request, flags, 8, &body, &[]).unwrap();
    };
    guest.frontend.set_owner().unwrap();
    let offered = guest.frontend.get_features().unwrap();
    let protocol = guest.frontend.get_protocol_features().unwrap();
    guest.frontend.set_protocol_features(protocol).unwrap();
    for index in 0..S::QUEUES {
        enable(&guest, index, 1, raw::VERSION);
        enable(&guest, index, 0, raw::VERSION | raw::NEED_REPLY);
        assert_eq!(raw::receive(&guest.stream), [0; 8]);
        enable(&guest, index, 1, raw::VERSION | raw::NEED_REPLY);
        assert_eq!(raw::receive(&guest.stream), [0; 8]);
    }
    enable(&guest, 200, 1, raw::VERSION | raw::NEED_REPLY);
    assert_ne!(raw::receive(&guest.stream), [0; 8]);
    guest.features = (VERSION_1 | PROTOCOL_FEATURES | S::FEATURES) & offered;
    guest.frontend.set_features(guest.features).unwrap();
    guest.share_memory();
    for _ in 0..S::QUEUES {
        let index = guest.new_queue(32);
        guest.set_up(index, 0);
        let kick = &guest.queues[index].kick;
        guest.frontend.set_vring_kick(index, kick).unwrap();
    }
    device.round_trip(&mut guest);
    drop(guest);

    // The message is invalid without protocol features, without their feature bit, with a
    // third state, and without a body.
    let cases = [
        (false, false, 1, 8),
        (true, true, 1, 8),
        (true, false, 2, 8),
        (true, false, 1, 0),
    ];
    for (negotiate, set, state, size) in cases {
        let mut guest = Guest::new(device.process.connect(), Ram::small());
        guest.frontend.set_owner().unwrap();
        guest.frontend.get_features().unwrap();
        if negotiate {
            guest.frontend.get_protocol_features().unwrap();
            guest.frontend.set_protocol_features(protocol).unwrap();
        }
        if set {
            guest.frontend.set_features(VERSION_1).unwrap();
        }
        let body = [0, state].map(u32::to_le_bytes).concat();
        let request = FrontendReq::SET_VRING_ENABLE as u32;
        let body = &body[..size as usize];
        raw::send(&guest.stream, request, raw::VERSION, size, body, &[]).unwrap();
        assert!(
            raw::hangs_up(&guest.stream),
            "{negotiate} {set} {state} {size}"
        );
    }
    device.must_serve();
}

pub fn stay_enabled_when_features_are_set_again<S: Subject>() {
    let mut device = Device::<S>::listening();
    let mut guest = device.boot(EVENT_IDX);
    guest.frontend.set_features(guest.features).unwrap();
    device.round_trip(&mut guest);
}

pub fn keep_their_state_when_the_doorbell_is_replaced<S: Subject>() {
    let mut device = Device::<S>::listening();
    let mut guest = device.boot(EVENT_IDX);
    for index in 0..S::QUEUES {
        let doorbell = EventFd::new(EFD_NONBLOCK).unwrap();
        guest.frontend.set_vring_kick(index, &doorbell).unwrap();
        guest.queues[index].kick = doorbell;
    }
    device.round_trip(&mut guest);

    // A ring that is started and not enabled does nothing until it is enabled.
    let index = S::REQUESTS;
    guest.frontend.set_vring_enable(index, false).unwrap();
    let doorbell = EventFd::new(EFD_NONBLOCK).unwrap();
    guest.frontend.set_vring_kick(index, &doorbell).unwrap();
    guest.queues[index].kick = doorbell;
    fill::<S>(&mut guest);
    guest.queues[index].kick();
    sleep(A_WHILE);
    assert_eq!(guest.queues[index].take(), None);
    guest.frontend.set_vring_enable(index, true).unwrap();
    guest.queues[index].wait_all();
}

pub fn do_not_lose_a_kick_from_before_the_start<S: Subject>() {
    let device = Device::<S>::listening();
    for kicked in [true, false] {
        let mut guest = device.boot(EVENT_IDX);
        guest.stop(S::REQUESTS);
        let base = guest.queues[S::REQUESTS].avail_index;
        fill::<S>(&mut guest);
        if kicked {
            guest.queues[S::REQUESTS].kick();
        }
        guest.start(S::REQUESTS, base);
        guest.queues[S::REQUESTS].wait_all();
    }
}

/// Keeps a queue full until it should stop; returns the number of completed requests.
fn feed(queue: &mut DriverQueue, request: &[Buffer], stop: &AtomicBool) -> usize {
    let mut completed = 0;
    while !stop.load(Ordering::Acquire) {
        while queue.room() >= request.len() {
            queue.add(request);
        }
        queue.kick();
        while queue.take().is_some() {
            completed += 1;
        }
    }
    completed
}

pub fn have_stopped_when_get_vring_base_is_answered<S: Subject>() {
    let device = Device::<S>::listening();
    let mut guest = device.boot(EVENT_IDX);
    let request = S::request(&guest.ram);
    let mut in_the_middle = 0;
    for round in 0..400 {
        if round >= 20 && in_the_middle >= 3 {
            return;
        }
        let stop = AtomicBool::new(false);
        let first = guest.queues[S::REQUESTS].used_index;
        let Guest {
            frontend,
            queues,
            ram,
            ..
        } = &mut guest;
        let used_ring = queues[S::REQUESTS].used_ring;
        let (completed, base) = std::thread::scope(|scope| {
            let queue = &mut queues[S::REQUESTS];
            let feeder = scope.spawn(|| feed(queue, &request, &stop));
            sleep(Duration::from_micros(300 + 70 * (round % 20)));
            let base: Vec<u16> = (0..S::QUEUES)
                .map(|index| frontend.get_vring_base(index).unwrap() as u16)
                .collect();
            // All popped requests are completed, and no others will be.
            let completed = u16::from_le_bytes(ram.get(used_ring + 2, 2).try_into().unwrap());
            assert_eq!(completed, base[S::REQUESTS], "taken and not completed");
            stop.store(true, Ordering::Release);
            (feeder.join().unwrap(), base)
        });
        let at_the_stop = guest.ram.snapshot();
        let queue = &guest.queues[S::REQUESTS];
        in_the_middle += usize::from(queue.avail_index != base[S::REQUESTS]);
        guest.interrupts();
        sleep(Duration::from_millis(5));
        assert!(
            guest.ram.snapshot() == at_the_stop,
            "written to after the stop"
        );
        assert_eq!(guest.interrupts(), 0, "interrupted after the stop");

        for (index, base) in base.into_iter().enumerate() {
            guest.start(index, base);
        }
        let queue = &mut guest.queues[S::REQUESTS];
        let completed = completed + queue.wait_all().len();
        let offered = queue.avail_index.wrapping_sub(first);
        assert_eq!(completed as u16, offered, "each request exactly once");
    }
    assert!(in_the_middle > 0, "no stop came while there was work");
}

pub fn resume_where_they_stopped_and_lose_nothing<S: Subject>() {
    let mut device = Device::<S>::listening();
    let mut guest = device.boot(EVENT_IDX);
    for _ in 0..3 {
        device.round_trip(&mut guest);
        for index in 0..S::QUEUES {
            let base = guest.stop(index);
            guest.start(index, base);
        }
    }
    let offered = fill::<S>(&mut guest);
    guest.queues[S::REQUESTS].kick();
    let mut next = guest.move_to(device.process.connect());
    let queue = &mut next.queues[S::REQUESTS];
    assert_eq!(queue.wait_all().len(), offered);
    device.round_trip(&mut next);
}

/// A driver resets the device with requests in flight, and starts again in the same memory.
pub fn can_be_reset_with_requests_in_flight<S: Subject>() {
    let mut device = Device::<S>::listening();
    let mut guest = device.boot(EVENT_IDX | S::FEATURES);
    for round in 0..20 {
        fill::<S>(&mut guest);
        guest.queues[S::REQUESTS].kick();
        sleep(Duration::from_micros(20 * round));
        for index in 0..S::QUEUES {
            guest.stop(index);
            guest.queues[index].clear();
        }
        guest.frontend.set_features(guest.features).unwrap();
        for index in 0..S::QUEUES {
            guest.start(index, 0);
        }
        device.round_trip(&mut guest);
    }
}

/// When the device has closed its end of the socket, it does not write to guest memory any
/// more.
pub fn have_stopped_when_the_socket_is_closed<S: Subject>() {
    let mut device = Device::<S>::listening();
    for round in 0..20 {
        let mut guest = device.boot(EVENT_IDX);
        let request = S::request(&guest.ram);
        let stop = AtomicBool::new(false);
        let Guest {
            stream,
            queues,
            ram,
            ..
        } = &mut guest;
        let used_ring = queues[S::REQUESTS].used_ring;
        let used_index = || u16::from_le_bytes(ram.get(used_ring + 2, 2).try_into().unwrap());
        std::thread::scope(|scope| {
            let queue = &mut queues[S::REQUESTS];
            scope.spawn(|| feed(queue, &request, &stop));
            sleep(Duration::from_micros(200 + 20 * round));
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let hung_up = raw::hangs_up(stream);
            let then = used_index();
            sleep(Duration::from_millis(2));
            let now = used_index();
            stop.store(true, Ordering::Release);
            assert!(hung_up);
            assert_eq!(now, then, "it worked on after it hung up");
        });
        let before = guest.ram.snapshot();
        guest.interrupts();
        sleep(Duration::from_millis(2));
        assert!(guest.ram.snapshot() == before, "written to afterwards");
        assert_eq!(guest.interrupts(), 0);
    }
    device.must_serve();
}

pub fn are_silent_and_answer_while_stopped<S: Subject>() {
    let mut device = Device::<S>::listening();
    let mut guest = device.boot(EVENT_IDX);
    device.round_trip(&mut guest);
    let base: Vec<u16> = (0..S::QUEUES).map(|index| guest.stop(index)).collect();
    fill::<S>(&mut guest);
    guest.queues[S::REQUESTS].kick();
    guest.interrupts();
    let before = guest.ram.snapshot();
    assert!(guest.frontend.get_features().is_ok());
    assert_eq!(guest.config(0, 8).len(), 8);
    sleep(A_WHILE);
    assert!(guest.ram.snapshot() == before, "written to while stopped");
    assert_eq!(guest.interrupts(), 0);
    // A second stop returns the same index.
    assert_eq!(guest.stop(S::REQUESTS), base[S::REQUESTS]);
    for (index, base) in base.into_iter().enumerate() {
        guest.start(index, base);
    }
    guest.queues[S::REQUESTS].wait_all();
}

pub fn interrupt_only_when_asked<S: Subject>() {
    let device = Device::<S>::listening();
    let mut guest = device.boot(EVENT_IDX);
    let request = S::request(&guest.ram);
    let queue = &mut guest.queues[S::REQUESTS];
    // With a distant used_event, many requests cause no interrupt.
    queue.set_used_event(queue.used_index.wrapping_sub(2));
    for _ in 0..10 {
        queue.add(&request);
        queue.kick();
        queue.wait_all();
    }
    sleep(A_WHILE);
    assert_eq!(queue.interrupts(), 0);
    // Of the next two requests, only the second one causes an interrupt.
    queue.set_used_event(queue.used_index.wrapping_add(1));
    queue.add(&request);
    queue.kick();
    queue.wait_all();
    assert_eq!(queue.interrupts(), 0);
    queue.add(&request);
    queue.kick();
    queue.wait_all();
    wait_until("it interrupts", || queue.interrupts() == 1);
}

pub fn do_not_lose_an_interrupt<S: Subject>() {
    let device = Device::<S>::listening();
    let mut guest = device.boot(EVENT_IDX);
    let request = S::request(&guest.ram);
    let queue = &mut guest.queues[S::REQUESTS];
    // Kicks only if the device asks for it, and sleeps until each completion.
    let mut kicks = 0;
    for _ in 0..500 {
        let before = queue.avail_index;
        queue.add(&request);
        queue.add(&request);
        if queue.wants_kick(before) {
            queue.kick();
            kicks += 1;
        }
        queue.wait();
        queue.wait();
    }
    assert!(kicks > 0);
}

pub fn take_indirect_descriptors<S: Subject>() {
    let mut device = Device::<S>::listening();
    let mut guest = device.boot(EVENT_IDX | INDIRECT_DESC);
    let request = S::request(&guest.ram);
    let queue = &mut guest.queues[S::REQUESTS];
    for _ in 0..100 {
        queue.add_indirect(&request);
        queue.kick();
        queue.wait();
    }
    device.round_trip(&mut guest);
}

/// QEMU's virtio-mmio offers rings of this size for any device, and guests use all of it.
pub fn have_up_to_1024_entries<S: Subject>() {
    let mut device = Device::<S>::listening();
    let mut guest = Guest::new(device.process.connect(), Ram::small());
    guest.negotiate(S::FEATURES);
    guest.share_memory();
    for _ in 0..S::QUEUES {
        guest.add_queue(1024);
    }
    device.round_trip(&mut guest);
}

pub fn wrap_around<S: Subject>() {
    let mut device = Device::<S>::listening();
    let mut guest = device.boot(EVENT_IDX);
    for index in 0..S::QUEUES {
        guest.stop(index);
        // As after 65,500 requests.
        guest.queues[index].set_indices(65_500);
        guest.start(index, 65_500);
    }
    let request = S::request(&guest.ram);
    let queue = &mut guest.queues[S::REQUESTS];
    for _ in 0..100 {
        let before = queue.avail_index;
        queue.add(&request);
        if queue.wants_kick(before) {
            queue.kick();
        }
        queue.wait();
    }
    device.round_trip(&mut guest);
}

pub fn work_without_event_idx<S: Subject>() {
    let mut device = Device::<S>::listening();
    let mut guest = device.boot(0);
    assert_eq!(guest.features & EVENT_IDX, 0);
    let request = S::request(&guest.ram);
    let queue = &mut guest.queues[S::REQUESTS];
    for _ in 0..200 {
        let before = queue.avail_index;
        queue.add(&request);
        if queue.wants_kick(before) {
            queue.kick();
        }
        queue.wait();
    }
    device.round_trip(&mut guest);
}
