//! Section 2: device status, features, notifications, reset, configuration space,
//! virtqueue reset.

use super::*;
use crate::pci::virtio::common::status::{FAILED, NEEDS_RESET};

#[test]
fn r2_1_2_no_queue_runs_before_driver_ok() {
    let bench = bench();
    bench.accept(OFFERED);
    bench.set_up_queue(0);
    bench.set16(NOTIFY, 0);
    assert_eq!(bench.taken(), [], "nothing is started before DRIVER_OK");
    bench.add_status(DRIVER_OK);
    let requests = bench.taken();
    assert!(
        matches!(&requests[..], [Request::Start { queues, .. }] if queues.len() == 1),
        "{requests:?}"
    );
}

#[test]
fn r2_1_2_doorbells_rung_early_are_kept() {
    let bench = bench();
    bench.accept(OFFERED);
    bench.set_up_queue(0);
    bench.set16(NOTIFY, 0);
    assert_eq!(bench.device.kick(0).unwrap().read().unwrap(), 1);
}

#[test]
fn r2_1_2_a_device_in_error_sets_needs_reset_and_notifies() {
    let bench = bench();
    bench.go_live();
    bench.enable_msix();
    bench.device.failed();
    assert_ne!(bench.status() & NEEDS_RESET, 0);
    // The configuration's event waits for its vector to be unmasked.
    bench.set16(reg::CONFIG_VECTOR, 2);
    assert_eq!(bench.get8(MSIX_PENDING), 1 << 2);
}

#[test]
fn r2_1_2_no_change_notification_before_driver_ok() {
    let bench = bench();
    bench.accept(OFFERED);
    bench.enable_msix();
    bench.set16(reg::CONFIG_VECTOR, 0);
    bench.device.failed();
    assert_ne!(bench.status() & NEEDS_RESET, 0);
    assert_eq!(bench.get8(MSIX_PENDING), 0);
}

#[test]
fn r2_1_1_status_bits_are_added_and_only_a_reset_clears_them() {
    let bench = bench();
    bench.set8(reg::STATUS, ACKNOWLEDGE);
    bench.set8(reg::STATUS, DRIVER);
    assert_eq!(bench.status(), ACKNOWLEDGE | DRIVER);
    bench.set8(reg::STATUS, FAILED);
    assert_eq!(bench.status(), ACKNOWLEDGE | DRIVER | FAILED);
    bench.set8(reg::STATUS, 0);
    assert_eq!(bench.status(), 0);
}

#[test]
fn r2_1_1_driver_ok_without_features_ok_starts_nothing() {
    let bench = bench();
    bench.set8(reg::STATUS, ACKNOWLEDGE | DRIVER);
    bench.set_up_queue(0);
    bench.add_status(DRIVER_OK);
    assert_eq!(bench.status() & DRIVER_OK, 0);
    assert_eq!(bench.taken(), []);
}

#[test]
fn r2_2_2_features_ok_fails_for_a_bit_that_was_not_offered() {
    let bench = bench();
    bench.accept(OFFERED | 1 << 1);
    assert_eq!(bench.status() & FEATURES_OK, 0);
}

#[test]
fn r2_2_2_features_ok_fails_without_version_1() {
    let bench = bench();
    bench.accept(0b101);
    assert_eq!(bench.status() & FEATURES_OK, 0);
}

#[test]
fn r2_2_2_any_subset_with_version_1_is_accepted() {
    for subset in [0, 0b1, 0b100, 0b101, 1 << VIRTIO_F_RING_RESET] {
        let bench = bench();
        bench.accept(1 << VIRTIO_F_VERSION_1 | subset);
        assert_ne!(bench.status() & FEATURES_OK, 0, "{subset:#x}");
    }
}

#[test]
fn r2_2_2_features_are_fixed_after_features_ok() {
    let bench = bench();
    bench.accept(1 << VIRTIO_F_VERSION_1);
    bench.set32(reg::DRIVER_FEATURE_SELECT, 0);
    bench.set32(reg::DRIVER_FEATURE, 0b101);
    assert_eq!(bench.get32(reg::DRIVER_FEATURE), 0);
}

#[test]
fn r2_2_2_the_same_features_are_accepted_again_after_a_reset() {
    let bench = bench();
    for _ in 0..3 {
        bench.go_live();
        assert_ne!(bench.status() & DRIVER_OK, 0);
        bench.set8(reg::STATUS, 0);
        bench.device.stopped();
    }
}

#[test]
fn r2_4_1_status_is_zero_only_when_the_queues_have_stopped() {
    let bench = bench();
    bench.go_live();
    bench.taken();
    bench.set8(reg::STATUS, 0);
    assert_eq!(bench.taken(), [Request::Stop]);
    assert_ne!(bench.status(), 0, "the reset is still going on");
    bench.device.stopped();
    assert_eq!(bench.status(), 0);
}

#[test]
fn r2_4_1_nothing_is_accepted_while_a_reset_goes_on() {
    let bench = bench();
    bench.go_live();
    bench.taken();
    bench.set8(reg::STATUS, 0);
    bench.set8(reg::STATUS, 0);
    bench.set8(reg::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    assert_eq!(bench.taken(), [Request::Stop]);
    bench.device.stopped();
    assert_eq!(bench.status(), 0);
}

#[test]
fn r2_4_1_no_notification_after_a_reset() {
    let bench = bench();
    bench.go_live();
    bench.enable_msix();
    bench.set16(reg::QUEUE_SELECT, 0);
    bench.set16(reg::QUEUE_VECTOR, 0);
    bench.device.call(0).unwrap().write(1).unwrap();
    assert_eq!(bench.get8(MSIX_PENDING), 1);
    bench.set8(reg::STATUS, 0);
    bench.device.stopped();
    bench.set16(reg::QUEUE_VECTOR, 0);
    assert_eq!(bench.get8(MSIX_PENDING), 0, "what was pending is forgotten");
}

#[test]
fn r2_5_2_configuration_can_be_read_before_features_ok() {
    let bench = bench();
    assert_eq!(bench.read::<4>(DEVICE + 8), [8, 9, 10, 11]);
    assert_eq!(bench.get8(DEVICE + 59), 59);
    assert_eq!(bench.get8(DEVICE + 60), 0, "padding");
}

#[test]
fn r2_5_the_driver_can_write_the_configuration() {
    let bench = bench();
    bench.set8(DEVICE + 32, 1);
    assert_eq!(bench.get8(DEVICE + 32), 1);
    let expected = Request::WriteConfig {
        offset: 32,
        data: vec![1],
    };
    assert_eq!(bench.taken(), [expected]);
    bench.set32(DEVICE + CONFIG_LENGTH as u64 - 2, 0);
    assert_eq!(bench.taken(), [], "across the end");
}

#[test]
fn r2_6_1_1_a_queue_is_reset_alone() {
    let bench = bench();
    bench.go_live();
    bench.taken();
    bench.set16(reg::QUEUE_SELECT, 1);
    bench.set16(reg::QUEUE_RESET, 1);
    assert_eq!(bench.taken(), [Request::StopQueue(1)]);
    assert_eq!(bench.get16(reg::QUEUE_RESET), 1, "still going on");
    bench.device.queue_stopped(1);
    assert_eq!(bench.get16(reg::QUEUE_RESET), 0);
    assert_eq!(bench.get16(reg::QUEUE_ENABLE), 0);
    assert_eq!(bench.get16(reg::QUEUE_SIZE), 256, "as after a device reset");
    bench.set16(reg::QUEUE_SELECT, 0);
    assert_eq!(bench.get16(reg::QUEUE_ENABLE), 1, "the other goes on");
}

#[test]
fn r2_6_1_2_a_queue_can_be_enabled_again_after_its_reset() {
    let bench = bench();
    bench.go_live();
    bench.set16(reg::QUEUE_SELECT, 1);
    bench.set16(reg::QUEUE_RESET, 1);
    bench.device.queue_stopped(1);
    bench.taken();
    bench.set_up_queue(1);
    let requests = bench.taken();
    assert!(
        matches!(requests[..], [Request::StartQueue(setup)] if setup.index == 1 && setup.size == 8),
        "{requests:?}"
    );
}

#[test]
fn r2_6_1_no_queue_reset_unless_negotiated() {
    let bench = bench();
    bench.accept(1 << VIRTIO_F_VERSION_1);
    bench.set_up_queue(0);
    bench.add_status(DRIVER_OK);
    bench.taken();
    bench.set16(reg::QUEUE_RESET, 1);
    assert_eq!(bench.taken(), []);
    assert_eq!(bench.get16(reg::QUEUE_RESET), 0);
}
