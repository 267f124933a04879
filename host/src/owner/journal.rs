//! What an owner has to say about its room, when the log level asks for it: `owner.log`, and `owner.log.old` before it.
//!
//! A guest can make its owner say something 500 times a second for as long as it runs, so the older of the two goes when the newer is full.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Bytes in one of the two files.
const LIMIT_BYTES: u64 = 4 << 20;

/// The owner's own log, bounded. What it can't write is lost.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    written: u64,
    limit: u64,
}

impl Journal {
    /// That of the room in this directory.
    ///
    /// # Errors
    ///
    /// The file can't be opened.
    pub fn open(directory: &Path) -> io::Result<Self> {
        Self::with_limit(directory, LIMIT_BYTES)
    }

    fn with_limit(directory: &Path, limit: u64) -> io::Result<Self> {
        let path = directory.join("owner.log");
        let file = append(&path)?;
        let written = file.metadata()?.len();
        Ok(Self { path, file, written, limit })
    }
}

/// Opens an owner's log so that all who have it open, the owner's standard error among them, write behind each other.
pub(crate) fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

impl Write for Journal {
    /// Takes what is one entry to the formatter whole, so that no entry is in two files.
    fn write(&mut self, entry: &[u8]) -> io::Result<usize> {
        let length = u64::try_from(entry.len()).unwrap_or(u64::MAX);
        if self.written.saturating_add(length) > self.limit && self.written > 0 {
            fs::rename(&self.path, self.path.with_extension("log.old"))?;
            self.file = append(&self.path)?;
            self.written = 0;
        }
        self.file.write_all(entry)?;
        self.written = self.written.saturating_add(length);
        Ok(entry.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_without_end_is_kept_to_two_files_and_the_newest_of_it() {
        let directory = tempfile::tempdir().unwrap();
        let mut journal = Journal::with_limit(directory.path(), 1000).unwrap();
        for n in 0..1000 {
            writeln!(journal, "the guest dialled {n:04}").unwrap();
        }
        let read = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap();
        let (new, old) = (read("owner.log"), read("owner.log.old"));
        assert!(new.len() <= 1000 && old.len() <= 1000, "{} and {}", old.len(), new.len());
        assert!(new.ends_with("dialled 0999\n"));
        let all: Vec<String> = (old + &new).lines().map(str::to_owned).collect();
        assert!(all.len() > 40 && all.iter().all(|line| line.len() == 22), "whole entries: {all:?}");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
    }

    #[test]
    fn what_was_said_on_standard_error_before_counts_and_stays() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("owner.log"), "before\n").unwrap();
        let mut journal = Journal::with_limit(directory.path(), 10).unwrap();
        journal.write_all(b"after\n").unwrap();
        assert_eq!(fs::read(directory.path().join("owner.log.old")).unwrap(), b"before\n");
        assert_eq!(fs::read(directory.path().join("owner.log")).unwrap(), b"after\n");
    }
}
