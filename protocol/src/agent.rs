//! Host and agent: the control connection and the streams it agrees on.
//!
//! The guest dials; the host never does. The first connection to [`CONTROL_PORT`] is the control connection
//! and the owner takes no second one while it lives. Everything sizeable or endless (a blob, stdin, an event) has a
//! connection of its own: the host names a fresh port and a token ([`Stream`]), the agent dials that port,
//! sends the 16 bytes of the token, and from then on the connection is plain bytes, ended by a half-close. A dial that
//! names no agreed port, or the wrong token, is dropped: a workload that got hold of a vsock socket could forge nothing.
//!
//! ```text
//!  agent                                   host
//!    │ ── Hello ─────────────────────────▶  │  versions, agent, kernel
//!    │ ◀─────────────── Welcome / Refused ──│  identity, time, entropy
//!    │ ◀───────────────────────── Prepare ──│  root file system and code, as streams of blobs
//!    │ ── (dials each blob) ─────────────▶  │
//!    │ ── Prepared / Failed ─────────────▶  │
//!    │ ◀─────────────────────────── Start ──│  the workload and its stdio
//!    │ ── Started / Failed ──────────────▶  │
//!    │ ◀── Exec, Signal, Resize, Invoke ────│  any number, any order
//!    │ ── Exited, Invoked, Usage ────────▶  │
//!    │ ── Ready ─────────────────────────▶  │  a workload that is to be cloned has come to its point
//!    │ ◀────────────────────────── Freeze ──│  workloads stop; the next loss of this connection is a clone's birth
//!    │ ── Frozen / Failed ───────────────▶  │
//!    ╎   (snapshot; every clone begins here)╎
//!    │ ── Hello (again, a clone's) ──────▶  │
//!    │ ◀─────────────── Welcome / Refused ──│  who the clone is; entropy, time and names are in place before anything else runs
//!    │ ── Awake ─────────────────────────▶  │  and what was frozen runs again; Start and the rest follow as above
//!    │ ◀────────────────────────── Attach ──│  new streams for a process that was frozen
//!    │ ── Attached / Failed ─────────────▶  │
//!    │ ◀───────────────────────── Collect ──│  files that the workload wrote, as a stream
//!    │ ◀──────────────────────── Shutdown ──│
//!    │ ── Usage (the last), Ending ──────▶  │  then the guest restarts, which ends its VMM
//! ```
//!
//! The host need not wait between Welcome and what follows it: messages are carried out in order.
//!
//! A request that fails is answered by [`Failed`] naming it; the connection goes on. Anything that is not a
//! well-formed message of the agreed version ends the connection, and with it the room.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::usage::GuestUsage;

mod cloning;

pub use cloning::{Attach, Attached, Awake, CLONE_SOCKET, Cloned, Freeze, Frozen, Ready};

/// Version of this wire form.
pub const VERSION: u32 = 3;
/// The vsock address of the host (virtio §5.10.4).
pub const HOST_CID: u32 = 2;
/// The vsock address that every guest has: each VMM serves one guest, so it need not be unique.
pub const GUEST_CID: u32 = 3;
/// Where the agent dials first.
pub const CONTROL_PORT: u32 = 1024;
/// Streams have ports from here upwards, each used once in a room's life.
pub const FIRST_STREAM_PORT: u32 = 0x1_0000;

const KIB: u32 = 1 << 10;
const MIB: u32 = 1 << 20;

crate::messages! {
    /// What the host tells the agent.
    FromHost {
        1 Welcome 8 * KIB;
        2 Refused 4 * KIB;
        3 Prepare MIB;
        4 Start MIB;
        5 Exec MIB;
        6 Signal KIB;
        7 Resize KIB;
        8 Invoke 64 * KIB;
        9 ReportUsage KIB;
        10 Shutdown KIB;
        11 Freeze KIB;
        12 Attach 4 * KIB;
        20 Collect 64 * KIB;
    }
}

crate::messages! {
    /// What the agent tells the host. All of it is a claim: a guest is hostile until proven otherwise, and it never is.
    FromAgent {
        1 Hello 4 * KIB;
        2 Prepared 4 * KIB;
        3 Started 4 * KIB;
        4 Exited 4 * KIB;
        5 Failed 8 * KIB;
        6 Usage 16 * KIB;
        7 Invoked 16 * KIB;
        8 Ending 4 * KIB;
        9 Frozen KIB;
        10 Awake 4 * KIB;
        11 Ready KIB;
        12 Attached KIB;
    }
}

/// The agent's first words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hello {
    /// [`VERSION`] of the agent's build. The host refuses any but its own.
    pub version: u32,
    /// The agent's package version, for people.
    pub agent: String,
    /// `uname -r`, for people.
    pub kernel: String,
    /// CLOCK_MONOTONIC when the agent's `main` began, µs: what the guest's kernel took to boot.
    pub booted_us: u64,
    /// The agent was frozen and finds itself in a clone: it knows what its template's host told it, and waits for its own identity.
    pub clone: bool,
}

/// The handshake succeeded: who this room is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Welcome {
    /// The host's [`VERSION`].
    pub version: u32,
    /// The room's name and everything that no two rooms may share.
    pub identity: Identity,
}

/// What makes a room itself. Told again after a clone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// The room's id.
    pub id: String,
    /// The hostname of its containers, unless they name their own.
    pub hostname: String,
    /// CLOCK_REALTIME of the host, ns since the epoch.
    pub realtime_ns: u64,
    /// Fresh entropy for the guest's generator.
    pub entropy: Entropy,
}

/// 64 random bytes, in hexadecimal on the wire; never printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Entropy(pub [u8; 64]);

/// What a stream's dialler must say first: 16 random bytes, in hexadecimal in messages, bare on the stream; never printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Token(pub [u8; 16]);

/// The host doesn't go on with this agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refused {
    /// One sentence.
    pub reason: String,
}

/// Where a stream is to be dialled, agreed on over the control connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stream {
    /// The port at the host.
    pub port: u32,
    /// The first bytes that the dialler sends.
    pub token: Token,
}

/// A container within the room. `carrel run` and functions have one, number 0; a task may have several.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ContainerId(pub u32);

/// A process that the host started: workload or exec. Chosen by the host, never used twice in a room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ProcessId(pub u32);

/// Receive and unpack what a container is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prepare {
    /// The container that this makes.
    pub container: ContainerId,
    /// The image's layers, lowest first. Dialled one after another, in this order.
    pub layers: Vec<Layer>,
    /// A function's code and its layers: zips, each unpacked at its place after all layers.
    pub zips: Vec<Zip>,
    /// What unpacking may use; beyond it the payload is refused.
    pub limits: UnpackLimits,
}

/// One layer of an image (OCI image-spec, layer.md).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// How the tar is compressed.
    pub compression: Compression,
    /// The blob.
    pub blob: Blob,
    /// Digest of the uncompressed tar, `sha256:…`, from the image's configuration.
    pub diff_id: String,
}

/// How a layer is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// A plain tar.
    None,
    /// RFC 1952.
    Gzip,
    /// RFC 8878.
    Zstd,
}

/// A zip file and where its content goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Zip {
    /// The blob.
    pub blob: Blob,
    /// Absolute directory in the container, `/var/task` or `/opt`.
    pub at: String,
}

/// Bytes to be fetched and verified.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Blob {
    /// `sha256:…` or `sha512:…` of the bytes as sent.
    pub digest: String,
    /// How many bytes are sent, exactly.
    pub size: u64,
    /// Where they come from.
    pub stream: Stream,
}

/// Caps on unpacking one container, all blobs together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnpackLimits {
    /// Bytes after decompression.
    pub bytes: u64,
    /// Files, directories and links.
    pub entries: u64,
}

/// A container's files are in place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prepared {
    /// Which.
    pub container: ContainerId,
    /// Bytes written.
    pub bytes: u64,
    /// Files, directories and links made.
    pub entries: u64,
    /// Time from the request, µs.
    pub took_us: u64,
}

/// Run a container's workload: make its namespaces, mounts and cgroup and start its first process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Start {
    /// Which; prepared before.
    pub container: ContainerId,
    /// What surrounds its processes.
    pub surroundings: Surroundings,
    /// Its first process, PID 1 of its namespace or a child of the agent's own init.
    pub process: Process,
    /// For a function: serve it the Lambda Runtime API on guest loopback.
    pub function: Option<Function>,
    /// The container shall be cloned while it runs: its programs get [`CLONE_SOCKET`], and the host is told when it is [`Ready`].
    pub cloning: bool,
}

/// Start one more process in a running container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exec {
    /// Where.
    pub container: ContainerId,
    /// What.
    pub process: Process,
}

/// What a container's processes find around them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Surroundings {
    /// Hostname; the room's where there is none.
    pub hostname: Option<String>,
    /// The root can't be written to.
    pub read_only_root: bool,
    /// Extra tmpfs mounts: absolute path, and its options as `mount -o` takes them (`size=64m,mode=1777`).
    pub tmpfs: Vec<Tmpfs>,
    /// Anonymous volumes (the image's `Volumes`): writable directories, filled from the image, even below a read-only root.
    pub volumes: Vec<String>,
    /// Bytes of memory for the container's cgroup; without it what the room has.
    pub memory_bytes: Option<u64>,
    /// CPU quota in thousandths of one CPU; without it what the room has.
    pub cpu_millis: Option<u32>,
    /// Processes and threads at most; without it the agent's own default.
    pub processes: Option<u32>,
    /// Kernel settings of the container's namespaces.
    pub sysctls: BTreeMap<String, String>,
}

/// A tmpfs in a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tmpfs {
    /// Absolute path.
    pub path: String,
    /// Options, comma-separated; may be empty.
    pub options: String,
}

/// A process to start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Process {
    /// Its number in later messages.
    pub id: ProcessId,
    /// Program (looked up in its own `PATH`, as `execvp` does) and arguments; at least one.
    pub arguments: Vec<String>,
    /// `NAME=value`, in order; later wins. `HOME`, `HOSTNAME` and `TERM` are added where missing.
    pub environment: Vec<String>,
    /// Absolute; made if missing.
    pub working_directory: String,
    /// `user[:group]`, names or numbers, looked up in the container's own files; empty is root (OCI config.md, `User`).
    pub user: String,
    /// Its standard streams.
    pub stdio: Stdio,
}

/// A process's standard streams. What is absent is `/dev/null`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stdio {
    /// Host to process, ended by half-close.
    pub stdin: Option<Stream>,
    /// Process to host. With a terminal, all that the terminal shows.
    pub stdout: Option<Stream>,
    /// Process to host; not with a terminal.
    pub stderr: Option<Stream>,
    /// A pseudo-terminal of this size stands between.
    pub terminal: Option<TerminalSize>,
}

/// Rows and columns of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TerminalSize {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
}

/// A process runs: its `execve` succeeded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Started {
    /// Which.
    pub process: ProcessId,
}

/// A process ended and all its output has been sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exited {
    /// Which.
    pub process: ProcessId,
    /// How.
    pub status: ExitStatus,
    /// The kernel killed a process of its container for want of memory.
    pub out_of_memory: bool,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// By `exit(n)`, 0 to 255.
    Code(u8),
    /// By signal n, 1 to 64.
    Signal(u8),
}

/// Send a signal to a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Signal {
    /// Which process.
    pub process: ProcessId,
    /// Linux's number on x86_64, 1 to 64.
    pub signal: u8,
}

/// A process's terminal changed its size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resize {
    /// Which process.
    pub process: ProcessId,
    /// The new size.
    pub size: TerminalSize,
}

/// What the Runtime API needs to know of a function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Function {
    /// Its first phase may take this long, ms, before the runtime must have asked for its first event.
    pub init_timeout_ms: u32,
    /// Largest response, bytes.
    pub response_bytes: u64,
}

/// Give a function an event. One at a time; the answer is [`Invoked`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Invoke {
    /// The request's id, a UUID.
    pub id: String,
    /// The event's bytes, sent by the host, ended by half-close.
    pub event: Stream,
    /// Bytes in the event.
    pub event_bytes: u64,
    /// Where the response's, or the error's, bytes go.
    pub response: Stream,
    /// The function may run this long, ms. The agent times out the runtime; the host times out the agent.
    pub timeout_ms: u32,
    /// Further `Lambda-Runtime-*` headers of `invocation/next`, named without that prefix (`Invoked-Function-Arn`, `Trace-Id`).
    pub headers: BTreeMap<String, String>,
}

/// How an invocation ended. The bytes went over [`Invoke::response`] before this.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Invoked {
    /// [`Invoke::id`].
    pub id: String,
    /// How.
    pub outcome: Outcome,
    /// From the workload's start to its first request for an event, µs; with the first invocation only, and not in a clone of
    /// a function that had asked before: its INIT was the template's.
    pub init_us: Option<u64>,
    /// From handing over the event to the outcome, µs.
    pub duration_us: u64,
    /// Peak memory of the container so far, bytes.
    pub memory_peak_bytes: u64,
    /// Bytes sent over the response stream.
    pub response_bytes: u64,
}

/// The ways in which an invocation ends (AWS Lambda, *Runtime API*).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum Outcome {
    /// The runtime posted a response.
    Response {
        /// Its `Content-Type`.
        content_type: String,
    },
    /// The runtime posted an error for this invocation.
    Error {
        /// `Lambda-Runtime-Function-Error-Type`.
        error_type: String,
    },
    /// The runtime posted to `init/error`.
    InitError {
        /// `Lambda-Runtime-Function-Error-Type`.
        error_type: String,
    },
    /// The runtime did not answer in time and was killed.
    TimedOut,
    /// The runtime did not ask for its first event in time and was killed.
    InitTimedOut,
    /// The runtime ended without answering.
    Exited {
        /// How.
        status: ExitStatus,
        /// For want of memory.
        out_of_memory: bool,
    },
    /// The response exceeded [`Function::response_bytes`].
    ResponseTooLarge {
        /// What it would have been, where the runtime said so, else what had arrived.
        bytes: u64,
    },
}

/// Report usage now, and from then on at this interval.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReportUsage {
    /// ms, at least 100; without it just once, and a period that was set before ends.
    pub every_ms: Option<u32>,
}

/// A usage report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Usage {
    /// Per container.
    pub containers: BTreeMap<u32, GuestUsage>,
    /// What the guest's kernel has free beyond what it keeps in reserve, bytes: a balloon of this size makes it reclaim nothing.
    pub spare_bytes: u64,
    /// No more will come.
    pub last: bool,
}

/// Send files of a container that has ended. They go over the stream, as [`crate::returned`] says, whose end is the answer; what keeps them from being sent
/// is answered by [`Failed`] too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Collect {
    /// Whose; its workload has ended.
    pub container: ContainerId,
    /// Absolute, each a file or a directory with all that is below. Links on the way are followed within the container's root.
    pub paths: Vec<String>,
    /// Where they go.
    pub stream: Stream,
}

/// End: kill what still runs, flush disks, report, restart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shutdown {}

/// The agent's last words before it restarts the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ending {
    /// Why.
    pub reason: EndingReason,
}

/// Why a room ends from within.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum EndingReason {
    /// The host asked.
    Asked,
    /// The agent can't go on.
    Broken {
        /// One sentence.
        message: String,
    },
}

/// A request could not be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Failed {
    /// Which request.
    pub request: Request,
    /// What kind of failure, which decides the exit status at the host.
    pub failure: Failure,
    /// One sentence for the user. Guest-made text: the host caps and cleans it before it prints it.
    pub message: String,
}

/// The request that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// [`Prepare`].
    Prepare(ContainerId),
    /// [`Start`] or [`Exec`].
    Process(ProcessId),
    /// [`Invoke`].
    Invoke(String),
    /// [`Freeze`].
    Freeze,
    /// [`Attach`].
    Attach(ProcessId),
    /// [`Collect`].
    Collect(ContainerId),
}

/// Kinds of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Failure {
    /// The payload is damaged, lies about itself, or would escape.
    BadPayload,
    /// The payload exceeds [`UnpackLimits`].
    PayloadTooLarge,
    /// The room's disk is full.
    DiskFull,
    /// The program does not exist (Docker's status 127).
    CommandNotFound,
    /// The program can't be executed (Docker's status 126).
    CommandNotExecutable,
    /// The user or group does not exist in the container.
    UnknownUser,
    /// Anything else the request got wrong.
    BadRequest,
    /// The guest's kernel refused something that it should not have.
    System,
}

macro_rules! hexadecimal {
    ($name:ident, $bytes:literal) => {
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!(stringify!($name), "(…)"))
            }
        }
        impl From<$name> for String {
            fn from(secret: $name) -> Self {
                secret.0.iter().map(|byte| format!("{byte:02x}")).collect()
            }
        }
        impl TryFrom<String> for $name {
            type Error = &'static str;
            fn try_from(text: String) -> Result<Self, Self::Error> {
                const WRONG: &str = concat!("expected ", $bytes, " bytes as lower-case hexadecimal digits");
                let nibble = |digit: u8| match digit {
                    b'0'..=b'9' => Ok(digit - b'0'),
                    b'a'..=b'f' => Ok(digit - b'a' + 10),
                    _ => Err(WRONG),
                };
                let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return Err(WRONG) };
                let mut bytes = [0; $bytes];
                if pairs.len() != bytes.len() {
                    return Err(WRONG);
                }
                for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
                    *byte = nibble(*high)? << 4 | nibble(*low)?;
                }
                Ok(Self(bytes))
            }
        }
    };
}

hexadecimal!(Entropy, 64);
hexadecimal!(Token, 16);
