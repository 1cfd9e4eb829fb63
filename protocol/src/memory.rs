//! How guest memory is named between the runner and a device process.

/// What the runner adds to a guest-physical address to get the "user address"
/// it tells a vhost-user back end.
///
/// The vhost-user protocol has two names for a byte of guest memory: its
/// guest-physical address, which descriptors carry, and its address in the
/// front end's own process, which ring addresses carry. Using a constant that
/// no process maps keeps host addresses out of the device processes and makes
/// a back end that forgets to translate fail at once.
pub const USER_ADDRESS_OFFSET: u64 = 1 << 52;
