//! `/init` of a guest that works and finds out whether anything of it was lost: memory, its disk, its clock, and a conversation with its host.
//!
//! It dials port 5000 and says who it is (the number of its next block and CLOCK_MONOTONIC, ns). Then it sends blocks of 4 KiB, each a number and what
//! follows from it, and expects each back. Between two blocks it checks and changes pages of its memory and blocks of `/dev/vda`, around the page cache,
//! and looks at its clock. A connection that ends is dialled anew, the same block being the next: that is what a clone finds. What must not be ends it, and the
//! kernel panics.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};
use nix::time::{ClockId, clock_gettime};

const HOST: u32 = 2;
const PORT: u32 = 5000;
const BLOCK: usize = 4096;
/// 4 MiB each.
const PAGES: usize = 1024;
const BLOCKS: usize = 1024;
const AT_ONCE: usize = 16;

/// A page that may be read and written without the page cache.
#[repr(align(4096))]
#[derive(Clone)]
struct Page([u8; BLOCK]);

/// What a page holds in its nth version.
fn content(salt: u64, index: usize, version: u32) -> Page {
    let mut page = Page([0; BLOCK]);
    let mut word =
        salt ^ (u64::try_from(index).unwrap_or(0) << 32 | u64::from(version)) ^ 0x9e37_79b9_7f4a_7c15;
    for bytes in page.0.as_chunks_mut::<8>().0 {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        *bytes = word.to_le_bytes();
    }
    page
}

/// Pages or blocks with the version that each must be of.
struct Versions {
    salt: u64,
    versions: Vec<u32>,
    next: usize,
}

impl Versions {
    fn new(salt: u64, count: usize) -> Self {
        Self { salt, versions: vec![0; count], next: 0 }
    }

    /// The next one's index, what it must hold, and what it is to hold from now on.
    fn turn(&mut self) -> (usize, Page, Page) {
        let index = self.next;
        self.next = (self.next + 7) % self.versions.len();
        let version = self.versions.get_mut(index).map_or(0, |version| {
            *version += 1;
            *version
        });
        (index, content(self.salt, index, version - 1), content(self.salt, index, version))
    }
}

fn main() -> io::Result<()> {
    mount(Some("dev"), "/dev", Some("devtmpfs"), MsFlags::empty(), None::<&str>)?;
    let disk =
        OpenOptions::new().read(true).write(true).custom_flags(nix::libc::O_DIRECT).open("/dev/vda")?;
    let (mut pages, mut blocks) = (Versions::new(1, PAGES), Versions::new(2, BLOCKS));
    let mut memory: Vec<Page> = (0..PAGES).map(|index| content(1, index, 0)).collect();
    for index in 0..BLOCKS {
        disk.write_all_at(&content(2, index, 0).0, offset(index))?;
    }
    let (mut number, mut clock) = (0u64, now()?);
    loop {
        let Ok(mut host) = dial() else {
            std::thread::sleep(Duration::from_millis(5));
            continue;
        };
        let hello = [number.to_le_bytes(), now()?.to_le_bytes()].concat();
        if host.write_all(&hello).is_err() {
            continue;
        }
        while let Ok(()) = converse(&mut host, number) {
            number += 1;
            for _ in 0..AT_ONCE {
                let (index, expected, next) = pages.turn();
                let page = memory.get_mut(index).ok_or(io::ErrorKind::NotFound)?;
                assert!(page.0 == expected.0, "page {index}");
                *page = next;
            }
            let (index, expected, next) = blocks.turn();
            let mut block = Page([0; BLOCK]);
            disk.read_exact_at(&mut block.0, offset(index))?;
            assert!(block.0 == expected.0, "block {index}");
            disk.write_all_at(&next.0, offset(index))?;
            let later = now()?;
            assert!(later >= clock, "the clock went back: {clock}, {later}");
            clock = later;
        }
    }
}

/// Sends a block and gets it back. A connection that ends is an error; one that says something else must not be.
fn converse(host: &mut File, number: u64) -> io::Result<()> {
    let mut sent = content(3, 0, u32::try_from(number & 0xffff_ffff).unwrap_or(0));
    if let Some(first) = sent.0.first_chunk_mut() {
        *first = number.to_le_bytes();
    }
    host.write_all(&sent.0)?;
    let mut back = Page([0; BLOCK]);
    host.read_exact(&mut back.0)?;
    assert!(back.0 == sent.0, "block {number} came back as another");
    Ok(())
}

fn dial() -> nix::Result<File> {
    let dialling: OwnedFd = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::empty(), None)?;
    connect(dialling.as_raw_fd(), &VsockAddr::new(HOST, PORT))?;
    Ok(dialling.into())
}

fn offset(index: usize) -> u64 {
    u64::try_from(index * BLOCK).unwrap_or(0)
}

/// CLOCK_MONOTONIC, ns.
fn now() -> io::Result<u64> {
    let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
    u64::try_from(now.as_nanos()).map_err(io::Error::other)
}
