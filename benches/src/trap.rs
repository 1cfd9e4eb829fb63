//! A trapped port read: answered by another process, and by the runner itself.

use outrigger_tests::machine::Machine;

use crate::median;

const ROUNDS: usize = 5;

pub fn run() {
    let (mut platform, mut own) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        // The line status register of the serial port; and the PCI data port
        // while the address port points nowhere.
        platform.push(cycles("0x3fd"));
        own.push(cycles("0xcfc"));
    }
    let (platform, own) = (median(&mut platform), median(&mut own));
    println!("answered by device-platform        {platform:>9} cycles");
    println!("answered by the runner             {own:>9} cycles");
    println!(
        "ratio                              {:>9.2}    (target: at most 1.5)",
        platform as f64 / own as f64
    );
}

/// Median cycles of a port read from guest kernel mode.
fn cycles(port: &str) -> u64 {
    let machine = Machine::embedded(&format!("job=port-kernel count=6400 port={port}")).start();
    machine.expect(0);
    let serial = machine.serial();
    let word = serial
        .split("median ")
        .nth(1)
        .and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next())
        .and_then(|digits| digits.parse().ok());
    word.unwrap_or_else(|| panic!("no median in {serial}"))
}
