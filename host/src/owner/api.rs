//! What commands and a room's owner say to each other, over `owner.sock` or the connection that made the room.
//!
//! ```text
//!  command                                     owner
//!    │ ── Supply + lock, blobs (creator only) ──▶ │
//!    │ ── Exec, Invoke + event, Wait, … ────────▶ │
//!    │ ◀───────────── Connected + a socket ────── │  one for each standard stream: bytes never pass through the owner
//!    │ ◀─────────────────────────── Started ───── │
//!    │ ── Signal, Resize ───────────────────────▶ │
//!    │ ◀──────────────────────────── Exited ───── │
//!    │ ── Return ───────────────────────────────▶ │  files that the workload wrote, by the creator alone
//!    │ ◀───── Connected + a socket, or Refused ── │
//!    │ ── Rest ─────────────────────────────────▶ │  a function's creator, between two events; never answered
//!    │ ── Drained ──────────────────────────────▶ │  all output was read: the room may go
//!    │ ◀───────────────────────────── Ended ───── │
//! ```
//!
//! A connection has at most one process: the workload for the creator, or what its one [`Exec`] started; signals are for
//! that one, and for the workload where there is none. Sizes are for that one alone, and kept until it runs. When a creator's connection of an attached room closes, the room ends; when an
//! exec's closes, its process is killed.

use std::collections::BTreeMap;

use carrel_protocol::agent::{ExitStatus, Failure, TerminalSize};
use carrel_protocol::vmm::Mark;
use serde::{Deserialize, Serialize};

use crate::outcome::Outcome;
use crate::spec::ProcessSpec;
use crate::usage::UsageReport;

const KIB: u32 = 1 << 10;

carrel_protocol::messages! {
    /// What a command tells the owner.
    FromClient {
        1 Supply KIB;
        2 Exec 90 * KIB;
        3 Signal KIB;
        4 Resize KIB;
        5 Stop KIB;
        6 ReadUsage KIB;
        7 Wait KIB;
        8 Drained KIB;
        9 Invoke 16 * KIB;
        // The agent's own message is longer, by its stream.
        10 Return 60 * KIB;
        11 Rest KIB;
    }
}

carrel_protocol::messages! {
    /// What the owner tells a command.
    ToClient {
        1 Connected KIB;
        2 Started KIB;
        3 Exited KIB;
        4 Refused 8 * KIB;
        5 Used 8 * KIB;
        6 Noticed 4 * KIB;
        7 Invoked 32 * KIB;
        8 Ended 32 * KIB;
        9 Done KIB;
    }
}

/// Descriptors for the room: the lock first, then every blob in the order of the specification.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Supply {
    /// No more will come: start.
    pub last: bool,
}

/// Start a process beside the workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// What.
    pub process: ProcessSpec,
}

/// Send a signal to this connection's process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signal {
    /// 1 to 64. Before the workload runs, any of HUP, INT, QUIT, KILL and TERM ends the room.
    pub signal: u8,
}

/// This connection's terminal has this size now. One that is said before the process runs is kept for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resize {
    /// The new size.
    pub size: TerminalSize,
}

/// End the workload: its stop signal, then SIGKILL. Answered by [`Done`] at once; [`Wait`] for the end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stop {
    /// From the stop signal to SIGKILL, ms; without it the room's own.
    pub timeout_ms: Option<u64>,
}

/// Answered by [`Used`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadUsage {}

/// Answered by [`Ended`], when it has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wait {}

/// Every output stream of this connection's process was read to its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drained {}

/// Give the room's function an event, whose file is beside this. Answered by [`Connected`] with the response's stream, and [`Invoked`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invoke {
    /// A UUID.
    pub id: String,
    /// Bytes of the event.
    pub event_bytes: u64,
    /// ms.
    pub timeout_ms: u32,
    /// Further `Lambda-Runtime-*` headers, named without that prefix.
    pub headers: BTreeMap<String, String>,
}

/// There is no event for the room's function, and none may come for long: its guest may give back what it has free, and stand still. Whatever is asked of the room wakes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rest {}

/// Files of the room's, now that its workload has ended. Answered by [`Connected`] with the stream of [`carrel_protocol::returned`], or by [`Refused`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Return {
    /// Absolute paths in the room.
    pub paths: Vec<String>,
}

/// One of the process's streams, as the socket beside this.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connected {
    /// Which.
    pub stream: StreamKind,
}

/// A stream between a command and the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StreamKind {
    /// Command to process; ended by half-close.
    Stdin,
    /// Process to command.
    Stdout,
    /// Process to command.
    Stderr,
    /// A function's response, or its error.
    Response,
    /// Files of the room's.
    Returned,
}

/// The process runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Started {}

/// The process ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exited {
    /// How.
    pub status: ExitStatus,
    /// For want of memory.
    pub out_of_memory: bool,
}

/// A request can't be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// What kind of failure.
    pub failure: Failure,
    /// One sentence.
    pub message: String,
}

/// A usage report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Used {
    /// The report.
    pub report: UsageReport,
}

/// Something that the user should know; the room goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Noticed {
    /// One sentence.
    pub message: String,
}

/// An invocation ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invoked {
    /// How, as the agent says.
    pub invoked: carrel_protocol::agent::Invoked,
}

/// The room is over, and nothing of it runs any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// How.
    pub outcome: Outcome,
    /// What it used.
    pub usage: Option<UsageReport>,
    /// Its workload had started.
    pub started: bool,
    /// What happened when in its start.
    #[serde(default)]
    pub timeline: Vec<Mark>,
}

/// The request was carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {}
