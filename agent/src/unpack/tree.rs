//! The directory tree that payloads are unpacked into. Every operation starts from a descriptor of its root and names one
//! component below a parent that was opened with openat2(2): nothing that an archive says leads outside.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use super::{Budget, UnpackError};

/// What happens at symbolic links on the way to an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Links {
    /// Followed, with the tree's root as `/`: an image may have `/var/run → /run`.
    InsideRoot,
    /// An error: no honest zip has entries below its own links.
    Refused,
}

/// Longest path, bytes (PATH_MAX less its zero), and with it the deepest: about 2,000 components.
pub(super) const LONGEST_PATH: usize = 4095;
/// As the kernel's MAXSYMLINKS.
const MOST_LINKS: u32 = 40;
/// How often openat2(2) is asked again.
const MOST_TRIES: u32 = 1000;
const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
const NO_FOLLOW: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// An open directory of the tree.
#[derive(Clone, Debug)]
pub(super) struct Directory {
    pub(super) fd: Rc<OwnedFd>,
    /// What tells it from all others of the tree.
    pub(super) inode: u64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Tree {
    root: Directory,
    links: Links,
    /// The last parent: archives go directory by directory.
    last: Option<(Vec<u8>, Directory)>,
}

/// An entry's place.
#[derive(Debug)]
pub(super) struct Place<'a> {
    pub(super) directory: Directory,
    pub(super) name: &'a [u8],
}

/// A path of an archive, relative to the root: no empty components, no `.`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Relative(Vec<u8>);

impl Relative {
    /// Absolute names are taken as relative to the root, as every unpacker does.
    ///
    /// # Errors
    ///
    /// `..`, a zero byte, or too long: a predicate of the entry.
    pub(super) fn parse(path: &[u8]) -> Result<Self, String> {
        if path.len() > LONGEST_PATH {
            return Err(format!("has a name of {} bytes; {LONGEST_PATH} are the most", path.len()));
        }
        if path.contains(&0) {
            return Err("has a zero byte in its name".into());
        }
        let parts: Vec<&[u8]> = components(path).collect();
        if parts.contains(&b"..".as_slice()) {
            return Err("would escape by '..' in its name".into());
        }
        Ok(Self(parts.join(&b'/')))
    }

    /// The parent's path and the last component; `None` for the root itself.
    pub(super) fn split(&self) -> Option<(&[u8], &[u8])> {
        if self.0.is_empty() {
            return None;
        }
        Some(match self.0.iter().rposition(|&byte| byte == b'/') {
            Some(slash) => (self.0.get(..slash)?, self.0.get(slash + 1..)?),
            None => (&[], &self.0),
        })
    }
}

fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|&byte| byte == b'/').filter(|part| !part.is_empty() && *part != b".")
}

impl Tree {
    /// Opens an existing directory as the root.
    pub(super) fn open(root: &Path, links: Links) -> io::Result<Self> {
        let root =
            Directory::new(rustix::fs::openat(CWD, root, DIRECTORY | OFlags::NOFOLLOW, Mode::empty())?)?;
        Ok(Self::from_directory(root, links))
    }

    pub(super) fn from_directory(root: Directory, links: Links) -> Self {
        Self { root, links, last: None }
    }

    pub(super) fn root(&self) -> &Directory {
        &self.root
    }

    /// What was removed may have been on the way to the last parent.
    pub(super) fn forget(&mut self) {
        self.last = None;
    }

    /// Opens a directory if it is there.
    pub(super) fn find(&mut self, path: &[u8]) -> io::Result<Option<Directory>> {
        if path.is_empty() {
            return Ok(Some(self.root.clone()));
        }
        if let Some((_, directory)) = self.last.as_ref().filter(|(last, _)| last == path) {
            return Ok(Some(directory.clone()));
        }
        let resolve = match self.links {
            Links::InsideRoot => ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
            Links::Refused => ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
        };
        let resolve = resolve | ResolveFlags::NO_XDEV;
        let open = || rustix::fs::openat2(&*self.root.fd, path, DIRECTORY, Mode::empty(), resolve);
        // "EAGAIN: the kernel could not ensure that a '..' component didn't escape": something, anywhere, was being renamed.
        let mut opened = open();
        for _ in 0..MOST_TRIES {
            match opened {
                Err(Errno::AGAIN) => opened = open(),
                Ok(_) | Err(_) => break,
            }
        }
        match opened {
            Ok(fd) => {
                let directory = Directory::new(fd)?;
                self.last = Some((path.to_vec(), directory.clone()));
                Ok(Some(directory))
            }
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Opens a directory; makes it, and what is above it, with mode 0755 where it isn't there.
    pub(super) fn descend(&mut self, path: &[u8], budget: &Budget) -> Result<Directory, UnpackError> {
        let fail = |source| UnpackError::Write { entry: super::shown(path), source };
        let relative = Relative::parse(path)
            .map_err(|problem| UnpackError::Entry { entry: super::shown(path), problem })?;
        if let Some(found) = self.find(&relative.0).map_err(fail)? {
            return Ok(found);
        }
        let made = self.walk(&relative.0, budget).map_err(|error| match error {
            Walk::Io(source) => fail(source),
            Walk::Budget(error) => error,
        })?;
        self.last = Some((relative.0, made.clone()));
        Ok(made)
    }

    /// Component by component, as the kernel would with the root as `/`, but making what is missing.
    fn walk(&self, path: &[u8], budget: &Budget) -> Result<Directory, Walk> {
        let mut way = vec![self.root.clone()];
        let mut left: VecDeque<Vec<u8>> = components(path).map(<[u8]>::to_vec).collect();
        let mut followed = 0;
        while let Some(part) = left.pop_front() {
            if part == b".." {
                if way.len() > 1 {
                    way.pop();
                }
                continue;
            }
            let Some(here) = way.last() else { break };
            let open = || rustix::fs::openat(&*here.fd, &*part, NO_FOLLOW, Mode::empty());
            let next = match open() {
                Err(Errno::NOENT) => {
                    budget.take_entry().map_err(Walk::Budget)?;
                    rustix::fs::mkdirat(&*here.fd, &*part, Mode::from_raw_mode(0o755))?;
                    open()?
                }
                other => other?,
            };
            match FileType::from_raw_mode(rustix::fs::fstat(&next)?.st_mode) {
                FileType::Directory => way.push(Directory::new(next)?),
                FileType::Symlink if self.links == Links::InsideRoot && followed < MOST_LINKS => {
                    followed += 1;
                    let target = rustix::fs::readlinkat(&next, c"", Vec::new())?.into_bytes();
                    if target.starts_with(b"/") {
                        way.truncate(1);
                    }
                    for part in components(&target).collect::<Vec<_>>().into_iter().rev() {
                        left.push_front(part.to_vec());
                    }
                }
                FileType::Symlink => return Err(Errno::LOOP.into()),
                FileType::RegularFile
                | FileType::Fifo
                | FileType::Socket
                | FileType::CharacterDevice
                | FileType::BlockDevice
                | FileType::Unknown => return Err(Errno::NOTDIR.into()),
            }
        }
        way.pop().ok_or_else(|| Errno::NOENT.into())
    }
}

enum Walk {
    Io(io::Error),
    Budget(UnpackError),
}

impl From<Errno> for Walk {
    fn from(error: Errno) -> Self {
        Self::Io(error.into())
    }
}

impl From<io::Error> for Walk {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl Directory {
    fn new(fd: OwnedFd) -> io::Result<Self> {
        let inode = rustix::fs::fstat(&fd)?.st_ino;
        Ok(Self { fd: fd.into(), inode })
    }

    /// Names of what is in it.
    pub(super) fn names(&self) -> io::Result<Vec<Vec<u8>>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let readable = rustix::fs::openat(&*self.fd, c".", flags, Mode::empty())?;
        let mut names = Vec::new();
        for entry in Dir::new(readable)? {
            let name = entry?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                names.push(name);
            }
        }
        Ok(names)
    }
}

impl Place<'_> {
    /// What is there, not following a link.
    pub(super) fn look(&self) -> io::Result<Option<Stat>> {
        match rustix::fs::statat(&*self.directory.fd, self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) => Ok(Some(found)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The directory that is there.
    pub(super) fn enter(&self) -> io::Result<Directory> {
        let fd =
            rustix::fs::openat(&*self.directory.fd, self.name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty())?;
        Directory::new(fd)
    }

    /// Removes what is there, with all that is in it. That there is nothing is no error.
    pub(super) fn remove(&self) -> io::Result<()> {
        match rustix::fs::unlinkat(&*self.directory.fd, self.name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::ISDIR | Errno::PERM) => {}
            Err(error) => return Err(error.into()),
        }
        let directory = self.enter()?;
        for name in directory.names()? {
            Place { directory: directory.clone(), name: &name }.remove()?;
        }
        self.remove_directory()
    }

    /// Removes an empty directory.
    pub(super) fn remove_directory(&self) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&*self.directory.fd, self.name, AtFlags::REMOVEDIR)?)
    }

    /// A path by which system calls that take no descriptor (lsetxattr(2)) reach it: the magic link is the parent's own.
    pub(super) fn by_proc(&self) -> Vec<u8> {
        let mut path = format!("/proc/self/fd/{}/", self.directory.fd.as_fd().as_raw_fd()).into_bytes();
        path.extend_from_slice(self.name);
        path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_made_relative_and_nothing_climbs() {
        let parsed = |path: &[u8]| Relative::parse(path).unwrap().0;
        assert_eq!(parsed(b"./a//b/./c/"), b"a/b/c");
        assert_eq!(parsed(b"/etc/passwd"), b"etc/passwd");
        assert_eq!(Relative::parse(b"././").unwrap().split(), None);
        assert_eq!(Relative::parse(b"a").unwrap().split(), Some((&b""[..], &b"a"[..])));
        assert_eq!(Relative::parse(b"a/b/c").unwrap().split(), Some((&b"a/b"[..], &b"c"[..])));
        for wrong in [&b".."[..], b"../a", b"a/../../b", b"/..", b"a/..", b"a\0b", &[b'a'; LONGEST_PATH + 1]]
        {
            Relative::parse(wrong).unwrap_err();
        }
    }
}
