//! A room's freezing, the birth of its clones, and what connects them to the host again.
//!
//! ```text
//!  Start(cloning) ─▶ Started ─▶ Ready ─▶ Freeze ─▶ Frozen   output so far was sent, streams are closed
//!                                                    │ snapshot
//!                      ┌─────────────────────────────┴─────────────────────────────┐
//!         the connection is lost: a clone                       Welcome on the same connection: the room goes on
//!         dials, Hello(clone) ─▶ Welcome                                           │
//!                      └─────────────────────────────┬─────────────────────────────┘
//!                                                  Awake ─▶ Attach ─▶ Attached      for each process that was frozen
//! ```
//!
//! A process's output up to [`Frozen`] goes to the streams that it had, once; what it says from [`Awake`] on is held back, and the process with it
//! once its pipe is full, until [`Attach`] names new ones. Input that the agent had taken before [`Frozen`] is a part of the template; input still on its
//! way is lost, so whoever freezes sends none meanwhile.

use serde::{Deserialize, Serialize};

use super::{ProcessId, Stdio};

/// Where the programs of a container that was started for cloning ([`Start::cloning`](super::Start::cloning)) find the agent: a Unix stream socket. They
/// write lines and read lines, each of those a JSON object ([`Cloned`]).
///
/// - `ready`: clone me now. Told to the host as [`Ready`]; answered in each clone, and at once if the container has been cloned before.
/// - `subscribe`: answered at once, and again in each clone.
///
/// Every later cloning is told on the same connection too, before the program runs on.
pub const CLONE_SOCKET: &str = "/run/carrel/clone.sock";

/// Stop all workloads and come to rest for a snapshot. From [`Frozen`] on the agent does nothing of its own accord, takes nothing but
/// [`Welcome`](super::Welcome), [`ReportUsage`](super::ReportUsage) and [`Shutdown`](super::Shutdown), and takes the loss of the control connection for
/// a clone's birth: it dials again.
///
/// Refused while a container is being prepared or started, an exec runs, or an event is handled. Usage is no longer reported by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Freeze {}

/// Nothing but the agent runs in this guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Frozen {}

/// A clone is itself: its generator was reseeded, its clock set, its names changed, and only then were its workloads thawed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Awake {
    /// CLOCK_REALTIME less the host's as [`Identity::realtime_ns`](super::Identity::realtime_ns) told it, before it was set, ns: negative by what the clone slept.
    pub behind_ns: i64,
    /// From the loss of the template's connection (of a room that goes on: from the welcome) to this, µs of CLOCK_MONOTONIC.
    pub took_us: u64,
}

/// A workload is at the point where it wants to be cloned: a function's runtime asks for its first event, or a program said `ready`
/// ([`CLONE_SOCKET`]). Once for each container that was started for cloning; what was on its way when the room froze comes after [`Awake`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ready {
    /// The container's first process.
    pub process: ProcessId,
}

/// Connect a process that was frozen with new streams. What is absent is as `/dev/null`; a stream that the process never had, or has closed, is ended at once.
/// With a terminal, its new size. Refused for a process whose streams are connected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attach {
    /// Which.
    pub process: ProcessId,
    /// Its streams from now on.
    pub stdio: Stdio,
}

/// A process's new streams were dialled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attached {
    /// Which.
    pub process: ProcessId,
}

/// A line that programs read from [`CLONE_SOCKET`]: who they are now. Everything in it is new in each clone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cloned {
    /// The room's id.
    pub id: String,
    /// CLOCK_REALTIME, ns since the epoch.
    pub realtime_ns: u64,
    /// 64 bytes that nobody else is told, for generators of the program's own.
    pub entropy: super::Entropy,
}
