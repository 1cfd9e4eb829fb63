//! Sections 4.1.4.5, 4.1.5.1.2 and 4.1.5.3 to 4.1.5.5: ISR status, MSI-X vectors,
//! and the notifications that use them.

use std::time::{Duration, Instant};

use super::*;

fn queue_vector(dut: &TestDevice, queue: u16, vector: u16) -> u16 {
    dut.set16(reg::QUEUE_SELECT, queue);
    dut.set16(reg::QUEUE_VECTOR, vector);
    dut.get16(reg::QUEUE_VECTOR)
}

fn notify(dut: &TestDevice, queue: usize) {
    dut.device.call(queue).unwrap().write(1).unwrap();
}

/// Waits for the INTx thread.
fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn line_is(dut: &TestDevice, level: bool) -> bool {
    let lines = dut.irq_routing.lines.lock().unwrap();
    lines.last().map_or(!level, |last| last.1 == level)
}

#[test]
fn r4_1_5_1_2_1_the_table_has_a_vector_for_every_queue_and_the_configuration() {
    for queues in [1, 3, 64] {
        let dut = test_device_with(OFFERED, queues);
        let control = u16::from_le_bytes(dut.config(dut.msix() + 2));
        let vectors = usize::from(control & 0x7ff) + 1;
        assert_eq!(vectors, queues + 1);
        assert!((2..=0x800).contains(&vectors));
    }
}

#[test]
fn r4_1_5_1_2_1_any_interrupt_can_be_mapped_to_any_vector_and_unmapped() {
    let dut = test_device();
    for vector in 0..=QUEUES as u16 {
        for queue in 0..QUEUES as u16 {
            assert_eq!(queue_vector(&dut, queue, vector), vector);
        }
        dut.set16(reg::CONFIG_VECTOR, vector);
        assert_eq!(dut.get16(reg::CONFIG_VECTOR), vector);
    }
    assert_eq!(queue_vector(&dut, 0, 0xffff), 0xffff);
    dut.set16(reg::CONFIG_VECTOR, 0xffff);
    assert_eq!(dut.get16(reg::CONFIG_VECTOR), 0xffff);
}

#[test]
fn r4_1_5_1_2_1_a_vector_beyond_the_table_reads_back_as_no_vector() {
    let dut = test_device();
    assert_eq!(queue_vector(&dut, 0, QUEUES as u16 + 1), 0xffff);
    dut.set16(reg::CONFIG_VECTOR, 0x7ff);
    assert_eq!(dut.get16(reg::CONFIG_VECTOR), 0xffff);
}

#[test]
fn r4_1_5_1_2_1_everything_is_unmapped_after_reset() {
    let dut = test_device();
    dut.activate();
    queue_vector(&dut, 0, 1);
    dut.set16(reg::CONFIG_VECTOR, 0);
    dut.set8(reg::STATUS, 0);
    dut.device.complete_reset();
    dut.set16(reg::QUEUE_SELECT, 0);
    assert_eq!(dut.get16(reg::QUEUE_VECTOR), 0xffff);
    assert_eq!(dut.get16(reg::CONFIG_VECTOR), 0xffff);
}

#[test]
fn r4_1_5_3_1_an_unmasked_vector_is_an_irqfd_with_its_message() {
    let dut = test_device();
    dut.activate();
    dut.enable_msix();
    dut.set_vector(1, 0x41, false);
    queue_vector(&dut, 0, 1);
    assert_eq!(dut.attached(), [FIRST_GSI]);
    let expected = MsiMessage {
        address: 0xfee0_0000,
        data: 0x41,
    };
    assert_eq!(dut.irq_routing.routes.lock().unwrap()[..], [expected]);
    // A new message changes the route; the irqfd stays.
    dut.set32(MSIX_TABLE + 16 + 8, 0x42);
    assert_eq!(dut.irq_routing.routes.lock().unwrap()[0].data, 0x42);
    assert_eq!(dut.attached(), [FIRST_GSI]);
}

#[test]
fn r4_1_5_3_1_no_interrupt_for_a_queue_without_a_vector() {
    let dut = test_device();
    dut.activate();
    dut.enable_msix();
    dut.set_vector(0, 0x41, false);
    queue_vector(&dut, 0, 0xffff);
    assert!(dut.attached().is_empty());
    notify(&dut, 0);
    assert_eq!(dut.get8(MSIX_PENDING), 0);
    assert_eq!(dut.get8(ISR), 0, "MSI-X is on, so INTx is not used");
}

#[test]
fn r4_1_5_3_1_two_queues_can_share_a_vector() {
    let dut = test_device();
    dut.activate();
    dut.enable_msix();
    dut.set_vector(2, 0x41, false);
    queue_vector(&dut, 0, 2);
    queue_vector(&dut, 1, 2);
    assert_eq!(dut.attached(), [FIRST_GSI, FIRST_GSI]);
}

#[test]
fn msix_a_masked_vector_is_pending_until_unmasked() {
    let dut = test_device();
    dut.activate();
    dut.enable_msix();
    dut.set_vector(1, 0x41, true);
    queue_vector(&dut, 0, 1);
    assert!(dut.attached().is_empty());
    notify(&dut, 0);
    assert_eq!(dut.get8(MSIX_PENDING), 0b10);
    dut.set32(MSIX_TABLE + 16 + 12, 0);
    assert_eq!(dut.attached(), [FIRST_GSI], "KVM delivers what is pending");
    assert_eq!(dut.get8(MSIX_PENDING), 0);
    dut.set32(MSIX_TABLE + 16 + 12, 1);
    assert!(dut.attached().is_empty(), "masked again");
}

#[test]
fn msix_the_function_mask_covers_all_vectors() {
    let dut = test_device();
    dut.activate();
    dut.set_vector(0, 0x40, false);
    dut.set_vector(1, 0x41, false);
    dut.set16(reg::CONFIG_VECTOR, 0);
    queue_vector(&dut, 0, 1);
    let control = |value: u16| {
        let at = dut.msix() + 2;
        dut.device.write_config(at, &value.to_le_bytes());
    };
    control(0xc000);
    assert!(dut.attached().is_empty());
    notify(&dut, 0);
    assert_eq!(dut.get8(MSIX_PENDING), 0b10);
    control(0x8000);
    assert_eq!(dut.attached().len(), 2);
    control(0);
    assert!(dut.attached().is_empty(), "switched off");
}

#[test]
fn r4_1_5_4_1_a_configuration_change_uses_its_own_vector() {
    let dut = test_device();
    dut.activate();
    dut.enable_msix();
    dut.set16(reg::CONFIG_VECTOR, 3);
    dut.device.set_config(vec![9; 60]);
    assert_eq!(dut.get8(MSIX_PENDING), 1 << 3);
    assert_eq!(dut.get8(ISR), 0);
}

#[test]
fn r4_1_4_5_1_without_msix_a_queue_sets_the_isr_and_the_pin() {
    let dut = test_device();
    dut.activate();
    notify(&dut, 1);
    wait_for("the line is asserted", || line_is(&dut, true));
    let status = u16::from_le_bytes(dut.config(register::STATUS));
    assert_ne!(status & 1 << 3, 0, "interrupt status in the PCI header");
    assert_eq!(dut.get8(ISR), 1);
    assert!(line_is(&dut, false), "reading the ISR deasserts the line");
    assert_eq!(dut.get8(ISR), 0, "reading cleared it");
    let status = u16::from_le_bytes(dut.config(register::STATUS));
    assert_eq!(status & 1 << 3, 0);
}

#[test]
fn r4_1_4_5_1_without_msix_a_configuration_change_sets_its_bit() {
    let dut = test_device();
    dut.activate();
    dut.device.set_config(vec![9; 60]);
    wait_for("the line is asserted", || line_is(&dut, true));
    assert_eq!(dut.get8(ISR), 2);
}

#[test]
fn r4_1_4_5_1_intx_disable_masks_the_pin_but_not_the_isr() {
    let dut = test_device();
    dut.activate();
    let off = command::MEMORY | command::INTX_DISABLE;
    dut.device
        .write_config(register::COMMAND, &off.to_le_bytes());
    notify(&dut, 0);
    let pending = || u16::from_le_bytes(dut.config(register::STATUS)) & 1 << 3 != 0;
    wait_for("interrupt status", pending);
    assert!(dut.irq_routing.lines.lock().unwrap().is_empty());
    let on = command::MEMORY;
    dut.device
        .write_config(register::COMMAND, &on.to_le_bytes());
    assert!(line_is(&dut, true));
}

#[test]
fn the_interrupt_pin_and_line_registers_are_set() {
    let dut = test_device();
    assert_eq!(dut.config::<1>(register::INTERRUPT_PIN), [1]);
    let line = dut.config::<1>(register::INTERRUPT_LINE)[0];
    assert_eq!(Gsi::from(line), Intx::line(1));
}
