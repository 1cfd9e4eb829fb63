//! The runner: runs the vCPUs, owns guest RAM, and has the virtio-pci transport and the
//! vhost-user front ends. It emulates no device. All that it knows of a device is its
//! number, how many queues it has, and the configuration space that its process serves.
//!
//! | module | responsibility |
//! |---|---|
//! | [`vm`] | KVM: memory slots, interrupts, capabilities |
//! | [`boot`] | kernels, start registers, ACPI tables |
//! | [`vcpu`] | one thread for each vCPU: exits become actions; park, reset, stop |
//! | [`pci`] | configuration space, BARs, MSI-X, the virtio transport |
//! | [`frontend`] | one vhost-user connection for each device, with deadlines |
//! | [`trap`] | accesses that no PCI device handles, emulated by the platform process |
//! | [`control`], [`events`], [`status`] | the control socket and the event stream |
//! | [`probe`] | what this host offers |
//! | [`options`] | the command line |
//! | [`machine`] | puts everything together and handles all events |

pub mod boot;
pub mod clock;
pub mod control;
pub mod endpoint;
pub mod error;
pub mod eventfd;
pub mod events;
pub mod frontend;
pub mod layout;
pub mod machine;
pub mod options;
pub mod pci;
pub mod policy;
pub mod probe;
pub mod signals;
pub mod status;
pub mod trap;
pub mod vcpu;
pub mod vm;

pub use error::Error;
