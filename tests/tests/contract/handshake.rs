//! The handshake.

use outrigger_tests::guest::{EVENT_IDX, Guest, INDIRECT_DESC, PROTOCOL_FEATURES, VERSION_1};
use outrigger_tests::ram::Ram;
use outrigger_tests::raw;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{FrontendReq, VhostUserConfigFlags, VhostUserProtocolFeatures};
use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;

use crate::subject::{Device, Subject};

pub fn offers_what_every_device_offers<S: Subject>() {
    let device = Device::<S>::listening();
    let mut guest = Guest::new(device.process.connect(), Ram::small());
    let offered = guest.frontend.get_features().unwrap();
    let wanted = VERSION_1 | EVENT_IDX | INDIRECT_DESC | PROTOCOL_FEATURES | S::FEATURES;
    assert_eq!(offered & wanted, wanted, "{offered:#x}");
    // Packed rings are not supported, so they must not be offered.
    assert_eq!(offered & (1 << VIRTIO_F_RING_PACKED), 0);

    guest.frontend.set_features(wanted).unwrap();
    let offered = guest.frontend.get_protocol_features().unwrap();
    let wanted = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::REPLY_ACK;
    assert!(offered.contains(wanted), "{offered:?}");
}

pub fn reports_its_number_of_queues<S: Subject>() {
    let device = Device::<S>::listening();
    let mut guest = device.boot(0);
    assert_eq!(guest.frontend.get_queue_num().unwrap(), S::QUEUES as u64);
    assert!(guest.frontend.get_max_mem_slots().unwrap() > 8);
}

pub fn refuses_features_that_it_did_not_offer<S: Subject>() {
    let mut device = Device::<S>::listening();
    let mut guest = device.boot(0);
    let packed = guest.features | 1 << VIRTIO_F_RING_PACKED;
    guest.frontend.set_features(packed).unwrap_err();
    guest.frontend.set_features(guest.features).unwrap();
    device.round_trip(&mut guest);
}

pub fn pads_and_bounds_its_configuration_space<S: Subject>() {
    let mut device = Device::<S>::listening();
    let mut guest = device.boot(0);
    let whole = guest.config(0, 256);
    assert_eq!(guest.config(4, 12), whole[4..16]);
    assert_eq!(guest.config(200, 56), [0; 56]);

    // Beyond the end, the answer is an error, with a length of zero. (The front end of
    // crate vhost would wait for the rest for ever.)
    let ask = |guest: &Guest, offset: u32, size: u32| {
        let range = [offset, size, 0].map(u32::to_le_bytes).concat();
        let payload = [range, vec![0; size as usize]].concat();
        let request = FrontendReq::GET_CONFIG as u32;
        let len = payload.len() as u32;
        raw::send(&guest.stream, request, raw::VERSION, len, &payload, &[]).unwrap();
    };
    for (offset, size) in [(200, 57), (256, 1), (0, 257), (0xfff, 1)] {
        ask(&guest, offset, size);
        let answer = raw::receive(&guest.stream);
        assert_eq!(answer.len(), 12, "no data");
        assert_eq!(answer[4..8], [0; 4], "a size of zero");
    }
    assert_eq!(guest.config(0, 256), whole);
    drop(guest);

    // An invalid range may end the connection.
    for (offset, size) in [(u32::MAX, 2), (0, 0)] {
        let guest = device.boot(0);
        ask(&guest, offset, size);
        assert!(raw::hangs_up(&guest.stream));
    }
    device.must_serve();
}

pub fn refuses_writes_to_its_configuration_space<S: Subject>() {
    let mut device = Device::<S>::listening();
    let mut guest = device.boot(0);
    let before = guest.config(0, 64);
    let flags = VhostUserConfigFlags::WRITABLE;
    for (offset, len) in [(0, 8), (250, 6)] {
        let write = guest.frontend.set_config(offset, flags, &vec![0xff; len]);
        write.unwrap_err();
    }
    assert_eq!(guest.config(0, 64), before);
    device.round_trip(&mut guest);
}

pub fn serves_one_front_end_after_the_other<S: Subject>() {
    let mut device = Device::<S>::listening();
    for features in [0, EVENT_IDX, S::FEATURES | EVENT_IDX | INDIRECT_DESC, 0] {
        let mut guest = device.boot(features);
        device.round_trip(&mut guest);
        device.round_trip(&mut guest);
    }
}

pub fn survives_a_disconnect_within_a_message<S: Subject>() {
    let mut device = Device::<S>::listening();
    let request = FrontendReq::SET_VRING_NUM as u32;
    for sent in 0..8 {
        let guest = device.boot(EVENT_IDX);
        let body = vec![0; sent];
        raw::send(&guest.stream, request, raw::VERSION, 8, &body, &[]).unwrap();
    }
    device.must_serve();
}
