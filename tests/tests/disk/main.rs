//! device-disk as its guest sees it.

mod cache;
mod faults;
mod hang_up;
mod requests;
mod subject;
