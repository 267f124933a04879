//! Leases: who uses the store's content holds a shared lock, and the collector takes the same lock for itself alone.
//!
//! ```text
//!   free ── lease ──▶ leased (1..n, any process) ── the last is dropped ──▶ free ── exclusive ──▶ collected ──▶ free
//! ```
//!
//! The kernel drops the lock of a process that dies, so nothing has to be swept.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// How often the collector looks whether the store is free. flock(2) has no waiting with an end.
const POLL: Duration = Duration::from_millis(20);

/// Why there is no lease.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// The lock file can't be had.
    #[error("The store's lock {} can't be taken.", .path.display())]
    Io {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others kept it for longer than we waited.
    #[error(
        "The store is in use: another command pulls an image or starts a room, and has done so for {} s. Try again when it is done.",
        .0.as_secs()
    )]
    Busy(Duration),
}

/// While this lives, nothing is collected from the store.
#[derive(Debug)]
pub struct Lease {
    _file: File,
}

impl Lease {
    /// Shares the store with others. Waits for a collection to end, which removes files and is short.
    pub(crate) fn shared(root: &Path) -> Result<Self, LeaseError> {
        let (file, path) = open(root)?;
        file.lock_shared().map_err(|source| LeaseError::Io { path, source })?;
        Ok(Self { _file: file })
    }

    /// Has the store for itself, if it comes free within `patience`.
    pub(crate) fn exclusive(root: &Path, patience: Duration) -> Result<Self, LeaseError> {
        let (file, path) = open(root)?;
        let begun = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Self { _file: file }),
                Err(TryLockError::WouldBlock) if begun.elapsed() >= patience => {
                    return Err(LeaseError::Busy(patience));
                }
                Err(TryLockError::WouldBlock) => thread::sleep(POLL),
                Err(TryLockError::Error(source)) => return Err(LeaseError::Io { path, source }),
            }
        }
    }
}

fn open(root: &Path) -> Result<(File, PathBuf), LeaseError> {
    let path = root.join("lock");
    match OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path) {
        Ok(file) => Ok((file, path)),
        Err(source) => Err(LeaseError::Io { path, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_share_a_store_and_the_collector_has_it_alone() {
        let root = tempfile::tempdir().unwrap();
        let one = Lease::shared(root.path()).unwrap();
        let two = Lease::shared(root.path()).unwrap();
        let patience = Duration::from_millis(60);
        assert!(matches!(Lease::exclusive(root.path(), patience), Err(LeaseError::Busy(_))));
        drop((one, two));
        let alone = Lease::exclusive(root.path(), patience).unwrap();
        assert!(matches!(Lease::exclusive(root.path(), patience), Err(LeaseError::Busy(_))));
        drop(alone);
        Lease::shared(root.path()).unwrap();
    }

    #[test]
    fn the_collector_waits_for_a_lease_that_ends_in_time() {
        let root = tempfile::tempdir().unwrap();
        let lease = Lease::shared(root.path()).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| Lease::exclusive(root.path(), Duration::from_secs(20)).unwrap());
            thread::sleep(Duration::from_millis(50));
            drop(lease);
        });
    }
}
