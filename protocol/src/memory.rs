//! How the runner names guest memory towards vhost-user back ends.

/// The difference between a "user address" that the runner sends to a vhost-user back end
/// and the guest-physical address of the same byte.
///
/// The vhost-user protocol has two names for a byte of guest memory: its guest-physical
/// address, which descriptors carry, and its address in the front end's own process, which
/// SET_VRING_ADDR carries. This runner derives the second from the first by adding a
/// constant. No process maps that range, so the back ends learn no host addresses, and a
/// back end that does not translate a user address fails at once.
pub const USER_ADDRESS_OFFSET: u64 = 1 << 52;
