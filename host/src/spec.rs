//! What a room is to be: written once as `room.json`, before its owner starts, and never changed.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use carrel_protocol::agent::{
    self, Compression, ContainerId, FromHost, ProcessId, Start, Stdio, Stream, Surroundings, TerminalSize,
    Token,
};
pub use carrel_protocol::confinement::Part;
use carrel_protocol::units::{MemoryMib, VcpuCount};
use carrel_protocol::{FrameError, Message};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A room's only container.
pub(crate) const CONTAINER: ContainerId = ContainerId(0);
/// A room's workload.
pub(crate) const WORKLOAD: ProcessId = ProcessId(0);
/// The most layers and zips that one room is made of.
pub const MOST_BLOBS: usize = 256;
/// A room's disk where nobody says otherwise, bytes.
pub const DEFAULT_DISK_BYTES: u64 = 10 << 30;
/// The smallest disk: the empty one that rooms start from must fit.
pub const LEAST_DISK_BYTES: u64 = 64 << 20;

/// A word that names no room.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum NameError {
    /// Not an id.
    #[error("{0:?} is no room's id: an id is 12 hexadecimal digits")]
    Id(String),
    /// Not a name.
    #[error(
        "{0:?} is no name for a room: use 1 to 63 letters, digits, '.', '_' or '-', beginning with a letter or digit"
    )]
    Name(String),
}

/// A room's id: 12 lower-case hexadecimal digits. Safe in paths and cgroup names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RoomId(String);

impl RoomId {
    /// Digits in an id.
    pub const DIGITS: usize = 12;

    /// An id made of these random bytes.
    pub fn from_random(bytes: [u8; 6]) -> Self {
        Self(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// The digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for RoomId {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let digits =
            text.len() == Self::DIGITS && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if digits { Ok(Self(text.to_owned())) } else { Err(NameError::Id(text.to_owned())) }
    }
}

/// What a user calls a room.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RoomName(String);

impl RoomName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for RoomName {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let good = (1..=63).contains(&text.len())
            && text.bytes().all(plain)
            && text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        if good { Ok(Self(text.to_owned())) } else { Err(NameError::Name(text.to_owned())) }
    }
}

macro_rules! text {
    ($name:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }
        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                text.parse()
            }
        }
    };
}
text!(RoomId);
text!(RoomName);

/// A room. Made by the cli from an image's configuration and the user's options ([`crate::image::compose`]).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoomSpec {
    /// Chosen by [`crate::Home::create`]; empty rooms have none yet.
    pub id: Option<RoomId>,
    /// What the user calls it.
    pub name: Option<RoomName>,
    /// The image's or the function's name, for `carrel ps`.
    pub image: String,
    /// The microVM.
    pub machine: Machine,
    /// What its container's files are made of; their bytes are handed over beside this, in this order: layers, then zips.
    pub payload: Payload,
    /// What surrounds the workload.
    pub surroundings: Surroundings,
    /// The workload.
    pub process: ProcessSpec,
    /// What ends the workload politely, 1 to 64.
    pub stop_signal: u8,
    /// From the stop signal to SIGKILL, ms.
    pub stop_timeout_ms: u64,
    /// From the workload's start to its end by force, ms; a function's own timeout is in [`FunctionSpec`].
    pub timeout_ms: Option<u64>,
    /// It outlives the command that made it, and its log and record outlive it.
    pub detached: bool,
    /// Parts of the VMM's confinement to do without.
    pub without: Vec<Part>,
    /// The workload is a function's runtime.
    pub function: Option<FunctionSpec>,
    /// Its template is one whose workload runs already and is ready, not one of its files alone. Of no meaning to a room that begins with a boot.
    #[serde(default)]
    pub initialised: bool,
}

/// A room's microVM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// vCPUs.
    pub vcpus: VcpuCount,
    /// Guest memory, MiB.
    pub memory_mib: MemoryMib,
    /// What the workload may use, in thousandths of one CPU.
    pub cpu_millis: u32,
    /// The disk's size, bytes; rounded up to 4 KiB. It is sparse.
    pub disk_bytes: u64,
    /// Boot this kernel in place of the assets' own.
    pub kernel: Option<PathBuf>,
}

/// What a container's files are made of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Payload {
    /// The image's layers, lowest first.
    pub layers: Vec<LayerSpec>,
    /// Zips, unpacked after all layers.
    pub zips: Vec<ZipSpec>,
    /// Bytes after decompression at most; without it what the disk holds.
    pub unpacked_bytes: Option<u64>,
}

/// Files, directories and links that one payload may have.
pub const MOST_ENTRIES: u64 = 1_000_000;

/// A layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerSpec {
    /// `sha256:…` of the blob.
    pub digest: String,
    /// Bytes of the blob.
    pub size: u64,
    /// How it is packed.
    pub compression: Compression,
    /// `sha256:…` of the unpacked tar.
    pub diff_id: String,
}

/// A zip.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ZipSpec {
    /// `sha256:…` of the file.
    pub digest: String,
    /// Bytes of the file.
    pub size: u64,
    /// Absolute directory in the container.
    pub at: String,
}

/// A process: the workload, or one that `exec` starts beside it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessSpec {
    /// Program and arguments; at least one.
    pub arguments: Vec<String>,
    /// `NAME=value`; later wins.
    pub environment: Vec<String>,
    /// Absolute.
    pub working_directory: String,
    /// `user[:group]`; empty is root.
    pub user: String,
    /// Its standard input is the session's; else `/dev/null`.
    pub interactive: bool,
    /// It has a terminal of this size at first.
    pub terminal: Option<TerminalSize>,
}

impl ProcessSpec {
    /// This process as the agent is told of it.
    pub(crate) fn told(&self, id: ProcessId, stdio: Stdio) -> agent::Process {
        agent::Process {
            id,
            arguments: self.arguments.clone(),
            environment: self.environment.clone(),
            working_directory: self.working_directory.clone(),
            user: self.user.clone(),
            stdio,
        }
    }

    /// What this process is beside a workload, where it doesn't say: as that.
    pub(crate) fn beside(&self, workload: &Self) -> Self {
        let or = |own: &String, inherited: &String| if own.is_empty() { inherited } else { own }.clone();
        Self {
            environment: workload.environment.iter().chain(&self.environment).cloned().collect(),
            working_directory: or(&self.working_directory, &workload.working_directory),
            user: or(&self.user, &workload.user),
            ..self.clone()
        }
    }
}

impl RoomSpec {
    /// The agent's order to start the workload; `cloning` lets it say when it is ready to be cloned.
    pub(crate) fn start(&self, process: agent::Process, cloning: bool) -> Start {
        let function = self.function.as_ref().map(|function| agent::Function {
            init_timeout_ms: function.init_timeout_ms,
            response_bytes: function.response_bytes,
        });
        Start { container: CONTAINER, surroundings: self.surroundings.clone(), process, function, cloning }
    }

    /// Whether that order can be said at all, with whatever streams and terminal.
    pub(crate) fn check_start(&self) -> Result<(), FrameError> {
        let stream = || Some(Stream { port: u32::MAX, token: Token([u8::MAX; 16]) });
        let terminal = Some(TerminalSize { rows: u16::MAX, columns: u16::MAX });
        let stdio = Stdio { stdin: stream(), stdout: stream(), stderr: stream(), terminal };
        FromHost::from(self.start(self.process.told(WORKLOAD, stdio), false)).encode().map(drop)
    }
}

/// A function's part of a room.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FunctionSpec {
    /// Its name.
    pub name: String,
    /// Memory as the user gave it, MB.
    pub memory_mb: u32,
    /// An event may take this long, ms.
    pub timeout_ms: u32,
    /// Until the runtime asks for its first event, ms.
    pub init_timeout_ms: u32,
    /// Largest response, bytes.
    pub response_bytes: u64,
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// A small room that asks for nothing in particular.
    pub(crate) fn room() -> RoomSpec {
        RoomSpec {
            id: None,
            name: None,
            image: "image".into(),
            machine: Machine {
                vcpus: VcpuCount::try_from(1).unwrap(),
                memory_mib: MemoryMib::try_from(128).unwrap(),
                cpu_millis: 1000,
                disk_bytes: 1 << 30,
                kernel: None,
            },
            payload: Payload::default(),
            surroundings: Surroundings::default(),
            process: ProcessSpec::default(),
            stop_signal: 15,
            stop_timeout_ms: 0,
            timeout_ms: None,
            detached: false,
            without: Vec::new(),
            function: None,
            initialised: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_can_not_leave_its_directory() {
        for wrong in ["", "../desk", ".", ".hidden", "a/b", "a b", "a\0", "-f", &"x".repeat(64)] {
            assert!(wrong.parse::<RoomName>().is_err(), "{wrong:?}");
        }
        for right in ["desk", "web-1", "0", "a.b_c"] {
            assert_eq!(right.parse::<RoomName>().unwrap().as_str(), right);
        }
    }

    #[test]
    fn a_start_that_no_message_can_say_is_found_before_it() {
        let spec = |bytes: usize| RoomSpec {
            process: ProcessSpec { arguments: vec!["x".repeat(bytes)], ..ProcessSpec::default() },
            ..testing::room()
        };
        spec((1 << 20) - 1000).check_start().unwrap();
        assert!(matches!(spec(1 << 20).check_start(), Err(FrameError::TooLong { limit: 1_048_576, .. })));
    }

    #[test]
    fn an_id_is_twelve_digits() {
        let id = RoomId::from_random([0, 1, 2, 0xab, 0xcd, 0xff]);
        assert_eq!(id.as_str(), "000102abcdff");
        assert_eq!(id.as_str().parse::<RoomId>().unwrap(), id);
        for wrong in ["", "000102abcdf", "000102ABCDFF", "../../../../"] {
            assert!(wrong.parse::<RoomId>().is_err(), "{wrong:?}");
        }
    }
}
