//! What can go wrong with templates: errors, which end what was asked, and damage, which ends a template.

use std::io;
use std::path::PathBuf;

use super::canonical::CanonicalError;
use super::key::{KeyError, TemplateKey};
use super::record::{LARGEST_DESCRIPTION, Part, RecordError};
use super::sparse::SparseDigest;
use crate::printable::Printable;

/// Why the store could not do with a template what was asked.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The operating system refused.
    #[error("The template's {} can't be {doing}.", .path.display())]
    Io {
        /// `opened`, `written`…
        doing: &'static str,
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The store's file system is full, or the user's part of it.
    #[error("There is no space left in {} for a template: free some, with `carrel prune` too.", .root.display())]
    NoSpace {
        /// Where the templates are.
        root: PathBuf,
        /// Which it was: full, or a quota.
        #[source]
        source: io::Error,
    },
    /// Words that are no key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// What a key should be of has no canonical form.
    #[error(transparent)]
    Canonical(#[from] CanonicalError),
    /// No template begins with these digits.
    #[error("There is no template {0:?} in the store: `carrel template ls` lists what there is.")]
    Unknown(Printable),
    /// Several do.
    #[error("{0:?} is the beginning of several templates' keys: give more digits.")]
    Ambiguous(Printable),
    /// It is to stay.
    #[error("The template {} is pinned: `carrel template unpin` it first.", .0)]
    Pinned(TemplateKey),
    /// One of its files was never made.
    #[error("The template can't be published without its {0}: make it first.")]
    Unmade(Part),
    /// One of its files has another length than was asked for.
    #[error(
        "The template can't be published: its {part} has {actual} bytes, and should have {expected}. Make it again."
    )]
    Resized {
        /// Which file.
        part: Part,
        /// What it was made with, in bytes.
        expected: u64,
        /// What it has, in bytes.
        actual: u64,
    },
    /// A published file never changes again.
    #[error(
        "The template can't be published: its {0} is still open for writing. End the VMM that wrote it first."
    )]
    StillWritten(Part),
    /// What the host says about it can't be kept.
    #[error("The template's description is larger than {} KiB of JSON, or nested too deeply: say less.", LARGEST_DESCRIPTION >> 10)]
    Description,
}

impl TemplateError {
    /// Completes an error of the operating system by what was done to what.
    pub(super) fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| {
            if is_full(&source) {
                let root = path.parent().map_or_else(|| path.clone(), PathBuf::from);
                return Self::NoSpace { root, source };
            }
            Self::Io { doing, path, source }
        }
    }
}

/// Whether there is no space left, for anybody or for this user.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Why a template must not be used any more.
#[derive(Debug, thiserror::Error)]
pub enum Damage {
    /// It has no such file.
    #[error("Its {0} is missing.")]
    Missing(&'static str),
    /// A folder, a link or a device stands in its place.
    #[error("Its {0} is no file.")]
    NoFile(&'static str),
    /// Shorter or longer than when it was published.
    #[error("Its {part} has {actual} bytes, and had {expected} when it was published.")]
    Size {
        /// Which file.
        part: Part,
        /// By its record, in bytes.
        expected: u64,
        /// What is there, in bytes.
        actual: u64,
    },
    /// Other bytes than when it was published.
    #[error("Its {part} was changed: its digest is {actual}, and was {expected} when it was published.")]
    Content {
        /// Which file.
        part: Part,
        /// By its record.
        expected: SparseDigest,
        /// Of what is there.
        actual: SparseDigest,
    },
    /// The disk, or fs-verity, does not give its bytes back.
    #[error("Its {0} can't be read any more.")]
    Unreadable(&'static str, #[source] io::Error),
    /// Its record is none.
    #[error(transparent)]
    Record(#[from] RecordError),
}
