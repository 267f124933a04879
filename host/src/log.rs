//! What a detached room wrote: two files of framed entries, the older of which is dropped when the newer is full.
//!
//! ```text
//!  0       8        9        12       16
//!  | time  | stream | zeros  | length | bytes: `length` of them, 64 KiB at most
//!  | u64   | u8     |        | u32    |
//!    ns since the epoch, little-endian; stream 1 is stdout, 2 is stderr
//! ```
//!
//! A flooding guest costs the host [`LogWriter::LIMIT_BYTES`] twice and no more. A host without space loses entries, not the room.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::owner::api::StreamKind;
use crate::timestamp::now_ns;

mod reader;

pub use reader::{LogError, LogOptions, print};

const HEADER_BYTES: usize = 16;
/// The most bytes in one entry.
const ENTRY_BYTES: usize = 64 << 10;

/// The log of a room, written by its owner.
#[derive(Clone, Debug)]
pub(crate) struct LogWriter(Arc<Mutex<Files>>);

#[derive(Debug)]
struct Files {
    directory: PathBuf,
    current: File,
    written: u64,
    limit: u64,
}

impl LogWriter {
    /// Bytes in one of the two files.
    pub(crate) const LIMIT_BYTES: u64 = 16 << 20;

    /// Begins a room's log.
    pub(crate) fn open(directory: &Path) -> io::Result<Self> {
        Self::with_limit(directory, Self::LIMIT_BYTES)
    }

    fn with_limit(directory: &Path, limit: u64) -> io::Result<Self> {
        let current = begin(directory)?;
        Ok(Self(Arc::new(Mutex::new(Files { directory: directory.to_owned(), current, written: 0, limit }))))
    }

    /// Writes all that comes over a stream, to its end.
    pub(crate) fn copy(&self, stream: StreamKind, mut from: UnixStream) {
        let mut buffer = vec![0; ENTRY_BYTES];
        loop {
            match from.read(&mut buffer) {
                Ok(0) => return,
                Ok(n) => self.write(stream, buffer.get(..n).unwrap_or_default()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return tracing::debug!(%error, "a logged stream broke"),
            }
        }
    }

    /// Writes one entry, or several if it is long.
    pub(crate) fn write(&self, stream: StreamKind, bytes: &[u8]) {
        let mut files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for part in bytes.chunks(ENTRY_BYTES) {
            if let Err(error) = files.write(stream, part) {
                tracing::debug!(%error, "the room's log can't be written");
            }
        }
    }
}

fn begin(directory: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(directory.join("log"))
}

impl Files {
    fn write(&mut self, stream: StreamKind, bytes: &[u8]) -> io::Result<()> {
        let mut entry = Vec::with_capacity(HEADER_BYTES + bytes.len());
        entry.extend_from_slice(&now_ns().to_le_bytes());
        entry.extend_from_slice(&[if stream == StreamKind::Stderr { 2 } else { 1 }, 0, 0, 0]);
        entry.extend_from_slice(&u32::try_from(bytes.len()).unwrap_or(0).to_le_bytes());
        entry.extend_from_slice(bytes);
        let length = u64::try_from(entry.len()).unwrap_or(u64::MAX);
        if self.written + length > self.limit {
            match fs::rename(self.directory.join("log"), self.directory.join("log.old")) {
                // It was renamed before, and then there was no space for a new one.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                renamed => renamed?,
            }
            self.current = begin(&self.directory)?;
            self.written = 0;
        }
        if let Err(error) = self.current.write_all(&entry) {
            // What was written of it would garble all that follows.
            self.current.set_len(self.written)?;
            return Err(error);
        }
        self.written += length;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
