//! Reading a template's files into the page cache on nobody's account.
//!
//! The kernel charges a page of the page cache to the cgroup of whoever has it read first (cgroups, *Memory Ownership*), and there it stays. A clone that is the first to touch its
//! template's pages would pay for all others; so a process in a cgroup of its own has them read, before the clone begins, and both are gone then. What they took is in the account of
//! the cgroup above all rooms'.
//!
//! ```text
//!   bring(memory, disk) ─▶ some pages of each not there? ─no─▶ done, in some 140 system calls
//!                            │ yes
//!                            ▼
//!                          PARENT/carrel/ID ─▶ this program, as `read-ahead` ─▶ fadvise(2) of what lies between holes ─▶ removed
//! ```

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Advice, SeekFrom};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::cgroup::{Cgroup, CgroupError, Limits};
use crate::home::{fresh_id, random};
use crate::launch::{self, LaunchError};
use crate::packet::{Connection, PacketError};
use residency::Residency;

#[expect(unsafe_code, reason = "mincore(2) has no safe form")]
mod residency;

/// The command under which a program that uses [`super::Pool`] calls [`serve`], before it does anything else.
pub const COMMAND: &str = "read-ahead";
/// Pages of each file that are looked at.
const SAMPLES: usize = 32;
/// The process's own memory, bytes, beside the pages that it has read.
const OWN_BYTES: u64 = 64 << 20;
/// Of one request, bytes: the kernel has no more read for one than it would read ahead (`force_page_cache_ra`), 128 KiB unless a device is set otherwise.
const CHUNK: u64 = 128 << 10;
const CPU_MILLIS: u64 = 1000;
const THREADS: u64 = 4;

carrel_protocol::messages! {
    /// What the reading process is told.
    ToReader {
        1 ReadAhead 64;
    }
}

/// Have these files read; their descriptors come along.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReadAhead {}

/// The files were not read ahead.
#[derive(Debug, Error)]
pub(super) enum AheadError {
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error("the reading process can't be told what to read")]
    Packet(#[from] PacketError),
    #[error("the host failed")]
    Io(#[from] io::Error),
}

/// Has what these files hold read, if some of it is not in the page cache; says whether it did. `program` is one that knows [`COMMAND`]; it is waited for so long at most.
pub(super) fn bring(files: &[&File], program: &Path, patience: Duration) -> Result<bool, AheadError> {
    let is_missing = |file: &&File| is_missing(file).unwrap_or(false);
    if !files.iter().any(is_missing) {
        return Ok(false);
    }
    let lengths: u64 = files.iter().filter_map(|file| Some(file.metadata().ok()?.len())).sum();
    let limits = Limits { memory_bytes: lengths + OWN_BYTES, cpu_millis: CPU_MILLIS, threads: THREADS };
    let cgroup = Cgroup::create(&fresh_id()?, limits)?;
    let read = read_in(&cgroup, files, program, patience);
    cgroup.remove();
    read.map(|()| true)
}

fn read_in(cgroup: &Cgroup, files: &[&File], program: &Path, patience: Duration) -> Result<(), AheadError> {
    let opened = File::open(program).map_err(|source| LaunchError::Open { path: program.into(), source })?;
    let (ours, theirs) = Connection::pair()?;
    let child = launch::spawn(&launch::Plan {
        program: opened.as_fd(),
        path: program,
        arguments: vec!["carrel".into(), COMMAND.into()],
        socket: theirs.as_fd(),
        cgroup: Some(cgroup.directory()?),
        user: None,
    })?;
    drop(theirs);
    let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    ours.send_blocking(&ToReader::from(ReadAhead {}), &files)?;
    let ended = child.descriptor()?;
    let time = Timespec::try_from(patience).map_err(io::Error::other)?;
    match poll(&mut [PollFd::new(&ended, PollFlags::IN)], Some(&time)) {
        // Who is still there is killed with `child`.
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(io::Error::from(error).into()),
    }
}

/// Whether a look at some of its pages, others each time, found one that would have to be read. A file that lacks a tenth of them is found out by 97 of 100 looks.
fn is_missing(file: &File) -> io::Result<bool> {
    let length = file.metadata()?.len();
    if length == 0 {
        return Ok(false);
    }
    let residency = Residency::of(file, length)?;
    let mut chance = [[0; 8]; SAMPLES];
    random(chance.as_flattened_mut())?;
    for sample in chance {
        let data = match data_from(file, u64::from_le_bytes(sample) % length)? {
            Some(data) => data,
            // Behind the last of what it holds.
            None => match data_from(file, 0)? {
                Some(data) => data,
                None => break,
            },
        };
        if !residency.has(data)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Where a file holds something next.
fn data_from(file: &File, offset: u64) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(at) => Ok(Some(at)),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Has the kernel read what it is told to, and returns this process's exit status. There may be no arguments.
#[must_use]
pub fn serve(mut arguments: impl Iterator<Item = OsString>) -> u8 {
    const STARTED_BY_HAND: u8 = 2;
    if arguments.next().is_some() {
        return STARTED_BY_HAND;
    }
    let Ok(socket) = launch::owner_socket() else { return STARTED_BY_HAND };
    let Ok(packet) = Connection::from(socket).receive::<ToReader>() else { return STARTED_BY_HAND };
    let ToReader::ReadAhead(_) = packet.message;
    // Nobody has to be told: what is not read ahead is read later.
    u8::from(!packet.descriptors.into_iter().map(File::from).all(|file| read(&file).is_ok()))
}

/// Pages of holes would be made of zeros, and take memory too: they are left out.
fn read(file: &File) -> io::Result<()> {
    let mut at = 0;
    while let Some(mut data) = data_from(file, at)? {
        at = rustix::fs::seek(file, SeekFrom::Hole(data))?;
        while let Some(length) = NonZeroU64::new(at.saturating_sub(data).min(CHUNK)) {
            rustix::fs::fadvise(file, data, Some(length), Advice::WillNeed)?;
            data += length.get();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn what_was_just_written_is_there() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        assert!(!is_missing(&file).unwrap(), "nothing but a hole");
        file.write_all_at(&[1; 8192], 300_000).unwrap();
        assert!(!is_missing(&file).unwrap());
        assert!(!bring(&[&file], "/nonexistent".as_ref(), Duration::ZERO).unwrap(), "so nobody is started");
    }

    /// Where the file system keeps its pages on a disk at all.
    #[test]
    fn what_the_page_cache_has_dropped_is_missing_until_it_is_read() {
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&vec![1; 2 << 20], 20 << 20).unwrap();
        file.sync_all().unwrap();
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        if !is_missing(&file).unwrap() {
            return;
        }
        read(&file).unwrap();
        // The kernel reads in its own time.
        let begun = std::time::Instant::now();
        while is_missing(&file).unwrap() {
            assert!(begun.elapsed() < Duration::from_secs(20));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn it_is_not_started_by_hand() {
        assert_eq!(serve(std::iter::once("x".into())), 2);
    }
}
