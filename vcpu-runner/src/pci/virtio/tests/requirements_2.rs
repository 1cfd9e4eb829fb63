//! Section 2: device status, features, notifications, reset, configuration space,
//! virtqueue reset.

use super::*;
use crate::pci::virtio::common_config::status::{FAILED, NEEDS_RESET};

#[test]
fn r2_1_2_no_queue_runs_before_driver_ok() {
    let dut = test_device();
    dut.accept(OFFERED);
    dut.set_up_queue(0);
    dut.set16(NOTIFY, 0);
    assert_eq!(
        dut.take_requests(),
        [],
        "nothing is started before DRIVER_OK"
    );
    dut.add_status(DRIVER_OK);
    let requests = dut.take_requests();
    assert!(
        matches!(&requests[..], [TransportRequest::Activate { queues, .. }] if queues.len() == 1),
        "{requests:?}"
    );
}

#[test]
fn r2_1_2_doorbells_before_driver_ok_are_kept() {
    let dut = test_device();
    dut.accept(OFFERED);
    dut.set_up_queue(0);
    dut.set16(NOTIFY, 0);
    assert_eq!(dut.device.kick(0).unwrap().read().unwrap(), 1);
}

#[test]
fn r2_1_2_a_device_in_error_sets_needs_reset_and_notifies() {
    let dut = test_device();
    dut.activate();
    dut.enable_msix();
    dut.device.set_needs_reset();
    assert_ne!(dut.status() & NEEDS_RESET, 0);
    // The vector of configuration changes is masked, so the event is pending.
    dut.set16(reg::CONFIG_VECTOR, 2);
    assert_eq!(dut.get8(MSIX_PENDING), 1 << 2);
}

#[test]
fn r2_1_2_no_change_notification_before_driver_ok() {
    let dut = test_device();
    dut.accept(OFFERED);
    dut.enable_msix();
    dut.set16(reg::CONFIG_VECTOR, 0);
    dut.device.set_needs_reset();
    assert_ne!(dut.status() & NEEDS_RESET, 0);
    assert_eq!(dut.get8(MSIX_PENDING), 0);
}

#[test]
fn r2_1_1_status_bits_are_added_and_only_a_reset_clears_them() {
    let dut = test_device();
    dut.set8(reg::STATUS, ACKNOWLEDGE);
    dut.set8(reg::STATUS, DRIVER);
    assert_eq!(dut.status(), ACKNOWLEDGE | DRIVER);
    dut.set8(reg::STATUS, FAILED);
    assert_eq!(dut.status(), ACKNOWLEDGE | DRIVER | FAILED);
    dut.set8(reg::STATUS, 0);
    assert_eq!(dut.status(), 0);
}

#[test]
fn r2_1_1_driver_ok_without_features_ok_starts_nothing() {
    let dut = test_device();
    dut.set8(reg::STATUS, ACKNOWLEDGE | DRIVER);
    dut.set_up_queue(0);
    dut.add_status(DRIVER_OK);
    assert_eq!(dut.status() & DRIVER_OK, 0);
    assert_eq!(dut.take_requests(), []);
}

#[test]
fn r2_2_2_features_ok_fails_for_a_bit_that_was_not_offered() {
    let dut = test_device();
    dut.accept(OFFERED | 1 << 1);
    assert_eq!(dut.status() & FEATURES_OK, 0);
}

#[test]
fn r2_2_2_features_ok_fails_without_version_1() {
    let dut = test_device();
    dut.accept(0b101);
    assert_eq!(dut.status() & FEATURES_OK, 0);
}

#[test]
fn r2_2_2_any_subset_with_version_1_is_accepted() {
    for subset in [0, 0b1, 0b100, 0b101, 1 << VIRTIO_F_RING_RESET] {
        let dut = test_device();
        dut.accept(1 << VIRTIO_F_VERSION_1 | subset);
        assert_ne!(dut.status() & FEATURES_OK, 0, "{subset:#x}");
    }
}

#[test]
fn r2_2_2_features_do_not_change_after_features_ok() {
    let dut = test_device();
    dut.accept(1 << VIRTIO_F_VERSION_1);
    dut.set32(reg::DRIVER_FEATURE_SELECT, 0);
    dut.set32(reg::DRIVER_FEATURE, 0b101);
    assert_eq!(dut.get32(reg::DRIVER_FEATURE), 0);
}

#[test]
fn r2_2_2_the_same_features_are_accepted_again_after_a_reset() {
    let dut = test_device();
    for _ in 0..3 {
        dut.activate();
        assert_ne!(dut.status() & DRIVER_OK, 0);
        dut.set8(reg::STATUS, 0);
        dut.device.complete_reset();
    }
}

#[test]
fn r2_4_1_status_is_zero_only_when_the_queues_have_stopped() {
    let dut = test_device();
    dut.activate();
    dut.take_requests();
    dut.set8(reg::STATUS, 0);
    assert_eq!(dut.take_requests(), [TransportRequest::Reset]);
    assert_ne!(dut.status(), 0, "the reset is still going on");
    dut.device.complete_reset();
    assert_eq!(dut.status(), 0);
}

#[test]
fn r2_4_1_writes_are_ignored_during_a_reset() {
    let dut = test_device();
    dut.activate();
    dut.take_requests();
    dut.set8(reg::STATUS, 0);
    dut.set8(reg::STATUS, 0);
    dut.set8(reg::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    assert_eq!(dut.take_requests(), [TransportRequest::Reset]);
    dut.device.complete_reset();
    assert_eq!(dut.status(), 0);
}

#[test]
fn r2_4_1_no_notification_after_a_reset() {
    let dut = test_device();
    dut.activate();
    dut.enable_msix();
    dut.set16(reg::QUEUE_SELECT, 0);
    dut.set16(reg::QUEUE_VECTOR, 0);
    dut.device.call(0).unwrap().write(1).unwrap();
    assert_eq!(dut.get8(MSIX_PENDING), 1);
    dut.set8(reg::STATUS, 0);
    dut.device.complete_reset();
    dut.set16(reg::QUEUE_VECTOR, 0);
    assert_eq!(dut.get8(MSIX_PENDING), 0, "what was pending is forgotten");
}

#[test]
fn r2_5_2_configuration_can_be_read_before_features_ok() {
    let dut = test_device();
    assert_eq!(dut.read::<4>(DEVICE + 8), [8, 9, 10, 11]);
    assert_eq!(dut.get8(DEVICE + 59), 59);
    assert_eq!(dut.get8(DEVICE + 60), 0, "padding");
}

#[test]
fn r2_5_the_driver_can_write_the_configuration() {
    let dut = test_device();
    dut.set8(DEVICE + 32, 1);
    assert_eq!(dut.get8(DEVICE + 32), 1);
    let expected = TransportRequest::WriteConfig {
        offset: 32,
        data: vec![1],
    };
    assert_eq!(dut.take_requests(), [expected]);
    dut.set32(DEVICE + CONFIG_LENGTH as u64 - 2, 0);
    assert_eq!(dut.take_requests(), [], "across the end");
}

#[test]
fn r2_6_1_1_a_queue_is_reset_alone() {
    let dut = test_device();
    dut.activate();
    dut.take_requests();
    dut.set16(reg::QUEUE_SELECT, 1);
    dut.set16(reg::QUEUE_RESET, 1);
    assert_eq!(dut.take_requests(), [TransportRequest::StopQueue(1)]);
    assert_eq!(dut.get16(reg::QUEUE_RESET), 1, "still going on");
    dut.device.complete_queue_reset(1);
    assert_eq!(dut.get16(reg::QUEUE_RESET), 0);
    assert_eq!(dut.get16(reg::QUEUE_ENABLE), 0);
    assert_eq!(dut.get16(reg::QUEUE_SIZE), 256, "as after a device reset");
    dut.set16(reg::QUEUE_SELECT, 0);
    assert_eq!(dut.get16(reg::QUEUE_ENABLE), 1, "the other goes on");
}

#[test]
fn r2_6_1_2_a_queue_can_be_enabled_again_after_its_reset() {
    let dut = test_device();
    dut.activate();
    dut.set16(reg::QUEUE_SELECT, 1);
    dut.set16(reg::QUEUE_RESET, 1);
    dut.device.complete_queue_reset(1);
    dut.take_requests();
    dut.set_up_queue(1);
    let requests = dut.take_requests();
    assert!(
        matches!(requests[..], [TransportRequest::StartQueue(setup)] if setup.index == 1 && setup.size == 8),
        "{requests:?}"
    );
}

#[test]
fn r2_6_1_no_queue_reset_unless_negotiated() {
    let dut = test_device();
    dut.accept(1 << VIRTIO_F_VERSION_1);
    dut.set_up_queue(0);
    dut.add_status(DRIVER_OK);
    dut.take_requests();
    dut.set16(reg::QUEUE_RESET, 1);
    assert_eq!(dut.take_requests(), []);
    assert_eq!(dut.get16(reg::QUEUE_RESET), 0);
}
