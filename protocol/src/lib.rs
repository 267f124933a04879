//! What the parts of carrel say to each other.
//!
//! ```text
//!   host (owner of a room)  <── vsock, one control connection ──>  agent (PID 1)     [`agent`]
//!                           ──  vsock, one connection a stream ──>                   [`agent::Stream`]
//!   host (owner of a room)  <── Unix seqpacket, with descriptors ──>  vmm            [`vmm`]
//! ```
//!
//! Everything but raw streams travels in frames ([`frame`]): a length, a kind, a JSON body. Every kind has
//! a cap on its body, checked before a byte of it is read. JSON costs little at this rate (tens of messages
//! in a room's life) and keeps the wire readable; what must be fast goes over streams of bytes.
//!
//! Both ends are built from one tree, so versions are exact: [`agent::VERSION`] and [`vmm::VERSION`] change with
//! every change of the wire form, which golden bytes in the tests pin.
#![forbid(unsafe_code)]

pub mod agent;
pub mod confinement;
pub mod frame;
pub mod returned;
pub mod units;
pub mod usage;
pub mod vmm;

mod panic;
mod sentence;

pub use frame::{Decoder, FrameError, HEADER_BYTES, Header, Message};
pub use panic::abort_on_panic;
pub use sentence::{chain, one_line};
