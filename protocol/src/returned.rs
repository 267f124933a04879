//! Files on their way back from a room: what goes over the stream of a [`Collect`](crate::agent::Collect).
//!
//! ```text
//!   ( Entry [ `bytes` bytes of a file ] | Missing )…  Done
//! ```
//!
//! Entries come in the order of the paths that were asked for, directories before what is below them. It is no tar: one form with one
//! reading leaves nothing to disagree about. Whoever takes it must still look where each path leads: its sender is a guest.

use serde::{Deserialize, Serialize};

const KIB: u32 = 1 << 10;
/// Longest path of an entry, bytes (PATH_MAX).
pub const LONGEST_PATH: usize = 4096;

crate::messages! {
    /// What the sender says.
    FromRoom {
        // Each byte of a path may take six in JSON, and there are two.
        1 Entry 52 * KIB;
        2 Missing KIB;
        3 Done KIB;
    }
}

/// A file, a directory, a link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The number of the path that was asked for.
    pub root: u32,
    /// Below it; empty for itself.
    pub path: String,
    /// What it is.
    pub kind: Kind,
    /// Permission bits, 0 to 0o777.
    pub mode: u32,
    /// Last change, seconds since the epoch.
    pub mtime: i64,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is", deny_unknown_fields)]
pub enum Kind {
    /// A directory; what is below follows.
    Directory,
    /// A regular file; so many bytes follow at once.
    File {
        /// Of its content.
        bytes: u64,
    },
    /// A symbolic link.
    Link {
        /// To where, as it stands.
        target: String,
    },
}

/// Nothing is at a path that was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Missing {
    /// Its number.
    pub root: u32,
}

/// That was all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Done {
    /// Files, sockets and names that can't be sent (not UTF-8, too long).
    pub left_out: u64,
}
