//! Ingest: the only way into the store.
//!
//! ```text
//!             ┌──────────── somebody else finished it meanwhile ───────────────▶ present
//!   Ingest::named ─▶ open ROOT/ingest/<name>, wait for its lock
//!                          └─▶ write… ─▶ commit: size, digest, fsync, rename into blobs/, 0400, fsync the folder ─▶ present
//!                                 └───▶ drop:   a copy is removed, a download stays, to be resumed
//! ```
//!
//! The file is named after what it will be, so that two processes that want the same blob meet at its lock: the second waits, and
//! then finds the blob. A lock dies with its process; what lies unlocked belonged to a dead one. Files are of three kinds:
//! `ALGORITHM-DIGITS.copy` and `new-*` are begun again from the start, so [`sweep`] removes them; `ALGORITHM-DIGITS.part` is a
//! download, and what is there of it is worth keeping for a week.

use std::fs::{self, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use crate::blobs::{BlobError, Blobs, remove_if_there, sync_folder};
use crate::digest::{Algorithm, Digest, Hasher};

/// How much is read and written at a time, in bytes.
pub(crate) const CHUNK: usize = 1 << 20;
/// How long what is there of a download stays.
const KEPT: Duration = Duration::from_secs(7 * 24 * 3600);

/// What an interrupted ingest leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Nothing: its source is on this machine.
    Copy,
    /// What came so far.
    Download,
}

/// A blob on its way into the store. This process alone writes it.
pub(crate) struct Ingest<'a> {
    blobs: &'a Blobs,
    path: PathBuf,
    file: File,
    hasher: Hasher,
    written: u64,
    /// What it has to become; `None` when only its bytes will tell.
    expected: Option<(Digest, u64)>,
    keep: bool,
}

impl<'a> Ingest<'a> {
    /// Begins a blob whose digest and size are known. `None` when it is there already, or has come while we waited.
    pub(crate) fn named(
        blobs: &'a Blobs,
        digest: &Digest,
        size: u64,
        kind: Kind,
    ) -> Result<Option<Self>, BlobError> {
        if blobs.has(digest, size)? {
            return Ok(None);
        }
        let ending = match kind {
            Kind::Copy => "copy",
            Kind::Download => "part",
        };
        let name = format!("{}-{}.{ending}", digest.algorithm().name(), digest.digits());
        let path = blobs.ingest().join(name);
        let file = lock(&path)?;
        if blobs.has(digest, size)? {
            remove_if_there(&path)?;
            return Ok(None);
        }
        let mut ingest = Self {
            blobs,
            path,
            file,
            hasher: Hasher::new(digest.algorithm()),
            written: 0,
            expected: Some((digest.clone(), size)),
            keep: kind == Kind::Download,
        };
        match kind {
            Kind::Copy => ingest.restart()?,
            Kind::Download => ingest.take_up()?,
        }
        Ok(Some(ingest))
    }

    /// Begins a blob that will be called what its SHA-256 is.
    pub(crate) fn unnamed(blobs: &'a Blobs) -> Result<Self, BlobError> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = blobs.ingest().join(format!("new-{}-{count}", std::process::id()));
        let file = lock(&path)?;
        let hasher = Hasher::new(Algorithm::Sha256);
        let mut ingest = Self { blobs, path, file, hasher, written: 0, expected: None, keep: false };
        // A dead process may have had our number.
        ingest.restart()?;
        Ok(ingest)
    }

    /// How much is there, in bytes.
    pub(crate) fn written(&self) -> u64 {
        self.written
    }

    /// Forgets what is there.
    pub(crate) fn restart(&mut self) -> Result<(), BlobError> {
        self.file
            .set_len(0)
            .and_then(|()| self.file.rewind())
            .map_err(BlobError::io("emptied", &self.path))?;
        self.written = 0;
        self.hasher = Hasher::new(self.algorithm());
        Ok(())
    }

    /// Hashes what an earlier download left, to go on from there.
    fn take_up(&mut self) -> Result<(), BlobError> {
        let there = self.file.metadata().map_err(BlobError::io("looked at", &self.path))?.len();
        if self.expected.as_ref().is_some_and(|(_, size)| there > *size) {
            return self.restart();
        }
        self.hash_content(u64::MAX)
    }

    /// Reads what the file holds, up to a limit, as if it had been written now.
    fn hash_content(&mut self, limit: u64) -> Result<(), BlobError> {
        let read = |error| BlobError::io("read", &self.path)(error);
        self.file.seek(SeekFrom::Start(self.written)).map_err(read)?;
        let mut buffer = vec![0; CHUNK];
        let mut content = Read::take(&self.file, limit);
        loop {
            match content.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => {
                    self.hasher.update(&buffer[..count]);
                    self.written += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(read(error)),
            }
        }
    }

    /// Appends. More than was announced is an error before it is written.
    pub(crate) fn write(&mut self, piece: &[u8]) -> Result<(), BlobError> {
        let after = self.written + piece.len() as u64;
        if let Some((digest, size)) = &self.expected
            && after > *size
        {
            self.keep = false;
            return Err(BlobError::TooLong { digest: digest.clone(), expected: *size });
        }
        if let Err(error) = self.file.write_all(piece) {
            // Whoever has no space left wants that of the half file back.
            self.keep &= error.kind() != io::ErrorKind::StorageFull;
            return Err(self.failed(error));
        }
        self.hasher.update(piece);
        self.written = after;
        Ok(())
    }

    /// Takes all of a file's blocks, where the file system can share them (reflinks); `false` where it can't. What was cloned is
    /// ours: later changes of the original don't reach it, which is why hard links are not used.
    pub(crate) fn clone_of(&mut self, original: &File) -> Result<bool, BlobError> {
        if rustix::fs::ioctl_ficlone(&self.file, original).is_err() {
            return Ok(false);
        }
        let limit = self.expected.as_ref().map_or(u64::MAX, |(_, size)| size.saturating_add(1));
        self.hash_content(limit)?;
        Ok(true)
    }

    /// Verifies what was written and puts it among the blobs. Returns its digest and its size in bytes.
    pub(crate) fn commit(mut self) -> Result<(Digest, u64), BlobError> {
        let actual = self.hasher.clone().finish();
        if let Some((digest, size)) = &self.expected {
            if self.written != *size {
                let (digest, expected) = (digest.clone(), *size);
                return Err(BlobError::WrongSize { digest, expected, actual: self.written });
            }
            if actual != *digest {
                self.keep = false;
                return Err(BlobError::WrongDigest { expected: digest.clone(), actual });
            }
        }
        self.file.sync_all().map_err(|error| self.failed(error))?;
        let to = self.blobs.path(&actual);
        fs::rename(&self.path, &to).map_err(|error| self.failed(error))?;
        // Renamed: nothing is left for `drop` to remove.
        self.keep = true;
        // Not before: what a crash leaves in the way must stay writable for the next who tries.
        self.file.set_permissions(Permissions::from_mode(0o400)).map_err(BlobError::io("protected", &to))?;
        if let Some(folder) = to.parent() {
            sync_folder(folder)?;
        }
        Ok((actual, self.written))
    }

    fn algorithm(&self) -> Algorithm {
        self.expected.as_ref().map_or(Algorithm::Sha256, |(digest, _)| digest.algorithm())
    }

    fn failed(&self, error: io::Error) -> BlobError {
        if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            let needed = self.expected.as_ref().map_or(self.written, |(_, size)| *size);
            return BlobError::NoSpace { root: self.blobs.root().to_owned(), needed };
        }
        BlobError::io("written", &self.path)(error)
    }
}

impl Drop for Ingest<'_> {
    fn drop(&mut self) {
        if !self.keep || self.written == 0 {
            // Still under our lock. What can't be removed now is swept later.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Opens a file, created if need be, and waits until it is ours alone.
fn lock(path: &Path) -> Result<File, BlobError> {
    loop {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc_nofollow())
            .open(path)
            .map_err(|error| full_or(path, "created", error))?;
        file.lock().map_err(BlobError::io("locked", path))?;
        if is_at(&file, path)? {
            return Ok(file);
        }
        // Its former owner moved it into place or removed it while we waited.
    }
}

/// `O_NOFOLLOW`, from rustix, since std takes a number.
fn libc_nofollow() -> i32 {
    rustix::fs::OFlags::NOFOLLOW.bits().try_into().unwrap_or_default()
}

fn full_or(path: &Path, doing: &'static str, error: io::Error) -> BlobError {
    if error.kind() == io::ErrorKind::StorageFull {
        let root = path.parent().unwrap_or(path).to_owned();
        return BlobError::NoSpace { root, needed: 4096 };
    }
    BlobError::io(doing, path)(error)
}

/// Whether this path still names this file.
fn is_at(file: &File, path: &Path) -> Result<bool, BlobError> {
    let ours = file.metadata().map_err(BlobError::io("looked at", path))?;
    match fs::symlink_metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (ours.dev(), ours.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(BlobError::io("looked at", path)(error)),
    }
}

/// Removes what dead processes left. Downloads stay for a week, unless `downloads` says that they go too.
///
/// Returns how many bytes that frees. With `dry_run` nothing is removed.
pub(crate) fn sweep(
    blobs: &Blobs,
    now: SystemTime,
    downloads: bool,
    dry_run: bool,
) -> Result<u64, BlobError> {
    let folder = blobs.ingest();
    let mut freed = 0;
    for entry in fs::read_dir(&folder).map_err(BlobError::io("read", &folder))? {
        let path = entry.map_err(BlobError::io("read", &folder))?.path();
        // Gone meanwhile, or not a file: neither is ours to sweep.
        let Ok(file) = OpenOptions::new().read(true).custom_flags(libc_nofollow()).open(&path) else {
            continue;
        };
        let Ok(metadata) = file.metadata() else { continue };
        let young = metadata
            .modified()
            .is_ok_and(|modified| now.duration_since(modified).is_ok_and(|age| age < KEPT) || modified > now);
        let download = path.extension().is_some_and(|ending| ending == "part");
        if !metadata.is_file() || (download && young && !downloads) {
            continue;
        }
        match file.try_lock() {
            Ok(()) if is_at(&file, &path)? => {
                freed += metadata.len();
                if !dry_run {
                    remove_if_there(&path)?;
                }
            }
            Ok(()) | Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(BlobError::io("locked", &path)(error)),
        }
    }
    Ok(freed)
}

#[cfg(test)]
mod tests;
