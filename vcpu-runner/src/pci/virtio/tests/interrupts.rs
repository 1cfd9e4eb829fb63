//! Sections 4.1.4.5, 4.1.5.1.2 and 4.1.5.3 to 4.1.5.5: ISR status, MSI-X vectors,
//! and the notifications that use them.

use std::time::{Duration, Instant};

use super::*;

fn queue_vector(bench: &Bench, queue: u16, vector: u16) -> u16 {
    bench.set16(reg::QUEUE_SELECT, queue);
    bench.set16(reg::QUEUE_VECTOR, vector);
    bench.get16(reg::QUEUE_VECTOR)
}

fn notify(bench: &Bench, queue: usize) {
    bench.device.call(queue).unwrap().write(1).unwrap();
}

/// The INTx thread takes a moment.
fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn line_is(bench: &Bench, level: bool) -> bool {
    let lines = bench.recorder.lines.lock().unwrap();
    lines.last().map_or(!level, |last| last.1 == level)
}

#[test]
fn r4_1_5_1_2_1_the_table_has_a_vector_for_every_queue_and_the_configuration() {
    for queues in [1, 3, 64] {
        let bench = bench_with(OFFERED, queues);
        let control = u16::from_le_bytes(bench.config(bench.msix() + 2));
        let vectors = usize::from(control & 0x7ff) + 1;
        assert_eq!(vectors, queues + 1);
        assert!((2..=0x800).contains(&vectors));
    }
}

#[test]
fn r4_1_5_1_2_1_any_interrupt_can_be_mapped_to_any_vector_and_unmapped() {
    let bench = bench();
    for vector in 0..=QUEUES as u16 {
        for queue in 0..QUEUES as u16 {
            assert_eq!(queue_vector(&bench, queue, vector), vector);
        }
        bench.set16(reg::CONFIG_VECTOR, vector);
        assert_eq!(bench.get16(reg::CONFIG_VECTOR), vector);
    }
    assert_eq!(queue_vector(&bench, 0, 0xffff), 0xffff);
    bench.set16(reg::CONFIG_VECTOR, 0xffff);
    assert_eq!(bench.get16(reg::CONFIG_VECTOR), 0xffff);
}

#[test]
fn r4_1_5_1_2_1_a_vector_beyond_the_table_reads_back_as_no_vector() {
    let bench = bench();
    assert_eq!(queue_vector(&bench, 0, QUEUES as u16 + 1), 0xffff);
    bench.set16(reg::CONFIG_VECTOR, 0x7ff);
    assert_eq!(bench.get16(reg::CONFIG_VECTOR), 0xffff);
}

#[test]
fn r4_1_5_1_2_1_everything_is_unmapped_after_reset() {
    let bench = bench();
    bench.go_live();
    queue_vector(&bench, 0, 1);
    bench.set16(reg::CONFIG_VECTOR, 0);
    bench.set8(reg::STATUS, 0);
    bench.device.stopped();
    bench.set16(reg::QUEUE_SELECT, 0);
    assert_eq!(bench.get16(reg::QUEUE_VECTOR), 0xffff);
    assert_eq!(bench.get16(reg::CONFIG_VECTOR), 0xffff);
}

#[test]
fn r4_1_5_3_1_an_unmasked_vector_is_an_irqfd_with_its_message() {
    let bench = bench();
    bench.go_live();
    bench.enable_msix();
    bench.set_vector(1, 0x41, false);
    queue_vector(&bench, 0, 1);
    assert_eq!(bench.attached(), [FIRST_GSI]);
    let expected = Message {
        address: 0xfee0_0000,
        data: 0x41,
    };
    assert_eq!(bench.recorder.routes.lock().unwrap()[..], [expected]);
    // A new message changes the route, not the attachment.
    bench.set32(MSIX_TABLE + 16 + 8, 0x42);
    assert_eq!(bench.recorder.routes.lock().unwrap()[0].data, 0x42);
    assert_eq!(bench.attached(), [FIRST_GSI]);
}

#[test]
fn r4_1_5_3_1_no_interrupt_for_a_queue_without_a_vector() {
    let bench = bench();
    bench.go_live();
    bench.enable_msix();
    bench.set_vector(0, 0x41, false);
    queue_vector(&bench, 0, 0xffff);
    assert!(bench.attached().is_empty());
    notify(&bench, 0);
    assert_eq!(bench.get8(MSIX_PENDING), 0);
    assert_eq!(bench.get8(ISR), 0, "MSI-X is on, so INTx is not used");
}

#[test]
fn r4_1_5_3_1_two_queues_can_share_a_vector() {
    let bench = bench();
    bench.go_live();
    bench.enable_msix();
    bench.set_vector(2, 0x41, false);
    queue_vector(&bench, 0, 2);
    queue_vector(&bench, 1, 2);
    assert_eq!(bench.attached(), [FIRST_GSI, FIRST_GSI]);
}

#[test]
fn msix_a_masked_vector_is_pending_until_unmasked() {
    let bench = bench();
    bench.go_live();
    bench.enable_msix();
    bench.set_vector(1, 0x41, true);
    queue_vector(&bench, 0, 1);
    assert!(bench.attached().is_empty());
    notify(&bench, 0);
    assert_eq!(bench.get8(MSIX_PENDING), 0b10);
    bench.set32(MSIX_TABLE + 16 + 12, 0);
    assert_eq!(
        bench.attached(),
        [FIRST_GSI],
        "KVM delivers what is pending"
    );
    assert_eq!(bench.get8(MSIX_PENDING), 0);
    bench.set32(MSIX_TABLE + 16 + 12, 1);
    assert!(bench.attached().is_empty(), "masked again");
}

#[test]
fn msix_the_function_mask_covers_all_vectors() {
    let bench = bench();
    bench.go_live();
    bench.set_vector(0, 0x40, false);
    bench.set_vector(1, 0x41, false);
    bench.set16(reg::CONFIG_VECTOR, 0);
    queue_vector(&bench, 0, 1);
    let control = |value: u16| {
        let at = bench.msix() + 2;
        bench.device.write_config(at, &value.to_le_bytes());
    };
    control(0xc000);
    assert!(bench.attached().is_empty());
    notify(&bench, 0);
    assert_eq!(bench.get8(MSIX_PENDING), 0b10);
    control(0x8000);
    assert_eq!(bench.attached().len(), 2);
    control(0);
    assert!(bench.attached().is_empty(), "switched off");
}

#[test]
fn r4_1_5_4_1_a_configuration_change_uses_its_own_vector() {
    let bench = bench();
    bench.go_live();
    bench.enable_msix();
    bench.set16(reg::CONFIG_VECTOR, 3);
    bench.device.set_config(vec![9; 60]);
    assert_eq!(bench.get8(MSIX_PENDING), 1 << 3);
    assert_eq!(bench.get8(ISR), 0);
}

#[test]
fn r4_1_4_5_1_without_msix_a_queue_sets_the_isr_and_the_pin() {
    let bench = bench();
    bench.go_live();
    notify(&bench, 1);
    wait_for("the line goes up", || line_is(&bench, true));
    let status = u16::from_le_bytes(bench.config(register::STATUS));
    assert_ne!(status & 1 << 3, 0, "interrupt status in the PCI header");
    assert_eq!(bench.get8(ISR), 1);
    assert!(
        line_is(&bench, false),
        "reading the ISR lets go of the line"
    );
    assert_eq!(bench.get8(ISR), 0, "reading cleared it");
    let status = u16::from_le_bytes(bench.config(register::STATUS));
    assert_eq!(status & 1 << 3, 0);
}

#[test]
fn r4_1_4_5_1_without_msix_a_configuration_change_sets_its_bit() {
    let bench = bench();
    bench.go_live();
    bench.device.set_config(vec![9; 60]);
    wait_for("the line goes up", || line_is(&bench, true));
    assert_eq!(bench.get8(ISR), 2);
}

#[test]
fn r4_1_4_5_1_intx_disable_masks_the_pin_but_not_the_isr() {
    let bench = bench();
    bench.go_live();
    let off = command::MEMORY | command::INTX_DISABLE;
    bench
        .device
        .write_config(register::COMMAND, &off.to_le_bytes());
    notify(&bench, 0);
    let pending = || u16::from_le_bytes(bench.config(register::STATUS)) & 1 << 3 != 0;
    wait_for("interrupt status", pending);
    assert!(bench.recorder.lines.lock().unwrap().is_empty());
    let on = command::MEMORY;
    bench
        .device
        .write_config(register::COMMAND, &on.to_le_bytes());
    assert!(line_is(&bench, true));
}

#[test]
fn the_pin_register_says_which_line() {
    let bench = bench();
    assert_eq!(bench.config::<1>(register::INTERRUPT_PIN), [1]);
    let line = bench.config::<1>(register::INTERRUPT_LINE)[0];
    assert_eq!(Gsi::from(line), Intx::line(1));
}
