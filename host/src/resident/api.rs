//! What commands say to the resident owner over `pool.sock`, one packet each, and what it answers.
//!
//! ```text
//!  command                            resident owner
//!    │ ── Own ──────────────────────────▶ │
//!    │ ── Supply + lock, … ─────────────▶ │  as to an owner that was started
//!    │ ◀────────────────────────── Mine ─ │  from here on as in [`crate::owner::api`]; one that closes the connection before has taken nothing
//!
//!    │ ── Keep + a room's connections ──▶ │  a function's, that waits for another event
//!    │ ◀────────────────────────── Kept ─ │  it is the resident owner's now; one that closes the connection keeps nothing
//!
//!    │ ── Wake ─────────────────────────▶ │
//!    │ ◀──────── Woken + its connections ─ │  none if there is no such room
//!
//!    │ ── Look ─────────────────────────▶ │
//!    │ ◀──────────────────────── Looked ─ │
//! ```

use serde::{Deserialize, Serialize};

use super::Status;
use crate::spec::RoomId;

const KIB: u32 = 1 << 10;

/// Of the words here and in [`crate::owner::api`], and of the order that a command writes: whoever is of another version is not served, and does without.
pub const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "/4");

carrel_protocol::messages! {
    /// What a command says.
    ToResident {
        1 Own KIB;
        2 Look KIB;
        3 Keep KIB;
        4 Wake KIB;
    }
}

carrel_protocol::messages! {
    /// What it is told.
    FromResident {
        1 Mine KIB;
        2 Looked 8 * KIB;
        3 Kept KIB;
        4 Woken KIB;
    }
}

/// Own this room, whose directory is made and whose order is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Own {
    /// [`VERSION`] of whoever asks.
    pub version: String,
    /// The room.
    pub room: RoomId,
}

/// Keep this room for another event: beside this its creator's connection, its function's standard output and error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keep {
    /// [`VERSION`] of whoever asks.
    pub version: String,
    /// What it is asked for by: all that makes one such room as good as another.
    pub key: String,
}

/// Give me a room that was kept under this key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wake {
    /// [`VERSION`] of whoever asks.
    pub version: String,
    /// As in [`Keep`].
    pub key: String,
}

/// What is there?
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Look {
    /// [`VERSION`] of whoever asks.
    pub version: String,
}

/// The room is the resident owner's, whatever comes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mine {}

/// What is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Looked {
    /// All of it.
    pub status: Status,
}

/// The room is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {}

/// The room, as it was kept, if there is one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Woken {}
