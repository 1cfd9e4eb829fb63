//! device-disk as its guest sees it.

mod cache;
mod faults;
mod requests;
mod subject;
