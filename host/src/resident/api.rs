//! What commands say to the resident owner over `pool.sock`, one packet each, and what it answers.
//!
//! ```text
//!  command                            resident owner
//!    │ ── Own ──────────────────────────▶ │
//!    │ ── Supply + lock, … ─────────────▶ │  as to an owner that was started
//!    │ ◀────────────────────────── Mine ─ │  from here on as in [`crate::owner::api`]; one that closes the connection before has taken nothing
//!
//!    │ ── Look ─────────────────────────▶ │
//!    │ ◀──────────────────────── Looked ─ │
//! ```

use serde::{Deserialize, Serialize};

use super::Status;
use crate::spec::RoomId;

const KIB: u32 = 1 << 10;

/// Of the words here and in [`crate::owner::api`], and of the order that a command writes: whoever is of another version is not served, and does without.
pub const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "/2");

carrel_protocol::messages! {
    /// What a command says.
    ToResident {
        1 Own KIB;
        2 Look KIB;
    }
}

carrel_protocol::messages! {
    /// What it is told.
    FromResident {
        1 Mine KIB;
        2 Looked 8 * KIB;
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
