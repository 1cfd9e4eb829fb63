//! The platform process, driven over its real channel: the runner's end is played
//! by [`machine`], the process is the real binary.

mod devices;
mod idle;
mod kills;
mod machine;
mod output;
mod sessions;
