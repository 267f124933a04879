//! The outer tar of an image archive: which bytes of it are what.
//!
//! ```text
//!   the opened file ─▶ Indexer ─▶ Index: names, kinds, offsets, sizes ─▶ Archive: sections of the file, by name
//!                      (headers)  (checked, whoever made it)
//! ```
//!
//! In: a file that can be read in any order. Out: its entries by name, as sections of the file. Nothing is extracted, and no name reaches
//! a file system. Headers are read by an [`Indexer`]: `carrel` has one that does it in a confined process, [`InThisProcess`] is what runs
//! in there. What comes back is held to the same rules here, since that process has met the archive.

use std::fs::File;

use crate::section::{Section, SectionError};

mod header;
mod index;
mod name;
mod refusal;
mod scan;

pub use index::{Entry, Index, Kind};
pub use refusal::{Compressor, Damage, NameFault, Refusal};

/// Why an archive can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// It is no image archive, or a broken one.
    #[error("{}", .refusal.sentence(.path))]
    Refused {
        /// The archive.
        path: String,
        /// What is wrong with it.
        refusal: Refusal,
    },
    /// Whoever reads headers failed.
    #[error("The archive {path} was not read, because the confined process that reads archives failed.")]
    NotRead {
        /// The archive.
        path: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The file can't be read.
    #[error(transparent)]
    Section(#[from] SectionError),
}

/// Why there is no index.
#[derive(Debug)]
pub enum IndexError {
    /// The archive is to blame.
    Refused(Refusal),
    /// The indexer is.
    Failed(Box<dyn std::error::Error + Send + Sync>),
}

impl From<Refusal> for IndexError {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// Whoever reads the headers of archives.
pub trait Indexer: Sync {
    /// The entries of an archive of so many bytes, a regular file that is open for reading.
    ///
    /// # Errors
    ///
    /// If it is no image archive, or can't be read.
    fn index(&self, archive: &File, length: u64) -> Result<Index, IndexError>;
}

/// Reads headers where it is called: for a process that is confined already, and for tests.
#[derive(Clone, Copy, Debug, Default)]
pub struct InThisProcess;

impl Indexer for InThisProcess {
    fn index(&self, archive: &File, length: u64) -> Result<Index, IndexError> {
        Ok(scan::scan(archive, length)?)
    }
}

/// The entries of an archive.
#[derive(Debug)]
pub(crate) struct Archive {
    whole: Section,
    index: Index,
}

impl Archive {
    /// Has all headers read.
    pub(crate) fn read(whole: Section, indexer: &dyn Indexer) -> Result<Self, ArchiveError> {
        let path = || whole.path().to_owned();
        let index = indexer.index(whole.file(), whole.length()).map_err(|error| match error {
            IndexError::Refused(refusal) => ArchiveError::Refused { path: path(), refusal },
            IndexError::Failed(source) => ArchiveError::NotRead { path: path(), source },
        })?;
        Ok(Self { whole, index })
    }

    pub(crate) fn path(&self) -> &str {
        self.whole.path()
    }

    /// A regular file, or what a link to one leads to.
    pub(crate) fn file(&self, name: &str) -> Option<Section> {
        let (offset, length) = self.index.file(name)?;
        self.whole.part(offset, length)
    }
}

#[cfg(test)]
mod tests;
