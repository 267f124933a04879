//! Made: layers that were made of this machine's own files, found again by what they were made of.
//!
//! ```text
//!   fingerprint (of names, sizes, times) ─▶ obtain ─┬─ ROOT/made/<digits> says which blob, and the blob is there ─▶ Made
//!                                                   └─ else: the lock, look again, write, commit, say so ─────────▶ Made
//! ```
//!
//! To hash what has not changed would take longer than to run what it is for. A record is only a shortcut: where it is missing, damaged, or its
//! blob was pruned, the layer is made again. Its mtime is its last use; [`Store::retire_made`] takes what was not used for long, so that the builds of
//! last month don't fill the disk.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::blobs::{BlobError, create_private, remove_if_there};
use crate::digest::Digest;
use crate::images::Record as ImageRecord;
use crate::ingest::Ingest;
use crate::lease::{Lease, LeaseError};
use crate::store::{Store, StoreError};

/// Of a record's form. A record of another one is made again.
const VERSION: u32 = 1;
/// More than this no record has.
const LARGEST_RECORD: u64 = 16 << 20;

/// Beside the records: held while a layer is made, and touched when old ones were taken out.
const LOCK: &str = "lock";
const STAMP: &str = "retired";

/// A layer that is in the store.
#[derive(Clone, Debug, PartialEq)]
pub struct Made {
    /// Of the blob, and of the tar that it is.
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
    /// What its maker wants to know again without reading it.
    pub notes: Value,
}

/// What a maker says of what it wrote.
#[derive(Clone, Debug)]
pub struct Written {
    /// Kept beside the digest.
    pub notes: Value,
    /// The fingerprint is sure to change when the content does. Where a file was written to a moment ago, it is not.
    pub lasting: bool,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    version: u32,
    digest: Digest,
    size: u64,
    notes: Value,
}

impl Store {
    fn made_folder(&self) -> PathBuf {
        self.root().join("made")
    }

    /// The layer with this fingerprint: the one that is there, or else what `make` writes. Of many who ask at once, in any process, one makes it. Hold
    /// a lease from before this until the blob is open.
    ///
    /// # Errors
    ///
    /// If `make` fails, or the store can't be written.
    pub fn obtain(
        &self,
        of: &Digest,
        make: impl FnOnce(&mut dyn Write) -> io::Result<Written>,
    ) -> Result<Made, StoreError> {
        if let Some(made) = self.made(of) {
            return Ok(made);
        }
        let folder = self.made_folder();
        create_private(&folder)?;
        let path = folder.join(LOCK);
        let lock = open_lock(&path).map_err(BlobError::io("opened", &path))?;
        lock.lock().map_err(BlobError::io("locked", &path))?;
        if let Some(made) = self.made(of) {
            return Ok(made);
        }
        let mut writer = Writer { ingest: Ingest::unnamed(&self.blobs)?, failed: None };
        let written = make(&mut writer);
        if let Some(failed) = writer.failed {
            return Err(failed.into());
        }
        let Written { notes, lasting } = written.map_err(StoreError::Unreadable)?;
        let (digest, size) = writer.ingest.commit()?;
        let record = Record { version: VERSION, digest, size, notes };
        if lasting && let Err(error) = self.write_made(of, &record) {
            // It is made again the next time.
            tracing::warn!(%error, "a layer can't be remembered");
        }
        Ok(Made { digest: record.digest, size: record.size, notes: record.notes })
    }

    fn made(&self, of: &Digest) -> Option<Made> {
        let mut file = File::open(self.made_folder().join(of.digits())).ok()?;
        if file.metadata().ok()?.len() > LARGEST_RECORD {
            return None;
        }
        let mut text = Vec::new();
        io::Read::read_to_end(&mut file, &mut text).ok()?;
        let record: Record = serde_json::from_slice(&text).ok().filter(|r: &Record| r.version == VERSION)?;
        if !matches!(self.blobs.has(&record.digest, record.size), Ok(true)) {
            return None;
        }
        // For its age alone.
        let _ = file.set_modified(SystemTime::now());
        Some(Made { digest: record.digest, size: record.size, notes: record.notes })
    }

    /// Not synchronised: half a record after a power cut is no record.
    fn write_made(&self, of: &Digest, record: &Record) -> io::Result<()> {
        let path = self.made_folder().join(of.digits());
        let new = path.with_extension(format!("new-{}", std::process::id()));
        let written = fs::write(&new, serde_json::to_vec(record)?).and_then(|()| fs::rename(&new, &path));
        written.inspect_err(|_| {
            let _ = fs::remove_file(&new);
        })
    }

    /// Takes out what was not asked for in this time, with its blobs, unless an image has them too. Returns the blobs that went; none while anybody
    /// holds a lease, since this can wait for another day.
    ///
    /// # Errors
    ///
    /// If the store can't be read.
    pub fn retire_made(&self, unused: Duration) -> Result<Vec<Digest>, StoreError> {
        let _lease = match Lease::exclusive(self.root(), Duration::ZERO) {
            Err(LeaseError::Busy(_)) => return Ok(Vec::new()),
            other => other?,
        };
        let now = SystemTime::now();
        let old = |path: &PathBuf| {
            let used = fs::metadata(path).and_then(|metadata| metadata.modified());
            used.is_ok_and(|used| now.duration_since(used).is_ok_and(|age| age >= unused))
        };
        let (mut go, mut stay) = (BTreeSet::new(), BTreeSet::new());
        for path in self.made_records()? {
            let text = fs::read(&path).unwrap_or_default();
            let digest = serde_json::from_slice(&text).ok().map(|record: Record| record.digest);
            if old(&path) {
                remove_if_there(&path)?;
                go.extend(digest);
            } else {
                stay.extend(digest);
            }
        }
        let images: Vec<ImageRecord> = self.records.all()?.into_iter().collect::<Result<_, _>>()?;
        stay.extend(self.needed(&images, &BTreeSet::new())?);
        let gone: Vec<Digest> = go.difference(&stay).cloned().collect();
        for digest in &gone {
            self.blobs.remove(digest)?;
        }
        Ok(gone)
    }

    /// [`Store::retire_made`], once a day.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn tend_made(&self, unused: Duration) -> Result<Vec<Digest>, StoreError> {
        const DAY: Duration = Duration::from_secs(24 * 3600);
        let stamp = self.made_folder().join(STAMP);
        let done = fs::metadata(&stamp).and_then(|metadata| metadata.modified());
        if done.is_ok_and(|done| done.elapsed().is_ok_and(|age| age < DAY)) {
            return Ok(Vec::new());
        }
        create_private(&self.made_folder())?;
        fs::write(&stamp, "").map_err(BlobError::io("written", &stamp))?;
        self.retire_made(unused)
    }

    /// Removes records whose blobs are gone.
    pub(crate) fn sweep_made(&self) -> Result<(), StoreError> {
        for path in self.made_records()? {
            let text = fs::read(&path).unwrap_or_default();
            let there = serde_json::from_slice(&text)
                .is_ok_and(|record: Record| matches!(self.blobs.has(&record.digest, record.size), Ok(true)));
            if !there {
                remove_if_there(&path)?;
            }
        }
        Ok(())
    }

    fn made_records(&self) -> Result<Vec<PathBuf>, StoreError> {
        let folder = self.made_folder();
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(BlobError::io("read", &folder))?,
        };
        let record = |entry: &fs::DirEntry| entry.file_name() != LOCK && entry.file_name() != STAMP;
        Ok(entries.flatten().filter(record).map(|entry| entry.path()).collect())
    }
}

fn open_lock(path: &std::path::Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// An ingest as its maker sees it. What the store's side has to say is kept, since an [`io::Error`] would lose it.
struct Writer<'a> {
    ingest: Ingest<'a>,
    failed: Option<BlobError>,
}

impl Write for Writer<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.ingest.write(bytes) {
            Ok(()) => Ok(bytes.len()),
            Err(error) => {
                let said = io::Error::other(error.to_string());
                self.failed = Some(error);
                Err(said)
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::prune::PruneOptions;
    use crate::testing::{Sample, acquire, store};

    fn written(lasting: bool) -> Written {
        Written { notes: serde_json::json!(["libc.so.6"]), lasting }
    }

    #[test]
    fn what_was_made_once_is_found_again() {
        let (_folder, store) = store();
        let times = Cell::new(0);
        let obtain = || {
            let make = |to: &mut dyn Write| {
                times.set(times.get() + 1);
                to.write_all(b"tar").map(|()| written(true))
            };
            store.obtain(&Digest::of(b"print"), make).unwrap()
        };
        let made = obtain();
        assert_eq!((&made.digest, made.size), (&Digest::of(b"tar"), 3));
        assert_eq!(obtain(), made);
        assert_eq!(times.get(), 1);
        // Its blob pruned, or its record damaged: made again.
        store.prune(&PruneOptions::default()).unwrap();
        assert_eq!(store.made_records().unwrap(), [] as [PathBuf; 0], "a record without a blob goes too");
        assert_eq!(obtain(), made);
        fs::write(&store.made_records().unwrap()[0], b"{").unwrap();
        assert_eq!(obtain(), made);
        assert_eq!(times.get(), 3);
    }

    #[test]
    fn what_may_have_changed_unseen_is_not_remembered() {
        let (_folder, store) = store();
        for times in 1..3 {
            let made = store.obtain(&Digest::of(b"print"), |to| {
                to.write_all(&vec![b'x'; times]).map(|()| written(false))
            });
            assert_eq!(made.unwrap().size, u64::try_from(times).unwrap());
        }
    }

    #[test]
    fn a_maker_that_fails_leaves_nothing() {
        let (_folder, store) = store();
        let make = |to: &mut dyn Write| {
            to.write_all(b"half")?;
            Err(io::ErrorKind::PermissionDenied.into())
        };
        assert!(matches!(store.obtain(&Digest::of(b"print"), make), Err(StoreError::Unreadable(_))));
        assert!(store.blobs.all().unwrap().is_empty());
        assert_eq!(fs::read_dir(store.root().join("ingest")).unwrap().count(), 0);
    }

    #[test]
    fn of_many_who_ask_at_once_one_makes() {
        let (_folder, store) = store();
        let times = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let make = |to: &mut dyn Write| {
                        times.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        std::thread::sleep(Duration::from_millis(20));
                        to.write_all(b"tar").map(|()| written(true))
                    };
                    store.obtain(&Digest::of(b"print"), make).unwrap();
                });
            }
        });
        assert_eq!(times.into_inner(), 1);
    }

    #[test]
    fn what_nobody_used_for_long_is_retired_and_an_images_layer_stays() {
        let (folder, store) = store();
        let image =
            acquire(&store, &Sample::new("amd64", &[b"shared"]).write(&folder.path().join("i"))).unwrap();
        let make = |print: &[u8], bytes: &'static [u8]| {
            store.obtain(&Digest::of(print), |to| to.write_all(bytes).map(|()| written(true))).unwrap()
        };
        let (old, shared, young) = (make(b"1", b"old"), make(b"2", b"shared"), make(b"3", b"young"));
        let hour = Duration::from_secs(3600);
        for print in [b"1", b"2"] {
            let record = File::open(store.made_folder().join(Digest::of(print).digits())).unwrap();
            record.set_modified(SystemTime::now() - 2 * hour).unwrap();
        }
        let lease = store.lease().unwrap();
        assert_eq!(store.retire_made(hour).unwrap(), []);
        drop(lease);
        assert_eq!(store.retire_made(hour).unwrap(), [old.digest]);
        assert_eq!(shared.digest, image.layers[0].digest);
        store.blob(&shared.digest).unwrap();
        store.blob(&young.digest).unwrap();
        assert_eq!(store.made_records().unwrap().len(), 1);
    }
}
