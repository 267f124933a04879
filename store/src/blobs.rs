//! Blobs on disk: content under its own digest, whole or not there at all.
//!
//! ```text
//!   ROOT/blobs/sha256/<64 digits>    0400, never written to again; put there by a rename of what was verified
//!   ROOT/ingest/                     what is on its way: see ingest.rs
//! ```
//!
//! In: digests. Out: read-only handles and sizes. Nothing here takes the lease that keeps the collector away: callers do.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::digest::{Algorithm, Digest};

/// What goes wrong with a blob.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// Not in the store.
    #[error("The store has no blob {0}: pull the image again.")]
    Missing(Digest),
    /// Other bytes than were promised.
    #[error(
        "{expected} has the wrong digest: what came is {actual}. It was changed or damaged: build or push the image again."
    )]
    WrongDigest {
        /// Its name.
        expected: Digest,
        /// Of the bytes that came.
        actual: Digest,
    },
    /// Shorter or longer than was promised.
    #[error(
        "{digest} has the wrong size: {actual} bytes, and its manifest says {expected}. It is truncated, or the manifest lies."
    )]
    WrongSize {
        /// Its name.
        digest: Digest,
        /// By its descriptor, in bytes.
        expected: u64,
        /// What is there, in bytes.
        actual: u64,
    },
    /// More bytes come than were promised.
    #[error("{digest} has the wrong size: it goes on after the {expected} bytes that its manifest says.")]
    TooLong {
        /// Its name.
        digest: Digest,
        /// By its descriptor, in bytes.
        expected: u64,
    },
    /// The store's file system is full, or would be.
    #[error("There is no space left in {}: {} MiB are needed. Free some, with `carrel prune` too.", .root.display(), .needed.div_ceil(1 << 20))]
    NoSpace {
        /// The store.
        root: PathBuf,
        /// For what is to be written, in bytes.
        needed: u64,
    },
    /// The operating system refused.
    #[error("{} can't be {doing}.", .path.display())]
    Io {
        /// `opened`, `written`…
        doing: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl BlobError {
    /// Completes an error of the operating system by what was done to which file.
    pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { doing, path: path.to_owned(), source }
    }
}

/// A stored blob, as the collector sees it.
#[derive(Debug)]
pub(crate) struct Stored {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    pub(crate) since: SystemTime,
}

/// The folder of blobs and that of what is on its way into it.
#[derive(Clone, Debug)]
pub(crate) struct Blobs {
    root: PathBuf,
}

impl Blobs {
    /// Creates the folders that are missing.
    pub(crate) fn open(root: &Path) -> Result<Self, BlobError> {
        let blobs = Self { root: root.to_owned() };
        for algorithm in Algorithm::ALL {
            create_private(&blobs.folder(algorithm))?;
        }
        create_private(&blobs.ingest())?;
        Ok(blobs)
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Where what is on its way lies.
    pub(crate) fn ingest(&self) -> PathBuf {
        self.root.join("ingest")
    }

    fn folder(&self, algorithm: Algorithm) -> PathBuf {
        self.root.join("blobs").join(algorithm.name())
    }

    pub(crate) fn path(&self, digest: &Digest) -> PathBuf {
        self.folder(digest.algorithm()).join(digest.digits())
    }

    /// The size of a blob that is there, in bytes.
    pub(crate) fn size(&self, digest: &Digest) -> Result<Option<u64>, BlobError> {
        let path = self.path(digest);
        match fs::symlink_metadata(&path) {
            Ok(metadata) => Ok(Some(metadata.size())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(BlobError::io("looked at", &path)(error)),
        }
    }

    /// Whether a blob of this size is there; an error if it is there with another, because then the size is a lie.
    pub(crate) fn has(&self, digest: &Digest, expected: u64) -> Result<bool, BlobError> {
        match self.size(digest)? {
            Some(actual) if actual != expected => {
                Err(BlobError::WrongSize { digest: digest.clone(), expected, actual })
            }
            found => Ok(found.is_some()),
        }
    }

    /// A read-only handle.
    pub(crate) fn handle(&self, digest: &Digest) -> Result<File, BlobError> {
        let path = self.path(digest);
        File::open(&path).map_err(|error| {
            if error.kind() == io::ErrorKind::NotFound {
                BlobError::Missing(digest.clone())
            } else {
                BlobError::io("opened", &path)(error)
            }
        })
    }

    /// All that are there. Foreign files are passed over.
    pub(crate) fn all(&self) -> Result<Vec<Stored>, BlobError> {
        let mut all = Vec::new();
        for algorithm in Algorithm::ALL {
            let folder = self.folder(algorithm);
            let read = BlobError::io("read", &folder);
            for entry in fs::read_dir(&folder).map_err(read)? {
                let entry = entry.map_err(BlobError::io("read", &folder))?;
                let name = format!("{}:{}", algorithm.name(), entry.file_name().display());
                let Ok(digest) = name.parse() else { continue };
                let metadata = match entry.metadata() {
                    Ok(metadata) => metadata,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    Err(error) => return Err(BlobError::io("looked at", &entry.path())(error)),
                };
                let since = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                all.push(Stored { digest, size: metadata.len(), since });
            }
        }
        Ok(all)
    }

    /// Removes a blob; one that is gone already is fine.
    pub(crate) fn remove(&self, digest: &Digest) -> Result<(), BlobError> {
        remove_if_there(&self.path(digest))
    }

    /// Refuses what can't fit before the first byte is written, so that a full disk leaves nothing half done.
    pub(crate) fn reserve(&self, needed: u64) -> Result<(), BlobError> {
        let free = rustix::fs::statvfs(&self.root)
            .map_err(|error| BlobError::io("looked at", &self.root)(error.into()))?;
        if free.f_bavail.saturating_mul(free.f_frsize) < needed {
            return Err(BlobError::NoSpace { root: self.root.clone(), needed });
        }
        Ok(())
    }
}

/// Creates a folder for its owner alone, and those above it.
pub(crate) fn create_private(folder: &Path) -> Result<(), BlobError> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(BlobError::io("created", folder))
}

pub(crate) fn remove_if_there(path: &Path) -> Result<(), BlobError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(BlobError::io("removed", path)(error)),
        _ => Ok(()),
    }
}

/// Makes a rename in this folder survive a power cut.
pub(crate) fn sync_folder(folder: &Path) -> Result<(), BlobError> {
    File::open(folder).and_then(|file| file.sync_all()).map_err(BlobError::io("synchronised", folder))
}
