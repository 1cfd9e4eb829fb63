//! Section 4.1: virtio over PCI, without its interrupts.

use super::*;

#[test]
fn r4_1_2_1_vendor_and_device_id() {
    let dut = test_device();
    assert_eq!(u16::from_le_bytes(dut.config(register::VENDOR)), 0x1af4);
    assert_eq!(u16::from_le_bytes(dut.config(register::DEVICE)), 0x1042);
}

#[test]
fn r4_1_2_1_revision_and_subsystem_id_of_a_modern_device() {
    let dut = test_device();
    assert!(dut.config::<1>(register::REVISION)[0] >= 1);
    assert!(u16::from_le_bytes(dut.config(register::SUBSYSTEM)) >= 0x40);
}

#[test]
fn r4_1_4_2_cap_len_covers_the_extra_data() {
    let dut = test_device();
    for (kind, length) in [(1, 16), (2, 20), (3, 16), (4, 16), (5, 20)] {
        assert_eq!(dut.structure(kind).1, length, "structure {kind}");
    }
}

#[test]
fn r4_1_4_structures_lie_within_the_bar_and_apart() {
    let dut = test_device();
    let mut spans: Vec<(u32, u32)> = (1..=4)
        .map(|kind| {
            let (_, _, bar, offset, length) = dut.structure(kind);
            assert_eq!(bar, 0);
            (offset, offset + length)
        })
        .collect();
    spans.sort_unstable();
    assert!(spans.windows(2).all(|w| w[0].1 <= w[1].0));
    assert!(spans.iter().all(|s| s.0 < s.1 && s.1 <= BAR_SIZE));
}

#[test]
fn r4_1_4_3_1_common_configuration_is_aligned() {
    assert_eq!(test_device().structure(1).3 % 4, 0);
}

#[test]
fn r4_1_4_3_1_device_features_by_halves_and_zero_beyond() {
    let dut = test_device();
    let mut seen = Vec::new();
    for select in 0..4 {
        dut.set32(reg::DEVICE_FEATURE_SELECT, select);
        assert_eq!(dut.get32(reg::DEVICE_FEATURE_SELECT), select);
        seen.push(dut.get32(reg::DEVICE_FEATURE));
    }
    assert_eq!(seen, [OFFERED as u32, (OFFERED >> 32) as u32, 0, 0]);
}

#[test]
fn r4_1_4_3_1_driver_features_read_back() {
    let dut = test_device();
    dut.accept(OFFERED);
    for (select, expected) in [(0, OFFERED as u32), (1, (OFFERED >> 32) as u32), (2, 0)] {
        dut.set32(reg::DRIVER_FEATURE_SELECT, select);
        assert_eq!(dut.get32(reg::DRIVER_FEATURE), expected);
    }
}

#[test]
fn r4_1_4_3_1_config_generation_changes_with_the_configuration() {
    let dut = test_device();
    let before = dut.get8(reg::GENERATION);
    dut.device.set_config((0..60).collect());
    assert_eq!(dut.get8(reg::GENERATION), before, "nothing changed");
    dut.device.set_config(vec![7; 60]);
    assert_ne!(dut.get8(reg::GENERATION), before);
    assert_eq!(dut.get8(DEVICE), 7);
}

#[test]
fn r4_1_4_3_1_reset_by_status_zero_reads_back_zero() {
    let dut = test_device();
    dut.accept(OFFERED);
    dut.set8(reg::STATUS, 0);
    assert_eq!(dut.status(), 0);
    assert_eq!(dut.take_requests(), [], "there was nothing to stop");
}

#[test]
fn r4_1_4_3_1_queue_enable_is_zero_after_reset() {
    let dut = test_device();
    dut.activate();
    dut.set8(reg::STATUS, 0);
    dut.device.complete_reset();
    for queue in 0..QUEUES as u16 {
        dut.set16(reg::QUEUE_SELECT, queue);
        assert_eq!(dut.get16(reg::QUEUE_ENABLE), 0);
        assert_eq!(dut.get16(reg::QUEUE_RESET), 0);
    }
}

#[test]
fn r4_1_4_3_1_a_queue_that_does_not_exist_has_size_zero() {
    let dut = test_device();
    assert_eq!(usize::from(dut.get16(reg::NUM_QUEUES)), QUEUES);
    for queue in [QUEUES as u16, 100, u16::MAX] {
        dut.set16(reg::QUEUE_SELECT, queue);
        assert_eq!(dut.get16(reg::QUEUE_SELECT), queue);
        assert_eq!(dut.get16(reg::QUEUE_SIZE), 0);
        dut.set_up_queue(queue);
        assert_eq!(dut.get16(reg::QUEUE_SIZE), 0);
        assert_eq!(dut.get16(reg::QUEUE_ENABLE), 0);
    }
    dut.set16(reg::QUEUE_SELECT, 0);
    assert_eq!(dut.get16(reg::QUEUE_ENABLE), 0, "no other was touched");
}

#[test]
fn r4_1_4_3_queue_size_is_a_power_of_two_up_to_the_maximum() {
    let dut = test_device();
    assert_eq!(dut.get16(reg::QUEUE_SIZE), 256);
    for bad in [0, 3, 512, u16::MAX] {
        dut.set16(reg::QUEUE_SIZE, bad);
        assert_eq!(dut.get16(reg::QUEUE_SIZE), 256, "{bad}");
    }
    dut.set16(reg::QUEUE_SIZE, 64);
    assert_eq!(dut.get16(reg::QUEUE_SIZE), 64);
}

#[test]
fn r4_1_4_3_only_enabled_queues_start_with_the_setup_of_the_driver() {
    let dut = test_device();
    dut.activate();
    let [TransportRequest::Activate { features, queues }] = &dut.take_requests()[..] else {
        panic!("no start");
    };
    assert_eq!(*features, OFFERED);
    let indices: Vec<_> = queues.iter().map(|q| q.index).collect();
    assert_eq!(indices, [0, 1]);
    assert_eq!(queues[1].descriptors, 0x2000);
    assert_eq!(
        (queues[0].driver, queues[0].device),
        (0x1_0000_2000, 0x3000)
    );
    assert_eq!(queues[0].size, 8);
}

#[test]
fn r4_1_4_3_an_enabled_queue_is_not_changed() {
    let dut = test_device();
    dut.accept(OFFERED);
    dut.set_up_queue(0);
    dut.set16(reg::QUEUE_SIZE, 16);
    dut.set64(reg::QUEUE_DESC, 0xdead_0000);
    dut.set16(reg::QUEUE_ENABLE, 0);
    assert_eq!(dut.get16(reg::QUEUE_SIZE), 8);
    assert_eq!(dut.get32(reg::QUEUE_DESC), 0x1000);
    assert_eq!(dut.get16(reg::QUEUE_ENABLE), 1);
}

#[test]
fn r4_1_4_4_1_notification_structure() {
    let dut = test_device();
    let (at, _, _, offset, length) = dut.structure(2);
    let multiplier = u32::from_le_bytes(dut.config(at + 16));
    assert!(multiplier.is_power_of_two() && multiplier >= 2);
    assert_eq!(offset % 2, 0);
    for queue in 0..QUEUES as u16 {
        dut.set16(reg::QUEUE_SELECT, queue);
        let place = u32::from(dut.get16(reg::QUEUE_NOTIFY_OFF)) * multiplier;
        assert!(length >= place + 2);
    }
}

#[test]
fn r4_1_4_4_doorbells_follow_the_bar() {
    let dut = test_device();
    let doorbells = || dut.irq_routing.doorbells.lock().unwrap().clone();
    let base = crate::layout::PCI_WINDOW + NOTIFY;
    assert_eq!(doorbells(), [base, base + 4, base + 8]);
    dut.device
        .write_config(register::BAR0, &0xd000_0000_u32.to_le_bytes());
    assert_eq!(doorbells()[0], 0xd000_0000 + NOTIFY);
    assert_eq!(dut.device.bar(), Some(0xd000_0000..0xd001_0000));
    dut.device.write_config(register::COMMAND, &[0, 0]);
    assert!(doorbells().is_empty() && dut.device.bar().is_none());
}

#[test]
fn r4_1_4_6_1_device_configuration_is_aligned() {
    let (_, _, _, offset, length) = test_device().structure(4);
    assert_eq!(offset % 4, 0);
    assert!(length >= 60);
}

#[test]
fn r4_1_4_9_1_the_bar_is_reachable_through_configuration_space() {
    let dut = test_device();
    let (at, ..) = dut.structure(5);
    let describe = |offset: u64, length: u32| {
        dut.device.write_config(at + 4, &[0]);
        dut.device
            .write_config(at + 8, &(offset as u32).to_le_bytes());
        dut.device.write_config(at + 12, &length.to_le_bytes());
    };
    describe(reg::STATUS, 1);
    dut.device.write_config(at + 16, &[ACKNOWLEDGE]);
    assert_eq!(dut.status(), ACKNOWLEDGE);
    assert_eq!(dut.config::<1>(at + 16), [ACKNOWLEDGE]);
    describe(DEVICE + 4, 4);
    assert_eq!(dut.config::<4>(at + 16), [4, 5, 6, 7]);
    describe(reg::NUM_QUEUES, 2);
    assert_eq!(dut.config::<2>(at + 16), [QUEUES as u8, 0]);
    // It works with memory decoding off, too; firmware needs that.
    dut.device.write_config(register::COMMAND, &[0, 0]);
    assert_eq!(dut.config::<2>(at + 16), [QUEUES as u8, 0]);
}

#[test]
fn r4_1_4_9_1_invalid_accesses_do_nothing() {
    let dut = test_device();
    let (at, ..) = dut.structure(5);
    for (bar, offset, length) in [
        (1, 20, 1),
        (0, u32::MAX, 1),
        (0, 20, 3),
        (0, 20, 0),
        (0, 21, 2),
        (0, BAR_SIZE, 1),
    ] {
        dut.device.write_config(at + 4, &[bar]);
        dut.device.write_config(at + 8, &u32::to_le_bytes(offset));
        dut.device.write_config(at + 12, &u32::to_le_bytes(length));
        dut.device.write_config(at + 16, &[ACKNOWLEDGE; 4]);
        assert_eq!(dut.status(), 0, "BAR {bar}, {offset:#x}, {length} bytes");
    }
}

#[test]
fn r4_1_3_1_wide_fields_can_be_accessed_by_halves() {
    let dut = test_device();
    dut.set32(reg::QUEUE_DESC + 4, 0x12);
    dut.set32(reg::QUEUE_DESC, 0x3456_7890);
    assert_eq!(
        dut.read::<8>(reg::QUEUE_DESC),
        0x12_3456_7890_u64.to_le_bytes()
    );
}

#[test]
fn r4_1_accesses_of_any_size_and_alignment_do_no_harm() {
    let dut = test_device();
    for offset in (0..u64::from(BAR_SIZE)).step_by(0xffd) {
        for len in 1..=8 {
            let mut data = vec![0xff; len];
            dut.device.read_bar(offset, &mut data);
            dut.device.write_bar(offset, &data);
        }
    }
    for offset in 0..300 {
        dut.device.read_config(offset, &mut [0; 8]);
        dut.device.write_config(offset, &[0xff; 8]);
    }
}

#[test]
fn r4_1_a_machine_reset_resets_all_registers() {
    let dut = test_device();
    let address: [u8; 4] = dut.config(register::BAR0);
    dut.activate();
    dut.enable_msix();
    dut.device.write_config(register::BAR0, &[0; 4]);
    dut.device.reset();
    assert_eq!(dut.config::<4>(register::BAR0), address);
    assert_eq!(dut.config::<2>(register::COMMAND), [0, 0]);
    assert_eq!(dut.config::<2>(dut.msix() + 2)[1] & 0x80, 0);
    assert_eq!(dut.status(), 0);
    assert!(dut.attached().is_empty());
    assert!(dut.irq_routing.doorbells.lock().unwrap().is_empty());
}
