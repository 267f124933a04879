//! What a layer is to hold: paths in the room, each with what it is and where its content is on this host. Nothing is read yet but names and sizes.
//!
//! A path of the host's is the same path in the room: links on the way to it come along as links (`/lib64` → `usr/lib64`), so that whoever
//! follows them there finds what he finds here.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use crate::spec::MOST_ENTRIES;

/// As the kernel (path_resolution(7)).
const MOST_LINKS: u32 = 40;

/// Whose a file is in the room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// Root's: whatever is not the caller's own.
    Root,
    /// The user's as whom the program runs.
    User,
}

/// One path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Node {
    /// A directory.
    Directory {
        /// Permission bits.
        mode: u32,
        /// Whose.
        owner: Owner,
    },
    /// A symbolic link.
    Link {
        /// To where, as it stands.
        target: PathBuf,
    },
    /// A regular file of this host's.
    File(HostFile),
    /// A regular file that carrel writes.
    Text {
        /// Its content.
        content: String,
        /// Permission bits.
        mode: u32,
    },
}

/// A file as it was when it was looked at. What can change its content changes one of these (but for a write within the clock's tick; see
/// [`HostFile::is_settled`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostFile {
    /// Where.
    pub(crate) source: PathBuf,
    /// Permission bits.
    pub(crate) mode: u32,
    /// Whose.
    pub(crate) owner: Owner,
    /// Bytes.
    pub(crate) size: u64,
    /// Seconds and nanoseconds.
    pub(crate) mtime: (i64, i64),
    /// Seconds and nanoseconds: the kernel's own, which nobody can set back.
    pub(crate) ctime: (i64, i64),
    /// Device and inode.
    pub(crate) identity: (u64, u64),
}

impl HostFile {
    pub(crate) fn new(source: PathBuf, metadata: &Metadata, owner: Owner) -> Self {
        Self {
            source,
            mode: metadata.mode() & 0o7777,
            owner,
            size: metadata.size(),
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
            ctime: (metadata.ctime(), metadata.ctime_nsec()),
            identity: (metadata.dev(), metadata.ino()),
        }
    }

    /// Whether a later write must show in its times: it was changed before the tick of the clock that file systems take them from.
    pub(crate) fn is_settled(&self, now: (i64, i64)) -> bool {
        const TICK_NS: i64 = 20_000_000;
        let nanoseconds = |(s, ns): (i64, i64)| s.saturating_mul(1_000_000_000).saturating_add(ns);
        nanoseconds(self.ctime).saturating_add(TICK_NS) < nanoseconds(now)
    }

    /// Whether the file is still the one that was looked at.
    pub(crate) fn is_still(&self, metadata: &Metadata) -> bool {
        let now = Self::new(self.source.clone(), metadata, self.owner);
        *self == now
    }
}

/// Paths in the room, absolute, without links but for the last part.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tree {
    nodes: BTreeMap<PathBuf, Node>,
    /// What could not be taken along, and why.
    pub(crate) left_out: Vec<(PathBuf, String)>,
}

/// What a walk does not go into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Skip {
    /// Everything comes along.
    Nothing,
    /// What can be made again: `.git`, and folders with a `CACHEDIR.TAG`, as Cargo's `target`.
    Caches,
    /// Folders of these names, directly below.
    Named(&'static [&'static str]),
}

impl Tree {
    pub(crate) fn nodes(&self) -> impl Iterator<Item = (&Path, &Node)> {
        self.nodes.iter().map(|(path, node)| (path.as_path(), node))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    pub(crate) fn text(&mut self, path: &str, content: String) {
        self.nodes.insert(path.into(), Node::Text { content, mode: 0o644 });
    }

    pub(crate) fn directory(&mut self, path: impl Into<PathBuf>, mode: u32, owner: Owner) {
        self.nodes.insert(path.into(), Node::Directory { mode, owner });
    }

    /// Takes along what is at this path of the host's: a file, or a directory with all that is below, and the links on the way. Returns where it
    /// really is.
    pub(crate) fn add(&mut self, path: &Path, skip: Skip) -> io::Result<PathBuf> {
        let real = self.follow(path)?;
        self.place(&real, &real, skip)?;
        Ok(real)
    }

    /// Takes along what is at this path, at another one in the room.
    pub(crate) fn add_at(&mut self, path: &Path, at: &Path, skip: Skip) -> io::Result<()> {
        let real = fs::canonicalize(path)?;
        self.place(&real, &normal(at), skip)
    }

    /// Walks a path as the kernel does, and notes each link.
    fn follow(&mut self, path: &Path) -> io::Result<PathBuf> {
        let mut left: VecDeque<OsString> = parts(path);
        let mut here = PathBuf::from("/");
        let mut links = 0;
        while let Some(part) = left.pop_front() {
            if part == ".." {
                here.pop();
                continue;
            }
            let next = here.join(&part);
            if !fs::symlink_metadata(&next)?.is_symlink() {
                here = next;
                continue;
            }
            links += 1;
            if links > MOST_LINKS {
                return Err(rustix::io::Errno::LOOP.into());
            }
            let target = fs::read_link(&next)?;
            if target.is_absolute() {
                here = PathBuf::from("/");
            }
            for part in parts(&target).into_iter().rev() {
                left.push_front(part);
            }
            self.nodes.insert(next, Node::Link { target });
        }
        Ok(here)
    }

    fn place(&mut self, source: &Path, at: &Path, skip: Skip) -> io::Result<()> {
        let metadata = fs::symlink_metadata(source)?;
        if metadata.is_file() {
            let file = HostFile::new(source.to_owned(), &metadata, owner(&metadata));
            self.nodes.insert(at.to_owned(), Node::File(file));
            return Ok(());
        }
        if !metadata.is_dir() {
            return Err(io::Error::other("it is neither a file nor a directory"));
        }
        let mut folders = vec![(source.to_owned(), at.to_owned(), metadata)];
        let top = source;
        while let Some((source, at, metadata)) = folders.pop() {
            let node = Node::Directory { mode: metadata.mode() & 0o7777, owner: owner(&metadata) };
            if at != Path::new("/") {
                self.nodes.insert(at.clone(), node);
            }
            let entries = match fs::read_dir(&source) {
                Ok(entries) => entries,
                Err(error) => {
                    self.left_out.push((source, error.to_string()));
                    continue;
                }
            };
            for entry in entries {
                let entry = entry?;
                let (from, to) = (entry.path(), at.join(entry.file_name()));
                if let Skip::Named(names) = skip
                    && source == top
                    && entry.file_name().to_str().is_some_and(|name| names.contains(&name))
                {
                    continue;
                }
                let metadata = match fs::symlink_metadata(&from) {
                    Ok(metadata) => metadata,
                    // Gone meanwhile.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    Err(error) => return Err(error),
                };
                self.entry(from, to, metadata, skip, &mut folders)?;
            }
        }
        Ok(())
    }

    fn entry(
        &mut self,
        from: PathBuf,
        to: PathBuf,
        metadata: Metadata,
        skip: Skip,
        folders: &mut Vec<(PathBuf, PathBuf, Metadata)>,
    ) -> io::Result<()> {
        if u64::try_from(self.nodes.len()).unwrap_or(u64::MAX) >= MOST_ENTRIES {
            return Err(io::Error::other(format!(
                "it has more than {MOST_ENTRIES} files, the most that a room takes"
            )));
        }
        // In a layer this means that something is not there (OCI image-spec, layer.md, *Whiteouts*).
        if to.file_name().is_some_and(|name| name.as_bytes().starts_with(b".wh.")) {
            self.left_out.push((from, "a layer can't hold such a name".into()));
        } else if metadata.is_dir() {
            if skip == Skip::Caches && is_cache(&from) {
                return Ok(());
            }
            folders.push((from, to, metadata));
        } else if metadata.is_file() {
            let owner = owner(&metadata);
            self.nodes.insert(to, Node::File(HostFile::new(from, &metadata, owner)));
        } else if metadata.is_symlink() {
            let target = fs::read_link(&from)?;
            self.nodes.insert(to, Node::Link { target });
        }
        // Sockets, pipes and devices are nobody's content.
        Ok(())
    }

    /// Takes along the files to which this tree's links lead out of it: one step of each, so that a link is no way to take a whole disk along.
    pub(crate) fn follow_links(&mut self) {
        let out = |(path, node): (&PathBuf, &Node)| match node {
            Node::Link { .. } if path.exists() && path.is_file() => Some(path.clone()),
            Node::Link { .. } | Node::Directory { .. } | Node::File(_) | Node::Text { .. } => None,
        };
        let links: Vec<PathBuf> = self.nodes.iter().filter_map(out).collect();
        for link in links {
            // What can't be had is a link to nothing, as for anybody else.
            let _ = self.add(&link, Skip::Nothing);
        }
    }
}

fn owner(metadata: &Metadata) -> Owner {
    let caller = rustix::process::geteuid();
    if !caller.is_root() && metadata.uid() == caller.as_raw() { Owner::User } else { Owner::Root }
}

/// <https://bford.info/cachedir/>: what is below can be made again, and no archive should have it.
fn is_cache(folder: &Path) -> bool {
    const SIGNATURE: &[u8] = b"Signature: 8a477f597d28d172789f06886806bc55";
    if folder.file_name().is_some_and(|name| name == ".git") {
        return true;
    }
    let mut begins = [0; SIGNATURE.len()];
    let read = fs::File::open(folder.join("CACHEDIR.TAG"))
        .and_then(|mut tag| io::Read::read_exact(&mut tag, &mut begins));
    read.is_ok() && begins == SIGNATURE
}

fn parts(path: &Path) -> VecDeque<OsString> {
    let part = |component: Component<'_>| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsString::from_vec(b"..".to_vec())),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    };
    path.components().filter_map(part).collect()
}

/// An absolute path without `.` and `..`.
pub(crate) fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::from("/");
    for part in parts(path) {
        if part == ".." {
            normal.pop();
        } else {
            normal.push(part);
        }
    }
    normal
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn paths(tree: &Tree, below: &Path) -> Vec<String> {
        let shown = |path: &Path| path.strip_prefix(below).unwrap_or(path).to_str().unwrap().to_owned();
        tree.nodes().map(|(path, _)| shown(path)).collect()
    }

    #[test]
    fn links_on_the_way_come_along_as_links() {
        let folder = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(folder.path()).unwrap();
        fs::create_dir_all(root.join("usr/lib")).unwrap();
        fs::write(root.join("usr/lib/libx.so.1.2"), "x").unwrap();
        symlink("usr/lib", root.join("lib")).unwrap();
        symlink("libx.so.1.2", root.join("usr/lib/libx.so.1")).unwrap();
        symlink(root.join("lib/../lib/libx.so.1"), root.join("absolute")).unwrap();
        let mut tree = Tree::default();
        let real = tree.add(&root.join("absolute"), Skip::Nothing).unwrap();
        assert_eq!(real, root.join("usr/lib/libx.so.1.2"));
        assert_eq!(paths(&tree, &root), ["absolute", "lib", "usr/lib/libx.so.1", "usr/lib/libx.so.1.2"]);
        symlink("loop", root.join("loop")).unwrap();
        assert!(tree.add(&root.join("loop"), Skip::Nothing).is_err());
        assert!(tree.add(&root.join("missing"), Skip::Nothing).is_err());
    }

    #[test]
    fn a_package_comes_without_what_can_be_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(folder.path()).unwrap();
        for path in ["src", "target/debug", ".git/objects", "empty"] {
            fs::create_dir_all(root.join(path)).unwrap();
        }
        let tag = "Signature: 8a477f597d28d172789f06886806bc55\n# made by a tool";
        for (path, text) in
            [("target/CACHEDIR.TAG", tag), ("src/lib.rs", ""), ("src/.wh.x", ""), (".git/HEAD", "")]
        {
            fs::write(root.join(path), text).unwrap();
        }
        rustix::fs::mknodat(
            rustix::fs::CWD,
            root.join("pipe"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .unwrap();
        let mut tree = Tree::default();
        tree.add_at(&root, Path::new("/work/../pkg"), Skip::Caches).unwrap();
        assert_eq!(paths(&tree, Path::new("/pkg")), ["", "empty", "src", "src/lib.rs"]);
        assert_eq!(tree.left_out.len(), 1);
        let mut all = Tree::default();
        all.add_at(&root, Path::new("/"), Skip::Nothing).unwrap();
        assert!(paths(&all, Path::new("/")).contains(&"target/debug".to_owned()));
    }

    #[test]
    fn files_outside_that_links_lead_to_come_along() {
        let folder = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(folder.path()).unwrap();
        fs::create_dir_all(root.join("package")).unwrap();
        fs::write(root.join("LICENSE"), "text").unwrap();
        symlink("../LICENSE", root.join("package/LICENSE")).unwrap();
        symlink("/usr", root.join("package/everything")).unwrap();
        let mut tree = Tree::default();
        tree.add(&root.join("package"), Skip::Caches).unwrap();
        tree.follow_links();
        assert_eq!(paths(&tree, &root), ["LICENSE", "package", "package/LICENSE", "package/everything"]);
    }

    #[test]
    fn a_file_that_was_written_to_a_moment_ago_is_not_settled() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "x").unwrap();
        let metadata = fs::metadata(&path).unwrap();
        let file = HostFile::new(path.clone(), &metadata, Owner::Root);
        let (s, ns) = file.ctime;
        assert!(!file.is_settled((s, ns)) && !file.is_settled((s, ns + 19_000_000)));
        assert!(file.is_settled((s + 1, ns)));
        assert!(file.is_still(&metadata));
        fs::write(&path, "longer").unwrap();
        assert!(!file.is_still(&fs::metadata(&path).unwrap()));
    }
}
