//! The room's disk: an ext4 image made ahead, smaller than the device it lies on. Mounted at once, grown while mounted.
//!
//! Growing to 16 GiB takes some 10 ms (docs/rootfs.md) and happens in a child while the handshake is under way;
//! [`Disk::grown`] waits for that. What is beyond follows in the background.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use carrel_protocol::agent::ExitStatus;
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, mount};
use thiserror::Error;
use tokio::task::{JoinHandle, spawn_local};

use crate::fork::{self, Child, Separate};
use crate::socket::Socket;

/// Why there is no room for files.
#[derive(Debug, Error)]
pub(crate) enum DiskError {
    /// mount(2).
    #[error(
        "the room's disk can't be mounted; it must begin with the ext4 image that rootfs/scratch/build makes"
    )]
    Mount(#[source] io::Error),
    /// What is needed to grow it.
    #[error("the room's disk can't be grown to the size of its device")]
    Grow(#[source] io::Error),
}

/// The mounted disk.
#[derive(Debug)]
pub(crate) struct Disk {
    first_growth: Option<(Child, Socket)>,
    /// The rest of it.
    growth: Option<JoinHandle<io::Result<ExitStatus>>>,
}

/// `EXT4_IOC_RESIZE_FS`, `_IOW('f', 16, __u64)`: blocks that the file system shall have.
const EXT4_IOC_RESIZE_FS: libc::c_ulong = 0x4008_6610;
/// `BLKGETSIZE64`, `_IOR(0x12, 114, size_t)`: bytes.
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
/// The image's block size, bytes (rootfs/scratch/build).
const BLOCK: u64 = 4096;
/// Grown to before anything is written, blocks: 16 GiB.
const FIRST: u64 = (16 << 30) / BLOCK;

/// Mounts `device` at `at` and begins to grow it. Where there is no device, `at` becomes a tmpfs.
///
/// # Errors
///
/// See [`DiskError`].
pub(crate) fn mount_at(device: &Path, at: &Path) -> Result<Disk, DiskError> {
    std::fs::create_dir_all(at).map_err(DiskError::Mount)?;
    let fail = |error: rustix::io::Errno| DiskError::Mount(error.into());
    if !device.exists() {
        mount("tmpfs", at, "tmpfs", MountFlags::NOSUID, c"mode=755").map_err(fail)?;
        return Ok(Disk { first_growth: None, growth: None });
    }
    mount(device, at, "ext4", MountFlags::NOATIME, c"discard,noinit_itable").map_err(fail)?;
    let begin = || -> io::Result<Disk> {
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let child = fork::fork(Separate::default(), || grow(device, at, &writer))?;
        Ok(Disk { first_growth: Some((child, Socket::new(reader)?)), growth: None })
    };
    begin().map_err(DiskError::Grow)
}

impl Disk {
    /// Waits until the disk has its size, or 16 GiB of it.
    ///
    /// # Errors
    ///
    /// The disk stays as small as the image was.
    pub(crate) async fn grown(&mut self) -> Result<(), DiskError> {
        let Some((child, reader)) = self.first_growth.take() else { return Ok(()) };
        let told = reader.read(&mut [0]).await.map_err(DiskError::Grow)?;
        self.growth = Some(spawn_local(child.wait()));
        if told == 1 {
            Ok(())
        } else {
            Err(DiskError::Grow(io::Error::other("EXT4_IOC_RESIZE_FS was refused")))
        }
    }

    /// Waits until nothing grows any more: a snapshot made meanwhile would have each clone grow a disk of its own.
    ///
    /// # Errors
    ///
    /// As [`Disk::grown`].
    pub(crate) async fn settled(&mut self) -> Result<(), DiskError> {
        self.grown().await?;
        if let Some(growth) = &mut self.growth {
            let _ = growth.await;
            self.growth = None;
        }
        Ok(())
    }
}

/// In a child. Says one byte once the first part is there.
fn grow(device: &Path, at: &Path, told: &OwnedFd) -> u8 {
    fork::close_all_but(&[told.as_fd()]);
    let grow = || -> io::Result<()> {
        let blocks = size_of_device(device)? / BLOCK;
        let root = rustix::fs::open(at, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())?;
        resize(&root, blocks.min(FIRST))?;
        rustix::io::write(told, &[1])?;
        if blocks > FIRST {
            resize(&root, blocks)?;
        }
        Ok(())
    };
    u8::from(grow().is_err())
}

fn size_of_device(device: &Path) -> io::Result<u64> {
    let device = rustix::fs::open(device, OFlags::RDONLY, Mode::empty())?;
    let mut bytes = 0_u64;
    // SAFETY: BLKGETSIZE64 writes eight bytes.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), BLKGETSIZE64, &raw mut bytes) };
    if done == 0 { Ok(bytes) } else { Err(io::Error::last_os_error()) }
}

/// A file system that has that size already is left alone by the kernel.
fn resize(root: &OwnedFd, blocks: u64) -> io::Result<()> {
    // SAFETY: EXT4_IOC_RESIZE_FS reads eight bytes.
    let done = unsafe { libc::ioctl(root.as_raw_fd(), EXT4_IOC_RESIZE_FS, &raw const blocks) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
