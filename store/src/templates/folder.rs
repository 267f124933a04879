//! A folder by its descriptor: what is done to its files goes to this very folder, whatever its path names by now.
//!
//! ```text
//!   path ──open──▶ Folder ── lock ──▶ Held ── still_named? ── rename │ pin │ fill
//!                    └── file(name): read-only, never through a link
//! ```
//!
//! The lock of a folder is flock(2) on the folder itself: it goes with it through renames, and dies with its holder. Whoever gives a folder
//! another name, or takes its name away, holds it; so between `still_named` and the rename nobody else can.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{AtFlags, Dir, Mode, OFlags, openat, unlinkat};
use rustix::io::Errno;

/// An open folder, and the path by which it was opened.
#[derive(Debug)]
pub(super) struct Folder {
    file: File,
    path: PathBuf,
}

/// A folder whose lock we have. Dropped, it is free again.
#[derive(Debug)]
pub(super) struct Held(Folder);

impl Folder {
    /// Opens what is at this path, if there is something.
    pub(super) fn open(path: &Path) -> io::Result<Option<Self>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(file) => Ok(Some(Self { file: file.into(), path: path.to_owned() })),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Opens it, made for its owner alone if there is none.
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        loop {
            match DirBuilder::new().mode(0o700).create(path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                Ok(()) | Err(_) => {}
            }
            // Whoever swept it away between the two calls will not do so for ever.
            if let Some(folder) = Self::open(path)? {
                return Ok(folder);
            }
        }
    }

    /// The path by which it was opened.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// A number that no other folder of the file system has at the same time.
    pub(super) fn inode(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.ino())
    }

    /// Whether its path still names it.
    pub(super) fn still_named(&self) -> io::Result<bool> {
        let ours = self.file.metadata()?;
        match fs::symlink_metadata(&self.path) {
            Ok(there) => Ok((there.dev(), there.ino()) == (ours.dev(), ours.ino())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Waits for its lock. Those who hold one of a finished template rename or pin it, and are done soon.
    pub(super) fn lock(&self) -> io::Result<Held> {
        let held = self.again()?;
        held.file.lock()?;
        Ok(Held(held))
    }

    /// Its lock, if nobody has it.
    pub(super) fn try_lock(&self) -> io::Result<Option<Held>> {
        let held = self.again()?;
        match held.file.try_lock() {
            Ok(()) => Ok(Some(Held(held))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// The same folder, opened once more: a lock belongs to an opening, and threads that share one would share its lock.
    fn again(&self) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let file = openat(&self.file, ".", flags, Mode::empty())?;
        Ok(Self { file: file.into(), path: self.path.clone() })
    }

    /// A file of it, read-only, if it is there. Never through a link, and never waiting for a pipe's other end.
    pub(super) fn file(&self, name: &str) -> io::Result<Option<File>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        match openat(&self.file, name, flags, Mode::empty()) {
            Ok(file) => Ok(Some(file.into())),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// What is in it.
    pub(super) fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.file)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name != "." && name != ".." {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// What its files take of the disk, in bytes.
    pub(super) fn allocated(&self) -> io::Result<u64> {
        let mut sum = 0_u64;
        for name in self.names()? {
            match rustix::fs::statat(&self.file, &*name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => {
                    sum = sum.saturating_add(u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512))
                }
                Err(Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(sum)
    }

    /// When a name in it changed last.
    pub(super) fn modified(&self) -> io::Result<SystemTime> {
        self.file.metadata()?.modified()
    }

    /// Makes its names survive a power cut.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    /// Removes its files, and then what its path names, if that is it. Others may do the same at the same time.
    pub(super) fn remove(&self) -> io::Result<()> {
        self.clear()?;
        match fs::remove_dir(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn clear(&self) -> io::Result<()> {
        for name in self.names()? {
            match unlinkat(&self.file, &*name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl Held {
    /// The folder.
    pub(super) fn folder(&self) -> &Folder {
        &self.0
    }

    /// Gives the folder another path, on the same file system. It must be named by its own until then.
    pub(super) fn rename(&mut self, to: PathBuf) -> io::Result<()> {
        fs::rename(&self.0.path, &to)?;
        self.0.path = to;
        Ok(())
    }

    /// Removes its files: what a dead maker left.
    pub(super) fn clear(&self) -> io::Result<()> {
        self.0.clear()
    }

    /// A new file in it, to read and write, for its owner alone.
    pub(super) fn new_file(&self, name: &str) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(openat(&self.0.file, name, flags, Mode::RUSR | Mode::WUSR)?.into())
    }

    /// Gives a file of it another name in it.
    pub(super) fn rename_file(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(rustix::fs::renameat(&self.0.file, from, &self.0.file, to)?)
    }

    /// Removes a file of it, if it is there.
    pub(super) fn remove_file(&self, name: &str) -> io::Result<()> {
        match unlinkat(&self.0.file, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
