//! What depends on the processor's architecture: how a kernel is entered, what a vCPU looks like at its first
//! instruction, which platform devices there are.

#[cfg(target_arch = "x86_64")]
pub mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64 as current;
