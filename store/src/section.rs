//! Sections: a run of bytes in a file of the user's, read in place. A blob of a layout is all of a file, one of an archive a part.
//!
//! In: a path, or a file with offset and length that were checked against its size. Out: documents and ingested blobs, verified.
//! The file may change under us at any time; what is verified is therefore what was read, never what lies there.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::blobs::{BlobError, Blobs};
use crate::digest::{Algorithm, Digest, Hasher};
use crate::document::{Descriptor, LARGEST_DOCUMENT};
use crate::ingest::{CHUNK, Ingest, Kind};
use crate::progress::Transfer;

/// Why a part of a file can't be read.
#[derive(Debug, thiserror::Error)]
pub enum SectionError {
    /// The operating system refused.
    #[error("{path} can't be read.")]
    Read {
        /// Which file.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A folder, a pipe, a device.
    #[error("{0} is not a regular file: images are read from files that can be read in any order.")]
    NotAFile(String),
    /// It was shortened while we read.
    #[error("{0} became shorter while it was read.")]
    Shortened(String),
    /// Over 4 MiB where a document should be.
    #[error("{0} is too large: 4 MiB is the most that is read of a document.")]
    TooLarge(String),
    /// Nobody wants it any more: another part of the same image failed.
    #[error("{0} was not read to its end, because another part of the image failed.")]
    Cancelled(String),
    /// The store's side.
    #[error(transparent)]
    Blob(#[from] BlobError),
}

/// Some bytes of a file.
#[derive(Clone, Debug)]
pub(crate) struct Section {
    file: Arc<File>,
    /// For messages.
    path: String,
    offset: u64,
    length: u64,
    /// The section is the file.
    whole: bool,
}

impl Section {
    /// All of a regular file. Never blocks on a pipe or a device that lies where a file should.
    pub(crate) fn open(path: &Path) -> Result<Self, SectionError> {
        let shown = path.display().to_string();
        let failed = |source| SectionError::Read { path: shown.clone(), source };
        let nonblocking = rustix::fs::OFlags::NONBLOCK.bits().try_into().unwrap_or_default();
        let file = OpenOptions::new().read(true).custom_flags(nonblocking).open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(SectionError::NotAFile(shown));
        }
        Ok(Self { file: Arc::new(file), path: shown, offset: 0, length: metadata.len(), whole: true })
    }

    /// Bytes of this section; `None` if it hasn't so many.
    pub(crate) fn part(&self, offset: u64, length: u64) -> Option<Self> {
        (offset.checked_add(length)? <= self.length).then(|| Self {
            file: Arc::clone(&self.file),
            path: self.path.clone(),
            offset: self.offset + offset,
            length,
            whole: false,
        })
    }

    /// The file that it is of, whose every byte can be read.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Fills the buffer from this place in the section, or as much of it as there is; returns how much.
    pub(crate) fn read_at(&self, buffer: &mut [u8], at: u64) -> Result<usize, SectionError> {
        let left = usize::try_from(self.length.saturating_sub(at)).unwrap_or(usize::MAX).min(buffer.len());
        let mut filled = 0;
        while filled < left {
            match self.file.read_at(&mut buffer[filled..left], self.offset + at + filled as u64) {
                Ok(0) => return Err(SectionError::Shortened(self.path.clone())),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(SectionError::Read { path: self.path.clone(), source }),
            }
        }
        Ok(filled)
    }

    /// The whole of a small document without a digest.
    pub(crate) fn document(&self) -> Result<Vec<u8>, SectionError> {
        if self.length > LARGEST_DOCUMENT {
            return Err(SectionError::TooLarge(self.path.clone()));
        }
        let mut bytes = vec![0; usize::try_from(self.length).unwrap_or_default()];
        self.read_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    /// The document that a descriptor names, verified.
    pub(crate) fn verified_document(&self, descriptor: &Descriptor) -> Result<Vec<u8>, SectionError> {
        self.check_size(descriptor)?;
        let bytes = self.document()?;
        verify(&bytes, &descriptor.digest)?;
        Ok(bytes)
    }

    /// The SHA-256 of all of it.
    pub(crate) fn digest(&self) -> Result<Digest, SectionError> {
        let mut hasher = Hasher::new(Algorithm::Sha256);
        self.each_chunk(|chunk| {
            hasher.update(chunk);
            Ok(())
        })?;
        Ok(hasher.finish())
    }

    /// Brings the blob that a descriptor names into the store, unless it is there.
    pub(crate) fn ingest(
        &self,
        blobs: &Blobs,
        descriptor: &Descriptor,
        transfer: &dyn Transfer,
        cancelled: &AtomicBool,
    ) -> Result<(), SectionError> {
        self.check_size(descriptor)?;
        let Some(mut ingest) = Ingest::named(blobs, &descriptor.digest, descriptor.size, Kind::Copy)? else {
            return Ok(());
        };
        if !(self.whole && ingest.clone_of(&self.file)?) {
            self.each_chunk(|chunk| {
                if cancelled.load(Ordering::Relaxed) {
                    return Err(SectionError::Cancelled(self.path.clone()));
                }
                ingest.write(chunk)?;
                transfer.advanced(chunk.len() as u64);
                Ok(())
            })?;
        }
        ingest.commit()?;
        Ok(())
    }

    fn check_size(&self, descriptor: &Descriptor) -> Result<(), BlobError> {
        if self.length == descriptor.size {
            return Ok(());
        }
        let (digest, expected) = (descriptor.digest.clone(), descriptor.size);
        Err(BlobError::WrongSize { digest, expected, actual: self.length })
    }

    pub(crate) fn each_chunk(
        &self,
        mut each: impl FnMut(&[u8]) -> Result<(), SectionError>,
    ) -> Result<(), SectionError> {
        let mut buffer = vec![0; CHUNK];
        let mut at = 0;
        while at < self.length {
            let count = self.read_at(&mut buffer, at)?;
            each(&buffer[..count])?;
            at += count as u64;
        }
        Ok(())
    }
}

/// Checks bytes against the digest that they were promised to have.
pub(crate) fn verify(bytes: &[u8], expected: &Digest) -> Result<(), BlobError> {
    let mut hasher = Hasher::new(expected.algorithm());
    hasher.update(bytes);
    let actual = hasher.finish();
    if actual == *expected {
        return Ok(());
    }
    Err(BlobError::WrongDigest { expected: expected.clone(), actual })
}
