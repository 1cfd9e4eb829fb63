//! Section 4.1: virtio over PCI, without its interrupts.

use super::*;

#[test]
fn r4_1_2_1_vendor_and_device_id() {
    let bench = bench();
    assert_eq!(u16::from_le_bytes(bench.config(register::VENDOR)), 0x1af4);
    assert_eq!(u16::from_le_bytes(bench.config(register::DEVICE)), 0x1042);
}

#[test]
fn r4_1_2_1_revision_and_subsystem_id_of_a_modern_device() {
    let bench = bench();
    assert!(bench.config::<1>(register::REVISION)[0] >= 1);
    assert!(u16::from_le_bytes(bench.config(register::SUBSYSTEM)) >= 0x40);
}

#[test]
fn r4_1_4_2_cap_len_covers_the_extra_data() {
    let bench = bench();
    for (kind, length) in [(1, 16), (2, 20), (3, 16), (4, 16), (5, 20)] {
        assert_eq!(bench.structure(kind).1, length, "structure {kind}");
    }
}

#[test]
fn r4_1_4_structures_lie_within_the_bar_and_apart() {
    let bench = bench();
    let mut spans: Vec<(u32, u32)> = (1..=4)
        .map(|kind| {
            let (_, _, bar, offset, length) = bench.structure(kind);
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
    assert_eq!(bench().structure(1).3 % 4, 0);
}

#[test]
fn r4_1_4_3_1_device_features_by_halves_and_zero_beyond() {
    let bench = bench();
    let mut seen = Vec::new();
    for select in 0..4 {
        bench.set32(reg::DEVICE_FEATURE_SELECT, select);
        assert_eq!(bench.get32(reg::DEVICE_FEATURE_SELECT), select);
        seen.push(bench.get32(reg::DEVICE_FEATURE));
    }
    assert_eq!(seen, [OFFERED as u32, (OFFERED >> 32) as u32, 0, 0]);
}

#[test]
fn r4_1_4_3_1_driver_features_read_back() {
    let bench = bench();
    bench.accept(OFFERED);
    for (select, expected) in [(0, OFFERED as u32), (1, (OFFERED >> 32) as u32), (2, 0)] {
        bench.set32(reg::DRIVER_FEATURE_SELECT, select);
        assert_eq!(bench.get32(reg::DRIVER_FEATURE), expected);
    }
}

#[test]
fn r4_1_4_3_1_config_generation_changes_with_the_configuration() {
    let bench = bench();
    let before = bench.get8(reg::GENERATION);
    bench.device.set_config((0..60).collect());
    assert_eq!(bench.get8(reg::GENERATION), before, "nothing changed");
    bench.device.set_config(vec![7; 60]);
    assert_ne!(bench.get8(reg::GENERATION), before);
    assert_eq!(bench.get8(DEVICE), 7);
}

#[test]
fn r4_1_4_3_1_reset_by_status_zero_reads_back_zero() {
    let bench = bench();
    bench.accept(OFFERED);
    bench.set8(reg::STATUS, 0);
    assert_eq!(bench.status(), 0);
    assert_eq!(bench.taken(), [], "there was nothing to stop");
}

#[test]
fn r4_1_4_3_1_queue_enable_is_zero_after_reset() {
    let bench = bench();
    bench.go_live();
    bench.set8(reg::STATUS, 0);
    bench.device.stopped();
    for queue in 0..QUEUES as u16 {
        bench.set16(reg::QUEUE_SELECT, queue);
        assert_eq!(bench.get16(reg::QUEUE_ENABLE), 0);
        assert_eq!(bench.get16(reg::QUEUE_RESET), 0);
    }
}

#[test]
fn r4_1_4_3_1_a_queue_that_does_not_exist_has_size_zero() {
    let bench = bench();
    assert_eq!(usize::from(bench.get16(reg::NUM_QUEUES)), QUEUES);
    for queue in [QUEUES as u16, 100, u16::MAX] {
        bench.set16(reg::QUEUE_SELECT, queue);
        assert_eq!(bench.get16(reg::QUEUE_SELECT), queue);
        assert_eq!(bench.get16(reg::QUEUE_SIZE), 0);
        bench.set_up_queue(queue);
        assert_eq!(bench.get16(reg::QUEUE_SIZE), 0);
        assert_eq!(bench.get16(reg::QUEUE_ENABLE), 0);
    }
    bench.set16(reg::QUEUE_SELECT, 0);
    assert_eq!(bench.get16(reg::QUEUE_ENABLE), 0, "no other was touched");
}

#[test]
fn r4_1_4_3_queue_size_is_a_power_of_two_up_to_the_maximum() {
    let bench = bench();
    assert_eq!(bench.get16(reg::QUEUE_SIZE), 256);
    for bad in [0, 3, 512, u16::MAX] {
        bench.set16(reg::QUEUE_SIZE, bad);
        assert_eq!(bench.get16(reg::QUEUE_SIZE), 256, "{bad}");
    }
    bench.set16(reg::QUEUE_SIZE, 64);
    assert_eq!(bench.get16(reg::QUEUE_SIZE), 64);
}

#[test]
fn r4_1_4_3_only_enabled_queues_start_and_as_they_were_set_up() {
    let bench = bench();
    bench.go_live();
    let [Request::Start { features, queues }] = &bench.taken()[..] else {
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
    let bench = bench();
    bench.accept(OFFERED);
    bench.set_up_queue(0);
    bench.set16(reg::QUEUE_SIZE, 16);
    bench.set64(reg::QUEUE_DESC, 0xdead_0000);
    bench.set16(reg::QUEUE_ENABLE, 0);
    assert_eq!(bench.get16(reg::QUEUE_SIZE), 8);
    assert_eq!(bench.get32(reg::QUEUE_DESC), 0x1000);
    assert_eq!(bench.get16(reg::QUEUE_ENABLE), 1);
}

#[test]
fn r4_1_4_4_1_notification_structure() {
    let bench = bench();
    let (at, _, _, offset, length) = bench.structure(2);
    let multiplier = u32::from_le_bytes(bench.config(at + 16));
    assert!(multiplier.is_power_of_two() && multiplier >= 2);
    assert_eq!(offset % 2, 0);
    for queue in 0..QUEUES as u16 {
        bench.set16(reg::QUEUE_SELECT, queue);
        let place = u32::from(bench.get16(reg::QUEUE_NOTIFY_OFF)) * multiplier;
        assert!(length >= place + 2);
    }
}

#[test]
fn r4_1_4_4_doorbells_follow_the_bar() {
    let bench = bench();
    let doorbells = || bench.recorder.doorbells.lock().unwrap().clone();
    let base = u64::from(layout::PCI_WINDOW as u32) + NOTIFY;
    assert_eq!(doorbells(), [base, base + 4, base + 8]);
    bench
        .device
        .write_config(register::BAR0, &0xd000_0000_u32.to_le_bytes());
    assert_eq!(doorbells()[0], 0xd000_0000 + NOTIFY);
    assert_eq!(bench.device.bar(), Some(0xd000_0000..0xd001_0000));
    bench.device.write_config(register::COMMAND, &[0, 0]);
    assert!(doorbells().is_empty() && bench.device.bar().is_none());
}

#[test]
fn r4_1_4_6_1_device_configuration_is_aligned() {
    let (_, _, _, offset, length) = bench().structure(4);
    assert_eq!(offset % 4, 0);
    assert!(length >= 60);
}

#[test]
fn r4_1_4_9_1_the_bar_is_reachable_through_configuration_space() {
    let bench = bench();
    let (at, ..) = bench.structure(5);
    let window = |offset: u64, length: u32| {
        bench.device.write_config(at + 4, &[0]);
        bench
            .device
            .write_config(at + 8, &(offset as u32).to_le_bytes());
        bench.device.write_config(at + 12, &length.to_le_bytes());
    };
    window(reg::STATUS, 1);
    bench.device.write_config(at + 16, &[ACKNOWLEDGE]);
    assert_eq!(bench.status(), ACKNOWLEDGE);
    assert_eq!(bench.config::<1>(at + 16), [ACKNOWLEDGE]);
    window(DEVICE + 4, 4);
    assert_eq!(bench.config::<4>(at + 16), [4, 5, 6, 7]);
    window(reg::NUM_QUEUES, 2);
    assert_eq!(bench.config::<2>(at + 16), [QUEUES as u8, 0]);
    // It works with decoding off, too: that is what firmware uses it for.
    bench.device.write_config(register::COMMAND, &[0, 0]);
    assert_eq!(bench.config::<2>(at + 16), [QUEUES as u8, 0]);
}

#[test]
fn r4_1_4_9_1_impossible_windows_do_nothing() {
    let bench = bench();
    let (at, ..) = bench.structure(5);
    for (bar, offset, length) in [
        (1, 20, 1),
        (0, u32::MAX, 1),
        (0, 20, 3),
        (0, 20, 0),
        (0, 21, 2),
        (0, BAR_SIZE, 1),
    ] {
        bench.device.write_config(at + 4, &[bar]);
        bench.device.write_config(at + 8, &u32::to_le_bytes(offset));
        bench
            .device
            .write_config(at + 12, &u32::to_le_bytes(length));
        bench.device.write_config(at + 16, &[ACKNOWLEDGE; 4]);
        assert_eq!(bench.status(), 0, "BAR {bar}, {offset:#x}, {length} bytes");
    }
}

#[test]
fn r4_1_3_1_wide_fields_can_be_accessed_by_halves() {
    let bench = bench();
    bench.set32(reg::QUEUE_DESC + 4, 0x12);
    bench.set32(reg::QUEUE_DESC, 0x3456_7890);
    assert_eq!(
        bench.read::<8>(reg::QUEUE_DESC),
        0x12_3456_7890_u64.to_le_bytes()
    );
}

#[test]
fn r4_1_odd_accesses_are_harmless() {
    let bench = bench();
    for offset in (0..u64::from(BAR_SIZE)).step_by(0xffd) {
        for len in 1..=8 {
            let mut data = vec![0xff; len];
            bench.device.read_bar(offset, &mut data);
            bench.device.write_bar(offset, &data);
        }
    }
    for offset in 0..300 {
        bench.device.read_config(offset, &mut [0; 8]);
        bench.device.write_config(offset, &[0xff; 8]);
    }
}

#[test]
fn r4_1_a_machine_reset_brings_everything_back() {
    let bench = bench();
    let address: [u8; 4] = bench.config(register::BAR0);
    bench.go_live();
    bench.enable_msix();
    bench.device.write_config(register::BAR0, &[0; 4]);
    bench.device.reset();
    assert_eq!(bench.config::<4>(register::BAR0), address);
    assert_eq!(bench.config::<2>(register::COMMAND), [0, 0]);
    assert_eq!(bench.config::<2>(bench.msix() + 2)[1] & 0x80, 0);
    assert_eq!(bench.status(), 0);
    assert!(bench.attached().is_empty());
    assert!(bench.recorder.doorbells.lock().unwrap().is_empty());
}
