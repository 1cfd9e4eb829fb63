//! Tests of the real platform program over its real channel. [`machine`] acts as the runner.

mod devices;
mod idle;
mod kills;
mod machine;
mod output;
mod sessions;
