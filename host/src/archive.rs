//! Archives: their headers are read in a confined process of its own, started for one archive and gone after it.
//!
//! ```text
//!   ArchiveReader::start ─▶ Started ───────── read(archive) ─────────▶ Index | what is wrong with the archive
//!        │ clone3, execveat ▲ Ready            │ the descriptor            ▲ Entries …, Done | Refused
//!        ▼ of this program  │                  ▼                           │
//!      launched ─▶ confined ┘               scanning ──────────────────────┘
//!
//!   It dies, hangs, or says something else at any point: it is killed and buried, and the error says so.
//! ```
//!
//! The child is this very program under another command, so nothing of this process's memory is in it. It is handed the archive only once it has
//! said that it is confined. What it answers is checked like the words of a stranger, for it has met one. [`child`] is its side,
//! [`api`] what is said, [`confinement`] and [`filter`] what it is left with.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use carrel_protocol::confinement::Part;
use carrel_store::archive::{Index, IndexError, Indexer};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;
use thiserror::Error;

use crate::launch::{self, Child, ChildEnd, LaunchError};
use crate::packet::{Connection, PacketError};
use crate::patience::Patience;

pub mod api;
mod child;
mod confinement;
mod filter;

use api::{FromReader, Read};
pub use child::{COMMAND, serve};

/// An archive was not read, through no fault that was found in it.
#[derive(Debug, Error)]
pub enum ReaderError {
    /// It can't be started.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// It can't be confined.
    #[error(
        "the host can't give this part of the confinement: {0}; see `carrel doctor`, or use --unconfined"
    )]
    Unconfined(String),
    /// It takes too long.
    #[error(
        "it did not end within {} s; copy the archive to a faster disk, or set CARREL_PATIENCE", .0.as_secs_f32()
    )]
    Hung(Duration),
    /// It died.
    #[error("{0}")]
    Ended(&'static str),
    /// It doesn't speak as agreed.
    #[error("it answered something that is no answer")]
    Garbled(#[source] PacketError),
    /// It says what can't be, or out of turn.
    #[error("it answered what no archive can hold; don't use this archive")]
    Nonsense,
    /// Something of the host's failed.
    #[error("the host failed")]
    Io(#[from] io::Error),
}

/// Starts confined readers of archives.
#[derive(Clone, Debug)]
pub struct ArchiveReader {
    program: PathBuf,
    arguments: Vec<String>,
    without: Vec<Part>,
    deadline: Duration,
}

impl ArchiveReader {
    /// Readers that are the running program under the command [`COMMAND`], without some parts of their confinement. A cgroup is none of
    /// theirs.
    #[must_use]
    pub fn of_this_program(without: Vec<Part>, patience: Patience) -> Self {
        Self::new("/proc/self/exe".into(), without, patience.archive())
    }

    /// Readers that are another program, with so much time for each archive.
    #[must_use]
    pub fn new(program: PathBuf, without: Vec<Part>, deadline: Duration) -> Self {
        Self { program, arguments: child::arguments(&without), without, deadline }
    }

    /// Starts one, and returns when it is confined. It ends with the calling thread at the latest.
    ///
    /// # Errors
    ///
    /// If it can't be started or confined.
    pub fn start(&self) -> Result<Started, ReaderError> {
        let until = Instant::now() + self.deadline;
        let program = File::open(&self.program)
            .map_err(|source| LaunchError::Open { path: self.program.clone(), source })?;
        let path = fs::read_link(&self.program).unwrap_or_else(|_| self.program.clone());
        let (connection, theirs) = Connection::pair()?;
        let child = launch::spawn(&launch::Plan {
            program: program.as_fd(),
            path: &path,
            arguments: self.arguments.clone(),
            socket: theirs.as_fd(),
            cgroup: None,
            user: (!self.without.contains(&Part::Namespaces)).then(launch::reading_user),
        })?;
        drop(theirs);
        let started = Started { connection, child, until, deadline: self.deadline };
        match started.hear()? {
            FromReader::Ready(_) => Ok(started),
            FromReader::Unconfined(missing) => Err(ReaderError::Unconfined(missing.part)),
            FromReader::Entries(_) | FromReader::Done(_) | FromReader::Refused(_) => {
                Err(ReaderError::Nonsense)
            }
        }
    }
}

impl Indexer for ArchiveReader {
    fn index(&self, archive: &File, length: u64) -> Result<Index, IndexError> {
        self.start().map_err(failed)?.read(archive, length)
    }
}

/// A confined reader that waits for its archive. Killed when dropped.
#[derive(Debug)]
pub struct Started {
    connection: Connection,
    child: Child,
    until: Instant,
    deadline: Duration,
}

fn failed(error: ReaderError) -> IndexError {
    IndexError::Failed(Box::new(error))
}

impl Started {
    /// Its process, for measuring and for tests.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// Hands it the archive, of so many bytes, and waits for what it finds.
    ///
    /// # Errors
    ///
    /// If the archive is none, or the reader fails.
    pub fn read(self, archive: &File, length: u64) -> Result<Index, IndexError> {
        // One that died already says why with its end.
        let _ = self.connection.send(&api::ToReader::from(Read { length }), &[archive.as_fd()]);
        let mut index = Index::new(length);
        loop {
            match self.hear().map_err(failed)? {
                FromReader::Entries(entries) => {
                    // An empty list again and again would be work without end.
                    if entries.0.is_empty() {
                        return Err(failed(ReaderError::Nonsense));
                    }
                    for entry in entries.0 {
                        index.add(entry).map_err(|refusal| {
                            tracing::warn!(?refusal, "an archive's reader named an entry that can't be");
                            failed(ReaderError::Nonsense)
                        })?;
                    }
                }
                FromReader::Done(_) => return Ok(index),
                FromReader::Refused(refused) => return Err(refused.0.into()),
                FromReader::Ready(_) | FromReader::Unconfined(_) => {
                    return Err(failed(ReaderError::Nonsense));
                }
            }
        }
    }

    fn hear(&self) -> Result<FromReader, ReaderError> {
        self.wait_for(self.connection.as_fd())?;
        match self.connection.receive() {
            Ok(packet) => Ok(packet.message),
            Err(error) if error.is_closed() => Err(self.end()),
            Err(error) => Err(ReaderError::Garbled(error)),
        }
    }

    /// How it ended, once it has closed its connection.
    fn end(&self) -> ReaderError {
        let ended = || -> Result<ChildEnd, ReaderError> {
            self.wait_for(self.child.descriptor()?.as_fd())?;
            Ok(self.child.wait()?)
        };
        match ended() {
            Ok(end) => ReaderError::Ended(words(end)),
            Err(error) => error,
        }
    }

    fn wait_for(&self, what: impl AsFd) -> Result<(), ReaderError> {
        loop {
            let left = self.until.saturating_duration_since(Instant::now());
            let time = Timespec::try_from(left).map_err(io::Error::other)?;
            match poll(&mut [PollFd::new(&what, PollFlags::IN)], Some(&time)) {
                Ok(0) if left.is_zero() => return Err(ReaderError::Hung(self.deadline)),
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
    }
}

fn words(end: ChildEnd) -> &'static str {
    let is = |number: u8, signal: Signal| i32::from(number) == signal.as_raw();
    match end {
        ChildEnd::Signal(n) if is(n, Signal::SYS) => {
            "it attempted a system call that it may not make; don't use this archive"
        }
        ChildEnd::Signal(n) if is(n, Signal::XCPU) => "it used up its CPU time; don't use this archive",
        ChildEnd::Signal(n) if is(n, Signal::KILL) => {
            "it was killed, by somebody or for want of memory; try again"
        }
        ChildEnd::Signal(_) => "it crashed; don't use this archive, and report this",
        ChildEnd::Status(_) => "it ended without an answer; install all of carrel from one build",
    }
}

#[cfg(test)]
mod tests;
