//! A layer applied to the tree (OCI image-spec, layer.md): entries, whiteouts, opaque directories.
//!
//! Whiteouts hide what lower layers brought, never what their own layer did, in whatever order entries come; so what
//! this layer makes is remembered, as hashes of (parent's inode, name), 8 bytes each. The lowest layer needs no memory.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags, linkat, makedev,
    mkdirat, mknodat, openat, symlinkat, utimensat,
};
use rustix::io::Errno;

use super::archive::{Archive, ArchiveError, Entry, Kind};
use super::blob::Plain;
use super::sparse::Map;
use super::tree::{Directory, LONGEST_PATH, Place, Relative, Tree};
use super::{Budget, CHUNK, UnpackError};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Applies a layer.
///
/// # Errors
///
/// The archive is damaged or hostile, too large, or the file system refuses.
pub(super) fn apply(
    plain: &mut Plain<'_>,
    what: &str,
    lowest: bool,
    tree: &mut Tree,
    budget: &Budget,
) -> Result<(), UnpackError> {
    let mut archive = Archive::new(plain);
    let mut layer =
        Layer { tree, budget, own: (!lowest).then(Own::default), times: Vec::new(), chunk: vec![0; CHUNK] };
    loop {
        let next = archive.next().map_err(|error| match error {
            ArchiveError::Damaged(source) => UnpackError::reading(what, source),
            ArchiveError::Entry(entry, problem) => {
                UnpackError::Entry { entry: super::shown(&entry), problem }
            }
        });
        match next? {
            Some(entry) => layer.entry(&entry, &mut archive, what)?,
            None => return layer.finish(),
        }
    }
}

/// What this layer has made.
#[derive(Default)]
struct Own {
    hashes: HashSet<u64>,
    state: RandomState,
}

impl Own {
    fn hash(&self, place: &Place<'_>) -> u64 {
        self.state.hash_one((place.directory.inode, place.name))
    }
}

struct Layer<'a> {
    tree: &'a mut Tree,
    budget: &'a Budget,
    own: Option<Own>,
    /// Directories' paths, inodes and times, set at the end: what is made inside changes them.
    times: Vec<(Vec<u8>, u64, (i64, u32))>,
    chunk: Vec<u8>,
}

impl Layer<'_> {
    fn entry(
        &mut self,
        entry: &Entry,
        archive: &mut Archive<&mut Plain<'_>>,
        what: &str,
    ) -> Result<(), UnpackError> {
        self.budget.take_entry()?;
        let shown = || super::shown(&entry.path);
        let path =
            Relative::parse(&entry.path).map_err(|problem| UnpackError::Entry { entry: shown(), problem })?;
        let write = |source| UnpackError::Write { entry: shown(), source };
        let Some((parent, name)) = path.split() else {
            return self.root(entry).map_err(write);
        };
        if name.starts_with(WHITEOUT) {
            return match self.tree.find(parent) {
                Ok(Some(directory)) => self.whiteout(directory, name, entry),
                // Where nothing can be, nothing is to be hidden.
                Ok(None) => Ok(()),
                Err(error) if error.kind() == io::ErrorKind::NotADirectory => Ok(()),
                Err(error) => Err(write(error)),
            };
        }
        let directory =
            self.tree.descend(parent, self.budget).map_err(|error| error.of_entry(&entry.path))?;
        let place = Place { directory, name };
        self.make(&place, entry, archive, what)?;
        self.remember(&place);
        Ok(())
    }

    fn root(&mut self, entry: &Entry) -> io::Result<()> {
        if entry.kind != Kind::Directory {
            return Err(Errno::ISDIR.into());
        }
        let root = Place { directory: self.tree.root().clone(), name: b"." };
        dress(&root, entry, None)?;
        self.times.push((Vec::new(), root.directory.inode, entry.mtime));
        Ok(())
    }

    fn remember(&mut self, place: &Place<'_>) {
        if let Some(own) = &mut self.own {
            let hash = own.hash(place);
            own.hashes.insert(hash);
        }
    }

    fn is_own(&self, place: &Place<'_>) -> bool {
        self.own.as_ref().is_none_or(|own| own.hashes.contains(&own.hash(place)))
    }

    fn whiteout(&mut self, directory: Directory, name: &[u8], entry: &Entry) -> Result<(), UnpackError> {
        let write = |source| UnpackError::Write { entry: super::shown(&entry.path), source };
        if name == OPAQUE {
            self.clear(&directory).map_err(write)?;
            self.tree.forget();
            return Ok(());
        }
        let hidden = name.strip_prefix(WHITEOUT).unwrap_or_default();
        // AUFS keeps books under such names.
        if hidden.starts_with(WHITEOUT) {
            return Ok(());
        }
        if hidden.is_empty() || hidden == b"." || hidden == b".." {
            let problem = "is a whiteout of nothing that has a name".into();
            return Err(UnpackError::Entry { entry: super::shown(&entry.path), problem });
        }
        self.hide(&Place { directory, name: hidden }).map_err(write)?;
        self.tree.forget();
        Ok(())
    }

    /// Removes what lower layers have in a directory. Says whether anything is left.
    fn clear(&self, directory: &Directory) -> io::Result<bool> {
        let mut left = false;
        for name in directory.names()? {
            left |= self.hide(&Place { directory: directory.clone(), name: &name })?;
        }
        Ok(left)
    }

    /// Removes what lower layers have at a place. Says whether this layer has something there.
    fn hide(&self, place: &Place<'_>) -> io::Result<bool> {
        let Some(found) = place.look()? else { return Ok(false) };
        let own = self.is_own(place);
        if FileType::from_raw_mode(found.st_mode) == FileType::Directory {
            // A directory of theirs may hold a file of ours, one of ours a file of theirs.
            let left = self.clear(&place.enter()?)? || own;
            if !left {
                place.remove_directory()?;
            }
            return Ok(left);
        }
        if !own {
            place.remove()?;
        }
        Ok(own)
    }

    fn make(
        &mut self,
        place: &Place<'_>,
        entry: &Entry,
        archive: &mut Archive<&mut Plain<'_>>,
        what: &str,
    ) -> Result<(), UnpackError> {
        let write = |source| UnpackError::Write { entry: super::shown(&entry.path), source };
        let found = place.look().map_err(write)?;
        let is_directory =
            found.is_some_and(|found| FileType::from_raw_mode(found.st_mode) == FileType::Directory);
        if found.is_some() && !(is_directory && entry.kind == Kind::Directory) {
            place.remove().map_err(write)?;
            self.tree.forget();
        }
        let (directory, name) = (&*place.directory.fd, place.name);
        let mode = Mode::from_raw_mode(entry.mode & 0o777);
        let mut file = None;
        match &entry.kind {
            Kind::Directory => {
                if !is_directory {
                    mkdirat(directory, name, mode).map_err(|error| write(error.into()))?;
                }
                let inode = place.look().map_err(write)?.map_or(0, |made| made.st_ino);
                self.times.push((entry.path.clone(), inode, entry.mtime));
            }
            Kind::File { map } => {
                let size = map.as_ref().map_or(entry.stored, |map| map.real_size);
                self.budget.expect_bytes(&entry.path, size)?;
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let made = openat(directory, name, flags, mode).map_err(|error| write(error.into()))?;
                self.fill(&made, entry, map.as_ref(), size, archive, what)?;
                file = Some(made);
            }
            Kind::SymbolicLink { target } => {
                if target.is_empty() || target.len() > LONGEST_PATH || target.contains(&0) {
                    let problem = "is a symbolic link to nothing that has a name".into();
                    return Err(UnpackError::Entry { entry: super::shown(&entry.path), problem });
                }
                symlinkat(target.as_slice(), directory, name).map_err(|error| write(error.into()))?;
            }
            Kind::HardLink { target } => return self.link(place, entry, target),
            Kind::CharacterDevice { major, minor } => {
                mknodat(directory, name, FileType::CharacterDevice, mode, makedev(*major, *minor))
                    .map_err(|error| write(error.into()))?;
            }
            Kind::BlockDevice { major, minor } => {
                mknodat(directory, name, FileType::BlockDevice, mode, makedev(*major, *minor))
                    .map_err(|error| write(error.into()))?;
            }
            Kind::Fifo => {
                mknodat(directory, name, FileType::Fifo, mode, 0).map_err(|error| write(error.into()))?;
            }
        }
        dress(place, entry, file.as_ref()).map_err(write)
    }

    fn link(&mut self, place: &Place<'_>, entry: &Entry, target: &[u8]) -> Result<(), UnpackError> {
        let wrong = |problem: String| UnpackError::Entry { entry: super::shown(&entry.path), problem };
        let missing =
            || wrong(format!("is a hard link to '{}', which the image doesn't have", super::shown(target)));
        let write = |source| UnpackError::Write { entry: super::shown(&entry.path), source };
        let target_path = Relative::parse(target).map_err(|problem| {
            wrong(format!("is a hard link to '{}', which {problem}", super::shown(target)))
        })?;
        let (parent, name) = target_path.split().ok_or_else(missing)?;
        let parent = self.tree.find(parent).map_err(write)?.ok_or_else(missing)?;
        match linkat(&*parent.fd, name, &*place.directory.fd, place.name, AtFlags::empty()) {
            Ok(()) => Ok(()),
            Err(Errno::NOENT) => Err(missing()),
            Err(error) => Err(write(error.into())),
        }
    }

    /// An entry's data, holes left out.
    fn fill(
        &mut self,
        file: &OwnedFd,
        entry: &Entry,
        map: Option<&Map>,
        size: u64,
        archive: &mut Archive<&mut Plain<'_>>,
        what: &str,
    ) -> Result<(), UnpackError> {
        let write = |source| UnpackError::Write { entry: super::shown(&entry.path), source };
        let whole = [(0, entry.stored)];
        for &(mut offset, length) in map.map_or(&whole[..], |map| &map.pieces) {
            let end = offset.saturating_add(length);
            while offset < end {
                let most = usize::try_from(end - offset).unwrap_or(usize::MAX).min(self.chunk.len());
                let chunk = self.chunk.get_mut(..most).unwrap_or_default();
                let read = archive.read(chunk).map_err(|source| UnpackError::reading(what, source))?;
                if read == 0 {
                    break;
                }
                let mut left = chunk.get(..read).unwrap_or_default();
                while !left.is_empty() {
                    let written =
                        rustix::io::pwrite(file, left, offset).map_err(|error| write(error.into()))?;
                    offset += u64::try_from(written).unwrap_or_default();
                    left = left.get(written..).unwrap_or_default();
                }
            }
        }
        if map.is_some() {
            self.budget.take_bytes(size.saturating_sub(entry.stored))?;
            rustix::fs::ftruncate(file, size).map_err(|error| write(error.into()))?;
        }
        Ok(())
    }

    /// Directories' times, the deepest first or not: setting a time changes no other.
    fn finish(&mut self) -> Result<(), UnpackError> {
        for (path, inode, mtime) in std::mem::take(&mut self.times) {
            let write = |source| UnpackError::Write { entry: super::shown(&path), source };
            let Ok(relative) = Relative::parse(&path) else { continue };
            // By now something else may be there, or on the way.
            let Some(place) = self.place(&relative) else { continue };
            let same = |found: Stat| {
                FileType::from_raw_mode(found.st_mode) == FileType::Directory && found.st_ino == inode
            };
            if place.look().map_err(write)?.is_some_and(same) {
                set_time(&place, mtime).map_err(|error| write(error.into()))?;
            }
        }
        Ok(())
    }

    /// Where a path leads by now, if its parent is still there.
    fn place<'p>(&mut self, path: &'p Relative) -> Option<Place<'p>> {
        match path.split() {
            None => Some(Place { directory: self.tree.root().clone(), name: b"." }),
            Some((parent, name)) => self.tree.find(parent).ok()?.map(|directory| Place { directory, name }),
        }
    }
}

/// Owner, then mode (chown(2) takes setuid away), then attributes (and capabilities), then time.
fn dress(place: &Place<'_>, entry: &Entry, file: Option<&OwnedFd>) -> io::Result<()> {
    let (directory, name) = (&*place.directory.fd, place.name);
    let is_link = matches!(entry.kind, Kind::SymbolicLink { .. });
    // Of fresh files too: their parent may hand down its group (setgid) or its ACL.
    let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
    rustix::fs::chownat(directory, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    if !is_link {
        let mode = Mode::from_raw_mode(entry.mode);
        match file {
            Some(file) => rustix::fs::fchmod(file, mode)?,
            // It is no link: it was made, or looked at, just now, and nothing else runs here.
            None => rustix::fs::chmodat(directory, name, mode, AtFlags::empty())?,
        }
    }
    for (attribute, value) in &entry.attributes {
        set_attribute(place, is_link, attribute, value)?;
    }
    if entry.kind != Kind::Directory {
        set_time(place, entry.mtime)?;
    }
    Ok(())
}

fn set_attribute(place: &Place<'_>, is_link: bool, name: &[u8], value: &[u8]) -> io::Result<()> {
    match rustix::fs::lsetxattr(place.by_proc(), name, value, XattrFlags::empty()) {
        Ok(()) => Ok(()),
        // A label means nothing here; a link or a device has no attributes of users'.
        Err(Errno::OPNOTSUPP) => Ok(()),
        Err(Errno::PERM) if is_link || name.starts_with(b"user.") => Ok(()),
        Err(Errno::NOSPC) => {
            let problem = format!(
                "its extended attribute '{}' of {} bytes doesn't fit",
                super::shown(name),
                value.len()
            );
            Err(io::Error::new(io::ErrorKind::InvalidInput, problem))
        }
        Err(error) => Err(error.into()),
    }
}

fn set_time(place: &Place<'_>, (seconds, nanoseconds): (i64, u32)) -> Result<(), Errno> {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() };
    let times = Timestamps { last_access: time, last_modification: time };
    utimensat(&*place.directory.fd, place.name, &times, AtFlags::SYMLINK_NOFOLLOW)
}
