//! device-disk, tested through its queues.

mod cache;
mod faults;
mod hang_up;
mod requests;
mod subject;
