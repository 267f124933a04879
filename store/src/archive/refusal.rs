//! What can be wrong with an archive, without its path: whoever reads the headers doesn't know it. Plain data, because it may come from
//! another process; all words are ours but an entry's name, which is cleaned wherever it arrives.

use std::fmt::{self, Display, Formatter};
use std::io;

use serde::{Deserialize, Serialize};

use crate::printable::Printable;

/// The most entries of an archive: 128 layers have three each, and 16,384 are hundreds of images.
pub(super) const MOST_ENTRIES: usize = 16_384;
/// The most bytes of all names and links together: 256 for each of so many entries.
pub(super) const MOST_NAME_BYTES: usize = 4 << 20;

/// Why a file is no image archive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// Not a tar.
    NotATar,
    /// A packed one.
    Compressed(Compressor),
    /// Its end is missing.
    Truncated,
    /// It was shortened while it was read.
    Shortened,
    /// The operating system refused to read it.
    Unreadable {
        /// Linux's error number.
        errno: i32,
    },
    /// A header that can't be right.
    Damaged {
        /// Where, in bytes.
        at: u64,
        /// What is wrong with it.
        damage: Damage,
    },
    /// `..`, an absolute name, a name that is there twice.
    Name {
        /// The entry.
        name: Printable,
        /// What is wrong with it.
        fault: NameFault,
    },
    /// A device, a pipe, a sparse file.
    Kind {
        /// The entry.
        name: Printable,
        /// Its type flag.
        kind: char,
    },
    /// A flood of entries.
    TooManyEntries,
    /// A flood of names.
    TooManyNameBytes,
}

/// What a file is packed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compressor {
    /// RFC 1952.
    Gzip,
    /// RFC 8878.
    Zstd,
    /// `.xz`.
    Xz,
    /// `.bz2`.
    Bzip2,
}

/// What is wrong with a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Damage {
    /// Its checksum is no number.
    NoChecksum,
    /// Its checksum is another's.
    WrongChecksum,
    /// Its size is no number, or has no room in 64 bits.
    NoSize,
    /// A record of its extension is broken.
    MalformedExtension,
    /// Its extension is too large.
    LongExtension,
    /// A pax header of a sparse file.
    Sparse,
    /// A global pax header with a say about entries.
    GlobalNames,
}

/// What is wrong with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NameFault {
    /// Over 4096 bytes.
    TooLong,
    /// Not text.
    NotUtf8,
    /// A link's target is not text.
    LinkNotUtf8,
    /// Begins with a slash.
    Absolute,
    /// NUL.
    Nul,
    /// `..`
    LeadsOut,
    /// Another entry has it.
    Twice,
    /// Not in the form in which an index has names: said of an index that comes from elsewhere.
    NotNormal,
}

impl Refusal {
    /// What it comes to for the archive at this path.
    #[must_use]
    pub fn sentence(&self, path: &str) -> String {
        match self {
            Self::NotATar => format!("{path} is no tar archive."),
            Self::Compressed(compressor) => {
                let tool = match compressor {
                    Compressor::Gzip => "gunzip",
                    Compressor::Zstd => "zstd -d",
                    Compressor::Xz => "unxz",
                    Compressor::Bzip2 => "bunzip2",
                };
                format!("{path} is compressed: unpack it first, with `{tool}`.")
            }
            Self::Truncated => {
                format!("The archive {path} is truncated: it ends within an entry, or without its end mark.")
            }
            Self::Shortened => format!("{path} became shorter while it was read."),
            Self::Unreadable { errno } => {
                let error = io::Error::from_raw_os_error(*errno);
                format!("The archive {path} can't be read: {error}.")
            }
            Self::Damaged { at, damage } => {
                format!("The archive {path} is damaged: the header at byte {at} {damage}.")
            }
            Self::Name { name, fault } => {
                format!("The archive {path} has an entry called {name:?}, which {fault}.")
            }
            Self::Kind { name, kind } => format!(
                "The archive {path} has the entry {name:?} of a kind that image archives don't have ({kind:?})."
            ),
            Self::TooManyEntries => {
                format!("The archive {path} has more than {MOST_ENTRIES} entries, the most that is read.")
            }
            Self::TooManyNameBytes => format!(
                "The names in the archive {path} are longer than {} MiB together, the most that is read.",
                MOST_NAME_BYTES >> 20
            ),
        }
    }
}

impl Display for Damage {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoChecksum => "has no checksum",
            Self::WrongChecksum => "has a wrong checksum",
            Self::NoSize => "has no size",
            Self::MalformedExtension => "has a malformed extension",
            Self::LongExtension => "says that its extension is longer than 64 KiB",
            Self::Sparse => "is of a sparse file",
            Self::GlobalNames => "sets names or sizes for all entries",
        })
    }
}

impl Display for NameFault {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooLong => "is longer than 4096 bytes",
            Self::NotUtf8 => "is not UTF-8",
            Self::LinkNotUtf8 => "leads to a name that is not UTF-8",
            Self::Absolute => "is an absolute name or leads to one",
            Self::Nul => "has a NUL character",
            Self::LeadsOut => "leads out of the archive by ..",
            Self::Twice => "is there twice",
            Self::NotNormal => "is not in its shortest form",
        })
    }
}
