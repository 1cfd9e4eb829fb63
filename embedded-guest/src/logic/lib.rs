//! The guest's logic that needs no machine: unit-tested on the host by `cargo test`.

#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod acpi;
pub mod block;
pub mod clock;
pub mod ledger;
pub mod options;
pub mod packet;
pub mod pattern;
pub mod times;
pub mod used;
