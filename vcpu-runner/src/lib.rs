//! The hull: runs vCPUs, owns guest RAM, carries the virtio-pci transport and
//! the front-end half of vhost-user. It emulates no device: what it knows of one
//! is a number, queue counts and the configuration space that its process serves.
//!
//! | room | what happens there |
//! |---|---|
//! | [`vm`] | /dev/kvm, guest RAM, interrupts |
//! | [`boot`] | kernels, registers, ACPI tables |
//! | [`vcpu`] | a thread a vCPU: exits become actions; pause, reset, stop |
//! | [`pci`] | configuration space, BARs, MSI-X, the virtio transport |
//! | [`frontend`] | one vhost-user session a device, with deadlines |
//! | [`trap`] | accesses that nobody claims, answered by the platform process |
//! | [`control`] | the control socket; [`overview`] is what it tells of the machine |
//! | [`probe`] | what this host offers |
//! | [`machine`] | puts it all together and decides what happens next |

pub mod boot;
pub mod clock;
pub mod control;
pub mod error;
pub mod eventfd;
pub mod events;
pub mod frontend;
pub mod layout;
pub mod machine;
pub mod options;
pub mod overview;
pub mod pci;
pub mod policy;
pub mod probe;
pub mod signals;
pub mod trap;
pub mod vcpu;
pub mod vm;

pub use error::Error;
