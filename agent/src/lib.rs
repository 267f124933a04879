//! PID 1 of a carrel microVM: receives payloads, runs containers, reports, ends the room.
//!
//! ```text
//!  host ══ vsock ══▶ control ─▶ room ─┬─▶ unpack      a process for each Prepare
//!                                     ├─▶ container   an init (PID 1 of the container's namespace) for each Start,
//!                                     │               a keeper for each Exec; below it the workload
//!                                     ├─▶ streams     pipes and terminals ⇄ vsock connections
//!                                     ├─▶ function    the Lambda Runtime API on guest loopback
//!                                     └─▶ usage       cgroup files ⇒ reports
//! ```
//!
//! **The agent has one thread.** It forks without `exec` (an `exec` costs tens of milliseconds under emulation, and a second
//! copy of the binary), and a fork of a process with several threads may not even allocate. So everything that
//! waits is a task of one current-thread runtime, and everything that blocks or parses what a stranger made
//! (layers, zips, mounts, `/etc/passwd`) happens in a forked process, whose death is an answer like any other.

mod boot;
mod collect;
mod container;
mod control;
mod disk;
mod fork;
mod function;
mod hook;
mod identity;
mod refusal;
mod room;
mod socket;
mod spare;
mod streams;
mod unpack;
mod usage;

pub use boot::run;
