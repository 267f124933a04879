//! A small VMM: one process, one microVM.
//!
//! ```text
//!  main ──> standalone ──┐ opens paths, clones the confined child, is its owner
//!       └─> owner-fd ────┤
//!                        v
//!                     confined ──> jail ──> set-up filter ──> receive Configure, or Restore
//!                        └─> start::boot, or start::restore ──> run filters ──> event loop (this thread) + one thread a vCPU
//! ```
//!
//! The event thread serves every device, the owner and signals; vCPU threads run the guest and touch a device only
//! through its registers. What differs between architectures is in [`arch`].

pub mod arch;
pub mod capabilities;
pub mod cgroup;
pub mod confined;
pub mod crew;
pub mod devices;
pub mod event;
pub mod gate;
pub mod jail;
pub mod last_words;
pub mod machine;
pub mod memory;
pub mod owner;
pub mod ports;
pub mod resources;
mod sealed;
pub mod seccomp;
pub mod signal;
pub mod snapshot;
pub mod standalone;
pub mod start;
pub mod timeline;
pub mod vcpu;
pub mod working_set;
