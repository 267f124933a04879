//! Reading a room's log, also while it is written and rotated.

use std::collections::VecDeque;
use std::time::Duration;

use thiserror::Error;

use super::{ENTRY_BYTES, File, HEADER_BYTES, MetadataExt, Path, PathBuf, Read, StreamKind, Write, io};
use crate::home::Room;
use crate::timestamp::rfc3339;

/// How often a followed log is looked at.
const INTERVAL: Duration = Duration::from_millis(50);
/// A line that is longer is shown in parts.
const LINE_BYTES: usize = 64 << 10;

/// A log can't be shown.
#[derive(Debug, Error)]
pub enum LogError {
    /// The room's output went to the command that ran it.
    #[error("the room {0} has no log: it is attached to the command that runs it")]
    Attached(String),
    /// The file can't be read.
    #[error("the room's log can't be read")]
    Read(#[source] io::Error),
    /// What was read can't be shown; a broken pipe is the reader's way to say that it had enough.
    #[error("the room's log can't be written to standard output")]
    Write(#[source] io::Error),
}

/// What to show.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogOptions {
    /// Go on until the room ends.
    pub follow: bool,
    /// Only the last lines.
    pub tail: Option<usize>,
    /// Begin each line with its time.
    pub timestamps: bool,
}

/// Shows a room's log: what came from stdout on `out`, from stderr on `err`.
pub fn print(
    room: &Room,
    options: LogOptions,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> Result<(), LogError> {
    if !room.spec().detached {
        return Err(LogError::Attached(room.title().to_owned()));
    }
    show(room.directory(), options, &|| room.has_ended(), out, err)
}

pub(super) fn show(
    directory: &Path,
    options: LogOptions,
    has_ended: &dyn Fn() -> bool,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> Result<(), LogError> {
    let mut entries = Entries::new(directory);
    let mut lines = Lines { timestamps: options.timestamps, ..Lines::default() };
    if let Some(most) = options.tail {
        let mut last = VecDeque::new();
        while let Some(entry) = entries.next().map_err(LogError::Read)? {
            lines.push(&entry, &mut |line| keep(&mut last, line, most));
        }
        lines.finish(&mut |line| keep(&mut last, line, most));
        for line in last {
            write_line(&line, out, err)?;
        }
    }
    loop {
        // Looked at first: what was written before the end is read after it.
        let ended = !options.follow || has_ended();
        while let Some(entry) = entries.next().map_err(LogError::Read)? {
            if options.timestamps {
                let mut whole = Vec::new();
                lines.push(&entry, &mut |line| whole.push(line));
                whole.iter().try_for_each(|line| write_line(line, out, err))?;
            } else {
                let line = Line { stream: entry.stream, bytes: entry.bytes };
                write_line(&line, out, err)?;
            }
        }
        out.flush().and_then(|()| err.flush()).map_err(LogError::Write)?;
        if ended {
            break;
        }
        std::thread::sleep(INTERVAL);
    }
    let mut rest = Vec::new();
    lines.finish(&mut |line| rest.push(line));
    rest.iter().try_for_each(|line| write_line(line, out, err))?;
    out.flush().and_then(|()| err.flush()).map_err(LogError::Write)
}

fn keep(last: &mut VecDeque<Line>, line: Line, most: usize) {
    last.push_back(line);
    if last.len() > most {
        last.pop_front();
    }
}

fn write_line(line: &Line, out: &mut dyn Write, err: &mut dyn Write) -> Result<(), LogError> {
    let written = if line.stream == StreamKind::Stderr {
        err.write_all(&line.bytes)
    } else {
        out.write_all(&line.bytes)
    };
    written.map_err(LogError::Write)
}

/// What one write brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) ns: u64,
    pub(super) stream: StreamKind,
    pub(super) bytes: Vec<u8>,
}

/// Text to be shown, whole lines where there are such.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Line {
    stream: StreamKind,
    bytes: Vec<u8>,
}

/// Puts lines together; each has the time at which it began.
#[derive(Debug, Default)]
struct Lines {
    timestamps: bool,
    out: Option<(u64, Vec<u8>)>,
    err: Option<(u64, Vec<u8>)>,
}

impl Lines {
    fn push(&mut self, entry: &Entry, show: &mut dyn FnMut(Line)) {
        let timestamps = self.timestamps;
        let begun = if entry.stream == StreamKind::Stderr { &mut self.err } else { &mut self.out };
        for part in entry.bytes.split_inclusive(|byte| *byte == b'\n') {
            let (ns, mut bytes) = begun.take().unwrap_or((entry.ns, Vec::new()));
            bytes.extend_from_slice(part);
            if part.ends_with(b"\n") || bytes.len() >= LINE_BYTES {
                show(line(timestamps, entry.stream, ns, bytes));
            } else {
                *begun = Some((ns, bytes));
            }
        }
    }

    /// What has no end of line.
    fn finish(&mut self, show: &mut dyn FnMut(Line)) {
        for (stream, begun) in [(StreamKind::Stdout, &mut self.out), (StreamKind::Stderr, &mut self.err)] {
            if let Some((ns, bytes)) = begun.take() {
                show(line(self.timestamps, stream, ns, bytes));
            }
        }
    }
}

fn line(timestamps: bool, stream: StreamKind, ns: u64, bytes: Vec<u8>) -> Line {
    if !timestamps {
        return Line { stream, bytes };
    }
    let mut stamped = rfc3339(ns).into_bytes();
    stamped.push(b' ');
    stamped.extend(bytes);
    Line { stream, bytes: stamped }
}

/// The entries of both files, as far as they are written.
#[derive(Debug)]
pub(super) struct Entries {
    directory: PathBuf,
    file: Option<File>,
    /// Bytes read and not yet used.
    pending: Vec<u8>,
}

impl Entries {
    pub(super) fn new(directory: &Path) -> Self {
        let file = File::open(directory.join("log.old")).ok();
        Self { directory: directory.to_owned(), file, pending: Vec::new() }
    }

    /// The next entry; `None` when there is none yet.
    pub(super) fn next(&mut self) -> io::Result<Option<Entry>> {
        loop {
            if let Some(entry) = self.parse()? {
                return Ok(Some(entry));
            }
            if self.read()? == 0 && !self.go_on()? {
                return Ok(None);
            }
        }
    }

    fn read(&mut self) -> io::Result<usize> {
        let Some(file) = &mut self.file else { return Ok(0) };
        let mut buffer = vec![0; HEADER_BYTES + ENTRY_BYTES];
        let n = file.read(&mut buffer)?;
        self.pending.extend_from_slice(buffer.get(..n).unwrap_or_default());
        Ok(n)
    }

    /// At a file's end: to the newer one, if this has been rotated away or is the older one.
    fn go_on(&mut self) -> io::Result<bool> {
        let newest = match File::open(self.directory.join("log")) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            opened => opened?,
        };
        let identity = |file: &File| file.metadata().map(|found| (found.dev(), found.ino()));
        if let Some(file) = &self.file
            && identity(file)? == identity(&newest)?
        {
            return Ok(false);
        }
        // It may have been written to between the last read and its rotation.
        if self.read()? == 0 {
            self.pending.clear();
            self.file = Some(newest);
        }
        Ok(true)
    }

    fn parse(&mut self) -> io::Result<Option<Entry>> {
        let Some((header, rest)) = self.pending.split_first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let [t0, t1, t2, t3, t4, t5, t6, t7, stream, 0, 0, 0, l0, l1, l2, l3] = *header else {
            return Err(garbled());
        };
        let length = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
        if length > ENTRY_BYTES {
            return Err(garbled());
        }
        let Some(bytes) = rest.get(..length) else { return Ok(None) };
        let stream = match stream {
            1 => StreamKind::Stdout,
            2 => StreamKind::Stderr,
            _ => return Err(garbled()),
        };
        let ns = u64::from_le_bytes([t0, t1, t2, t3, t4, t5, t6, t7]);
        let entry = Entry { ns, stream, bytes: bytes.to_vec() };
        self.pending.drain(..HEADER_BYTES + length);
        Ok(Some(entry))
    }
}

fn garbled() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the log is garbled")
}
