//! A template in use: its files, open.
//!
//! In: a key. Out: three read-only descriptors and the record, all of one and the same making, or nothing. What was opened stays
//! readable whatever becomes of the name.
//!
//! The state, a few KiB, is compared with the record's digest each time; the memory and the disk by their lengths, and whole by [`Template::verify`].

use std::fs::{File, TryLockError};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::time::SystemTime;

use rustix::io::Errno;

use super::folder::Folder;
use super::key::TemplateKey;
use super::record::{LARGEST, Part, RecordError, TemplateRecord};
use super::refusal::{Damage, TemplateError};
use super::sparse::SparseDigest;
use super::{PINNED, RECORD, Templates};

/// A whole template. While it lives, its files can be read, removed or not.
#[derive(Debug)]
pub struct Template {
    templates: Templates,
    folder: Folder,
    record: TemplateRecord,
    /// The record's file, whose mtime is the last use.
    touched: File,
    state: File,
    memory: File,
    disk: File,
}

/// What is at a key.
pub(super) enum Look {
    /// Nothing, or nothing any more.
    Absent,
    /// A template.
    Whole(Box<Template>),
    /// What was one.
    Damaged(Folder, Damage),
}

/// Why a file of a folder was not opened.
enum Failed {
    /// The fault is the file's.
    Damage(Damage),
    /// Ours, or the machine's: too many open files, say.
    Io(io::Error),
}

impl Template {
    /// Its key.
    #[must_use]
    pub fn key(&self) -> &TemplateKey {
        &self.record.key
    }

    /// What it says about itself.
    #[must_use]
    pub fn record(&self) -> &TemplateRecord {
        &self.record
    }

    /// One of its files, read-only. Its offset is shared by all who have this template: read by offset, or map it.
    #[must_use]
    pub fn file(&self, part: Part) -> &File {
        match part {
            Part::State => &self.state,
            Part::Memory => &self.memory,
            Part::Disk => &self.disk,
        }
    }

    /// Reads all of it and compares it with what was published: the damage, or `None`. What the kernel has cached is read from there, so a
    /// disk that forgets is noticed when it is really read.
    #[must_use]
    pub fn verify(&self) -> Option<Damage> {
        Part::ALL.into_iter().find_map(|part| damage(&self.record, part, self.file(part)))
    }

    /// Throws this template away because it turned out to be damaged, pinned or not, so that nobody finds it again and the next who wants it
    /// makes it anew. One that was made anew meanwhile stays. Says whether it was this call that did it.
    ///
    /// # Errors
    ///
    /// If it can't be removed.
    pub fn discard(&self, reason: &Damage) -> Result<bool, TemplateError> {
        self.templates.discard(&self.folder, reason)
    }

    /// Where its files are.
    pub(super) fn folder(&self) -> &Folder {
        &self.folder
    }

    /// Notes that it is used now. Only `prune` reads it, so it is not worth a failure.
    pub(super) fn touch(&self) {
        if let Err(error) = self.touched.set_modified(SystemTime::now()) {
            tracing::debug!(key = %self.key(), %error, "the time of use was not noted");
        }
    }

    /// Notes that it is in use until the last copy of its disk's descriptor is closed, by whatever process: a clone's VMM reads from it to its end, and the lock is the
    /// opening's, not a process's (flock(2)). Waits for whoever looks just now whether it is in use ([`is_used`]), which takes a moment.
    pub(super) fn hold(&self) {
        if let Err(error) = self.disk.lock_shared() {
            tracing::debug!(key = %self.key(), %error, "the use was not noted");
        }
    }

    /// What is left of it for those who only look.
    pub(super) fn close(self) -> (Folder, Result<TemplateRecord, Damage>) {
        (self.folder, Ok(self.record))
    }
}

impl Templates {
    /// Opens what is at a key, and checks what can be checked without reading what is large.
    pub(super) fn look(&self, key: &TemplateKey) -> Result<Look, TemplateError> {
        let path = self.path(key);
        let Some(folder) = Folder::open(&path).map_err(TemplateError::io("opened", &path))? else {
            return Ok(Look::Absent);
        };
        match open(&folder, key) {
            Ok((record, touched, [state, memory, disk])) => {
                let templates = self.clone();
                let template = Template { templates, folder, record, touched, state, memory, disk };
                Ok(Look::Whole(Box::new(template)))
            }
            Err(Failed::Io(error)) => Err(TemplateError::io("opened", &path)(error)),
            // Files that go one by one, because it is being removed, are no damage.
            Err(Failed::Damage(damage)) => {
                Ok(match folder.still_named().map_err(TemplateError::io("looked at", &path))? {
                    true => Look::Damaged(folder, damage),
                    false => Look::Absent,
                })
            }
        }
    }
}

fn open(folder: &Folder, key: &TemplateKey) -> Result<(TemplateRecord, File, [File; 3]), Failed> {
    let file = open_file(folder, RECORD)?;
    let mut bytes = Vec::new();
    (&file)
        .take(LARGEST + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| Failed::Damage(Damage::Unreadable(RECORD, error)))?;
    if bytes.len() as u64 > LARGEST {
        return Err(Failed::Damage(RecordError::TooLarge.into()));
    }
    let record = TemplateRecord::parse(&bytes, key).map_err(|error| Failed::Damage(error.into()))?;
    let [state, memory, disk] = Part::ALL.map(|part| {
        let file = open_file(folder, part.name())?;
        let (expected, actual) = (record.part(part).bytes, file.metadata().map_err(Failed::Io)?.size());
        match expected == actual {
            true => Ok(file),
            false => Err(Failed::Damage(Damage::Size { part, expected, actual })),
        }
    });
    let files = [state?, memory?, disk?];
    // Another template's, whole in itself, would be gone on from in this one's memory.
    match damage(&record, Part::State, &files[0]) {
        None => Ok((record, file, files)),
        Some(damage) => Err(Failed::Damage(damage)),
    }
}

/// What distinguishes a file from what was published, read to its end.
fn damage(record: &TemplateRecord, part: Part, file: &File) -> Option<Damage> {
    let published = record.part(part);
    match SparseDigest::of(file, published.bytes) {
        Ok(actual) if actual == published.digest => None,
        Ok(actual) => Some(Damage::Content { part, expected: published.digest.clone(), actual }),
        Err(error) => Some(Damage::Unreadable(part.name(), error)),
    }
}

fn open_file(folder: &Folder, name: &'static str) -> Result<File, Failed> {
    match folder.file(name) {
        Ok(Some(file)) if file.metadata().map_err(Failed::Io)?.is_file() => Ok(file),
        Ok(Some(_)) => Err(Failed::Damage(Damage::NoFile(name))),
        Ok(None) => Err(Failed::Damage(Damage::Missing(name))),
        // A link (ELOOP, since none is followed), a socket or a device without driver (ENXIO).
        Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::LOOP | Errno::NXIO)) => {
            Err(Failed::Damage(Damage::NoFile(name)))
        }
        Err(error) => Err(Failed::Io(error)),
    }
}

/// Whether somebody has it open: whether nobody can have it alone, for a moment.
pub(super) fn is_used(folder: &Folder) -> io::Result<bool> {
    let Some(disk) = folder.file(Part::Disk.name())? else { return Ok(false) };
    match disk.try_lock() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Whether it is to stay.
pub(super) fn is_pinned(folder: &Folder) -> io::Result<bool> {
    Ok(folder.file(PINNED)?.is_some())
}
