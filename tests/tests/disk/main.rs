//! device-disk as its guest sees it.

mod cache;
mod requests;
mod subject;
