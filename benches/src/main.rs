//! Benchmarks of machines and device processes, each beside a peer in the same run.

mod blackout;
mod boot;
mod disk;
mod first_byte;
mod memory;
mod trap;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

/// Rounds of a benchmark; medians need an odd number.
const ROUNDS: usize = 15;

/// Only cases that have a target.
static QUICK: AtomicBool = AtomicBool::new(false);

fn median<T: Copy + PartialOrd>(values: &mut [T]) -> T {
    values.sort_by(|a, b| a.partial_cmp(b).expect("measured values are ordered"));
    values[values.len() / 2]
}

fn main() -> ExitCode {
    let (options, wanted): (Vec<String>, Vec<String>) = std::env::args()
        .skip(1)
        .partition(|word| word.starts_with("--"));
    if let Some(unknown) = options.iter().find(|word| *word != "--quick") {
        eprintln!("no option is called {unknown}");
        return ExitCode::from(2);
    }
    QUICK.store(!options.is_empty(), Ordering::Relaxed);
    let all: [(&str, fn()); 6] = [
        ("boot", boot::run),
        ("first-byte", first_byte::run),
        ("trap", trap::run),
        ("memory", memory::run),
        ("disk", disk::run),
        ("blackout", blackout::run),
    ];
    if let Some(unknown) = wanted.iter().find(|w| all.iter().all(|a| a.0 != **w)) {
        eprintln!("no benchmark is called {unknown}");
        return ExitCode::from(2);
    }
    for (name, run) in all {
        if wanted.is_empty() || wanted.iter().any(|w| w == name) {
            println!("== {name}");
            run();
        }
    }
    ExitCode::SUCCESS
}
