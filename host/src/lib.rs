//! The domain of carrel: rooms, their owners, what they run and what they use.
//!
//! ```text
//!   cli ─▶ Home::create(RoomSpec, blobs) ─▶ Session ⇄ owner (a process) ─▶ launch ─▶ carrel-vmm
//!    │                                        ▲            │ broker: streams the guest dials go on to sessions
//!    ├─▶ Home::find ─▶ Room::connect ─────────┘            │ meter, log, record
//!    └─▶ Home::sweep: what no owner claims is removed      ▼
//!                                               the room's directory: the truth that every command reads
//! ```
//!
//! No daemon is needed: a room's directory holds its specification, its lock (held by the owner while it lives), its
//! socket, its record and its log. Everything here blocks; the owner is a process of a few threads. [`resident`] is one
//! that owns many rooms and has VMMs ready for them.

#![deny(unsafe_code)]

pub mod archive;
pub mod doctor;
pub mod function;
pub mod home;
pub mod image;
pub mod launch;
pub mod log;
pub mod outcome;
pub mod owner;
pub mod patience;
pub mod pool;
pub mod program;
pub mod record;
pub mod resident;
pub mod session;
pub mod signal;
pub mod spec;
pub mod stat;
pub mod template;
mod threads;
pub mod timestamp;
pub mod usage;

mod cgroup;
mod meter;
mod packet;

pub use home::{Assets, Home, HomeError, Room};
pub use outcome::Outcome;
pub use patience::Patience;
pub use pool::Pool;
pub use session::{Session, SessionError};
pub use spec::{RoomId, RoomName, RoomSpec};
pub use usage::UsageReport;
