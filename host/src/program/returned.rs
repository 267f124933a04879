//! Files that a room sends back, written where the user wants them and nowhere else.
//!
//! ```text
//!   stream ─▶ FromRoom: Entry, content … Done ─▶ which destination? ─▶ openat2 below its folder, no link followed ─▶ new file, renamed into place
//! ```
//!
//! The sender is a guest: what it says is capped, each path is below what was asked for or refused, no file is larger than announced, nothing gets
//! more rights than a file of the user's has, and a link may lead only to what came back with it. Where everything goes is settled before the first byte: what
//! was received changes no path that is looked up.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use carrel_protocol::returned::{Entry, FromRoom, Kind, LONGEST_PATH};
use carrel_protocol::{FrameError, Message};
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Timespec, Timestamps};
use rustix::io::Errno;
use thiserror::Error;

use crate::outcome::clean;

/// Where what was at a path of the room's is to be on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// Absolute.
    pub in_room: String,
    /// The file or folder that it becomes. What is there is replaced, file by file.
    pub on_host: PathBuf,
}

/// What may come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Of all files together.
    pub bytes: u64,
    /// Files, folders and links.
    pub entries: u64,
}

/// What came back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// Files, folders and links.
    pub entries: u64,
    /// Of all files together.
    pub bytes: u64,
    /// Paths in the room where nothing was.
    pub missing: Vec<String>,
    /// Links, pipes and names that stayed in the room.
    pub left_out: u64,
}

/// Why files did not come back, or not all.
#[derive(Debug, Error)]
pub enum ReturnError {
    /// The room won't send them.
    #[error("the room sent no files: {0}")]
    Refused(String),
    /// The stream ended or is none.
    #[error("the files did not come back whole; what came is in place")]
    Broken(#[source] FrameError),
    /// The room says what can't be.
    #[error(
        "the room sent the path {0:?}, which is none below what was asked for; don't trust what came back"
    )]
    Path(String),
    /// Too much.
    #[error("the room sent more than {0}; what came before is in place, and --return-limit allows more")]
    TooMuch(String),
    /// This host can't write it.
    #[error("{} can't be written", .path.display())]
    Write {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Takes what comes over the stream. A sender that says nothing for as long as `silence` is given up.
///
/// # Errors
///
/// See [`ReturnError`]. Files that came before are in place, each whole.
pub fn receive(
    stream: UnixStream,
    destinations: &[Destination],
    limits: Limits,
    silence: Duration,
) -> Result<Received, ReturnError> {
    let broken = |error: io::Error| ReturnError::Broken(error.into());
    stream.set_nonblocking(false).map_err(broken)?;
    stream.set_read_timeout(Some(silence)).map_err(broken)?;
    take(BufReader::with_capacity(256 << 10, stream), destinations, limits)
}

fn take(mut from: impl Read, destinations: &[Destination], limits: Limits) -> Result<Received, ReturnError> {
    let mut received = Received::default();
    let mut targets: Vec<Target> =
        destinations.iter().map(|to| Target::open(&to.on_host)).collect::<Result<_, _>>()?;
    loop {
        match FromRoom::read_from(&mut from).map_err(ReturnError::Broken)? {
            FromRoom::Done(done) => {
                received.left_out = received.left_out.saturating_add(done.left_out);
                return Ok(received);
            }
            FromRoom::Missing(missing) => {
                let known = usize::try_from(missing.root).ok().and_then(|n| destinations.get(n));
                let known = known.ok_or_else(|| ReturnError::Path(format!("number {}", missing.root)))?;
                // As often as it was asked for, whatever a guest repeats.
                if !received.missing.contains(&known.in_room) {
                    received.missing.push(known.in_room.clone());
                }
            }
            FromRoom::Entry(entry) => {
                received.entries += 1;
                if received.entries > limits.entries {
                    return Err(ReturnError::TooMuch(format!("{} files", limits.entries)));
                }
                let target = usize::try_from(entry.root).ok().and_then(|n| targets.get_mut(n));
                let target = target.ok_or_else(|| ReturnError::Path(format!("number {}", entry.root)))?;
                if let Kind::File { bytes } = entry.kind {
                    received.bytes = received.bytes.saturating_add(bytes);
                    if received.bytes > limits.bytes {
                        return Err(ReturnError::TooMuch(format!("{} bytes", limits.bytes)));
                    }
                }
                if !target.put(&entry, &mut from)? {
                    received.left_out += 1;
                }
            }
        }
    }
}

/// A destination: what is written is this name in this folder, or below it.
struct Target {
    path: PathBuf,
    /// Where the user said, links of his own followed.
    parent: OwnedFd,
    name: std::ffi::OsString,
    /// The folder of this name, once the room sent one.
    folder: Option<OwnedFd>,
}

const FOLDER: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC).union(OFlags::NOFOLLOW);
/// What is there is found, links followed, as long as they do not lead out.
const INSIDE: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_MAGICLINKS);
const BENEATH: ResolveFlags = INSIDE.union(ResolveFlags::NO_SYMLINKS);

impl Target {
    fn open(path: &Path) -> Result<Self, ReturnError> {
        let write = |source| ReturnError::Write { path: path.to_owned(), source };
        // A folder that is there under another name is the user's own choice.
        let path = std::fs::canonicalize(path).or_else(|_| std::path::absolute(path)).map_err(write)?;
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(write(io::ErrorKind::InvalidInput.into()));
        };
        std::fs::create_dir_all(parent).map_err(write)?;
        let opened =
            rustix::fs::open(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        let parent = opened.map_err(|error| write(error.into()))?;
        let name = name.to_owned();
        Ok(Self { path, parent, name, folder: None })
    }

    /// Writes an entry. Says whether it could be had: a link that leads elsewhere is left out.
    fn put(&mut self, entry: &Entry, from: &mut impl Read) -> Result<bool, ReturnError> {
        if entry.path.is_empty() {
            return self.put_whole(entry, from).map(|()| true);
        }
        let relative = checked(&entry.path).ok_or_else(|| ReturnError::Path(clean(&entry.path)))?;
        let folder = self.folder.as_ref().ok_or_else(|| ReturnError::Path(clean(&entry.path)))?;
        let shown = self.path.join(relative);
        let write = |source: io::Error| ReturnError::Write { path: shown.clone(), source };
        let below = relative.parent().filter(|parent| !parent.as_os_str().is_empty());
        let parent = match below {
            Some(below) => rustix::fs::openat2(folder, below, FOLDER, Mode::empty(), BENEATH),
            None => rustix::io::dup(folder),
        };
        let parent = parent.map_err(|error| write(error.into()))?;
        let name = relative.file_name().unwrap_or_default();
        match &entry.kind {
            Kind::Directory => make_folder(&parent, name).map(drop).map_err(write)?,
            Kind::File { bytes } => put_file(parent.as_fd(), name, *bytes, entry, from, &shown)?,
            Kind::Link { target } if stays(folder, relative, target) => {
                put_link(&parent, name, target).map_err(write)?;
            }
            Kind::Link { .. } => return Ok(false),
        }
        Ok(true)
    }

    /// What was asked for itself.
    fn put_whole(&mut self, entry: &Entry, from: &mut impl Read) -> Result<(), ReturnError> {
        let write = |source: io::Error| ReturnError::Write { path: self.path.clone(), source };
        match &entry.kind {
            Kind::Directory => {
                self.folder = Some(make_folder(&self.parent, &self.name).map_err(write)?);
                Ok(())
            }
            Kind::File { bytes } => {
                put_file(self.parent.as_fd(), &self.name, *bytes, entry, from, &self.path)
            }
            // The room follows links of what it is asked for.
            Kind::Link { .. } => Err(ReturnError::Path(String::new())),
        }
    }
}

/// A path of names alone.
fn checked(path: &str) -> Option<&Path> {
    let good = path.len() <= LONGEST_PATH
        && !path.contains('\0')
        && path.split('/').all(|part| !matches!(part, "" | "." | "..") && part.len() <= 255);
    good.then_some(Path::new(path))
}

/// Whether a link, at this path, leads to something that came back with it.
///
/// Up first, by the real folders that it lies in and no further, and then down: a `..` behind a name would go up from wherever that name leads, if it is a link. On its way down it
/// may meet links that came back, which stay as well, and the user's own, which need not: so whatever is there already is looked up too.
fn stays(folder: &OwnedFd, at: &Path, target: &str) -> bool {
    if target.is_empty() || target.len() > LONGEST_PATH || target.contains('\0') {
        return false;
    }
    let mut up_from = at.parent();
    let mut is_down = false;
    for part in Path::new(target).components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir if is_down => return false,
            Component::ParentDir => match up_from.filter(|here| !here.as_os_str().is_empty()) {
                Some(here) => up_from = here.parent(),
                None => return false,
            },
            Component::Normal(_) => is_down = true,
            Component::RootDir | Component::Prefix(_) => return false,
        }
    }
    let found = at.parent().unwrap_or(Path::new("")).join(target);
    let found = rustix::fs::openat2(folder, found, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), INSIDE);
    matches!(found, Ok(_) | Err(Errno::NOENT))
}

/// The folder of this name, made if it is missing.
fn make_folder(parent: &OwnedFd, name: &OsStr) -> io::Result<OwnedFd> {
    match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(rustix::fs::openat2(parent, name, FOLDER, Mode::empty(), BENEATH)?)
}

/// Under a name of its own first, so that a reader sees the old file or the new one.
fn put_file(
    parent: BorrowedFd<'_>,
    name: &OsStr,
    bytes: u64,
    entry: &Entry,
    from: &mut impl Read,
    shown: &Path,
) -> Result<(), ReturnError> {
    let write = |source: io::Error| ReturnError::Write { path: shown.to_owned(), source };
    let new = format!(".carrel-returned-{}", std::process::id());
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    // What an earlier carrel of this number left.
    let _ = rustix::fs::unlinkat(parent, &new, AtFlags::empty());
    let file = rustix::fs::openat2(parent, &new, flags, Mode::from_raw_mode(0o600), BENEATH);
    let mut file = File::from(file.map_err(|error| write(error.into()))?);
    let put = copy(from, &mut file, bytes).and_then(|()| {
        let dress = || -> io::Result<()> {
            // Nobody but the user may change it, and nobody becomes another by running it.
            rustix::fs::fchmod(&file, Mode::from_raw_mode(entry.mode & 0o755 | 0o600))?;
            let time = Timespec { tv_sec: entry.mtime, tv_nsec: 0 };
            // A time that the file system can't hold is no loss.
            let _ = rustix::fs::futimens(&file, &Timestamps { last_access: time, last_modification: time });
            Ok(rustix::fs::renameat(parent, &new, parent, name)?)
        };
        dress().map_err(Fault::Writing)
    });
    put.map_err(|fault| {
        let _ = rustix::fs::unlinkat(parent, &new, AtFlags::empty());
        match fault {
            Fault::Reading(error) => ReturnError::Broken(error.into()),
            Fault::Writing(error) => write(error),
        }
    })
}

enum Fault {
    Reading(io::Error),
    Writing(io::Error),
}

fn copy(from: &mut impl Read, to: &mut File, bytes: u64) -> Result<(), Fault> {
    let mut left = bytes;
    let mut chunk = vec![0; 256 << 10];
    while left > 0 {
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(chunk.len());
        let chunk = chunk.get_mut(..most).unwrap_or_default();
        let read = match from.read(chunk) {
            Ok(0) => return Err(Fault::Reading(io::ErrorKind::UnexpectedEof.into())),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Fault::Reading(error)),
        };
        to.write_all(chunk.get(..read).unwrap_or_default()).map_err(Fault::Writing)?;
        left = left.saturating_sub(u64::try_from(read).unwrap_or(u64::MAX));
    }
    Ok(())
}

fn put_link(parent: &OwnedFd, name: &OsStr, target: &str) -> io::Result<()> {
    let new = format!(".carrel-returned-{}", std::process::id());
    let _ = rustix::fs::unlinkat(parent, &new, AtFlags::empty());
    rustix::fs::symlinkat(target, parent, &new)?;
    rustix::fs::renameat(parent, &new, parent, name).map_err(|error| {
        let _ = rustix::fs::unlinkat(parent, &new, AtFlags::empty());
        error.into()
    })
}

#[cfg(test)]
mod tests;
