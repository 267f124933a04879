//! The working set: which pages of a snapshot's memory one clone touched, so that others have them before their guests ask, page by page and exit by exit.
//!
//! ```text
//!  a clone runs ── RecordWorkingSet ─▶ touched: its pagemap ─▶ WorkingSet ─▶ file
//!  a later clone's start:              file ─▶ WorkingSet ─▶ ahead: written pages copied, all of them mapped for the guest
//! ```
//!
//! The file is a sealed one (`sealed.rs`: magic `carrelWS`, version, length, checksum) around
//!
//! ```text
//!  u64        pages of the memory
//!  u32, u32   runs of written and of read pages
//!  then each run: u32 first page, u32 pages       (little-endian all)
//! ```
//!
//! Pages are counted as the memory file has them, without the hole. Runs ascend and don't meet. It is a hint: one that is damaged, of another version or of
//! another memory is not used, and a machine starts without.

pub mod ahead;
pub mod touched;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use thiserror::Error;

use crate::sealed::{Broken, HEADER_BYTES, Kind};

/// Changes with every change of the form or its meaning.
pub const VERSION: u32 = 1;
const KIND: Kind = Kind { magic: *b"carrelWS", version: VERSION };
const COUNTS_BYTES: usize = 16;
/// Pages of any set at most: 64 MiB.
const MOST_PAGES: u64 = 16_384;
/// Bytes of a file at most: as many runs as there can be pages.
const MOST_BYTES: u64 = (HEADER_BYTES + COUNTS_BYTES) as u64 + 8 * MOST_PAGES;

/// A file is no working set of this memory.
#[derive(Debug, Error)]
pub enum WorkingSetError {
    /// The file failed.
    #[error("the working set can't be {doing}")]
    File {
        /// `read` or `written`.
        doing: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something else.
    #[error("the working set's file is none of carrel's")]
    Magic,
    /// Another version.
    #[error("the working set is of version {found} and this carrel-vmm's is {VERSION}")]
    Version {
        /// The file's.
        found: u32,
    },
    /// Too long, too short, or not as long as it says.
    #[error("the working set's file is cut short or longer than it says")]
    Length,
    /// Bytes were changed.
    #[error("the working set's file is damaged: its checksum is wrong")]
    Checksum,
    /// Of another memory.
    #[error("the working set is of a memory of {found} pages, and this one has {here}")]
    Memory {
        /// The file's.
        found: u64,
        /// This machine's.
        here: u64,
    },
    /// Pages outside of the memory, out of order, or too many.
    #[error("the working set names pages that no recorder names")]
    Runs,
}

impl From<Broken> for WorkingSetError {
    fn from(broken: Broken) -> Self {
        match broken {
            Broken::Magic => Self::Magic,
            Broken::Version(found) => Self::Version { found },
            Broken::Length => Self::Length,
            Broken::Checksum => Self::Checksum,
        }
    }
}

/// Pages that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first.
    pub first: u32,
    /// How many; one at least.
    pub pages: u32,
}

/// See the module's page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkingSet {
    memory_pages: u64,
    written: Vec<Run>,
    read: Vec<Run>,
}

impl WorkingSet {
    /// Nothing yet, of a memory of so many pages.
    pub fn new(memory_pages: u64) -> Self {
        Self { memory_pages, written: Vec::new(), read: Vec::new() }
    }

    /// Pages that the guest wrote to, or devices did for it.
    pub fn written(&self) -> &[Run] {
        &self.written
    }

    /// Pages that were only read.
    pub fn read_only(&self) -> &[Run] {
        &self.read
    }

    /// Pages that a set of such a memory has at most: a quarter, and 64 MiB.
    fn most_pages(&self) -> u64 {
        (self.memory_pages / 4).min(MOST_PAGES)
    }

    fn pages(&self) -> u64 {
        self.written.iter().chain(&self.read).map(|run| u64::from(run.pages)).sum()
    }

    /// Reads a file from its beginning.
    ///
    /// # Errors
    ///
    /// It isn't a whole set of a memory of so many pages.
    pub fn read(mut file: &File, memory_pages: u64) -> Result<Self, WorkingSetError> {
        let failed = |source| WorkingSetError::File { doing: "read", source };
        let length = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if length > MOST_BYTES {
            return Err(WorkingSetError::Length);
        }
        let mut bytes = vec![0; usize::try_from(length).map_err(|_| WorkingSetError::Length)?];
        // By offset: its position is shared with other clones' VMMs.
        file.read_exact_at(&mut bytes, 0).map_err(failed)?;
        Self::decode(&bytes, memory_pages)
    }

    /// Reads a file's bytes.
    ///
    /// # Errors
    ///
    /// As [`Self::read`].
    pub fn decode(bytes: &[u8], memory_pages: u64) -> Result<Self, WorkingSetError> {
        let body = KIND.open(bytes)?;
        let (counts, runs) = body.split_first_chunk::<COUNTS_BYTES>().ok_or(WorkingSetError::Length)?;
        let [m0, m1, m2, m3, m4, m5, m6, m7, w0, w1, w2, w3, r0, r1, r2, r3] = *counts;
        let found = u64::from_le_bytes([m0, m1, m2, m3, m4, m5, m6, m7]);
        if found != memory_pages {
            return Err(WorkingSetError::Memory { found, here: memory_pages });
        }
        let count = |bytes| usize::try_from(u32::from_le_bytes(bytes)).map_err(|_| WorkingSetError::Runs);
        let (written, read) = (count([w0, w1, w2, w3])?, count([r0, r1, r2, r3])?);
        let (runs, rest) = runs.as_chunks::<8>();
        if !rest.is_empty() || written.checked_add(read) != Some(runs.len()) {
            return Err(WorkingSetError::Length);
        }
        let run = |[f0, f1, f2, f3, p0, p1, p2, p3]: &[u8; 8]| Run {
            first: u32::from_le_bytes([*f0, *f1, *f2, *f3]),
            pages: u32::from_le_bytes([*p0, *p1, *p2, *p3]),
        };
        let (written, read) = runs.split_at(written);
        let set = Self {
            memory_pages,
            written: written.iter().map(run).collect(),
            read: read.iter().map(run).collect(),
        };
        let fits = set.pages() <= set.most_pages() && set.ascends(&set.written) && set.ascends(&set.read);
        if fits { Ok(set) } else { Err(WorkingSetError::Runs) }
    }

    /// The bytes of a file.
    pub fn encode(&self) -> Vec<u8> {
        let count = |runs: &[Run]| u32::try_from(runs.len()).unwrap_or(u32::MAX);
        let mut body = Vec::new();
        body.extend(self.memory_pages.to_le_bytes());
        body.extend(count(&self.written).to_le_bytes());
        body.extend(count(&self.read).to_le_bytes());
        for run in self.written.iter().chain(&self.read) {
            body.extend(run.first.to_le_bytes());
            body.extend(run.pages.to_le_bytes());
        }
        sealed(&body)
    }

    /// Writes an empty file.
    ///
    /// # Errors
    ///
    /// The file's.
    pub fn write(&self, file: &File) -> Result<(), WorkingSetError> {
        file.write_all_at(&self.encode(), 0)
            .map_err(|source| WorkingSetError::File { doing: "written", source })
    }

    fn ascends(&self, runs: &[Run]) -> bool {
        let mut end = 0;
        runs.iter().all(|run| {
            let first = u64::from(run.first);
            let fits = run.pages > 0 && (first > end || end == 0);
            end = first + u64::from(run.pages);
            fits && end <= self.memory_pages
        })
    }
}

/// A body behind its header.
pub fn sealed(body: &[u8]) -> Vec<u8> {
    KIND.seal(body)
}

#[cfg(test)]
mod tests;
