//! A root to unpack into, a tree beside it that nothing may touch, and what can be said about both afterwards.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use carrel_protocol::agent::{Blob, Compression, Layer, Stream, Token, UnpackLimits};
use rustix::process::Resource;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::super::tree::{Links, Tree};
use super::super::{Budget, UnpackError, unpack_layer, zipped};

pub(super) const AMPLE: UnpackLimits = UnpackLimits { bytes: 64 << 20, entries: 100_000 };

/// What is somewhere: type and permissions, links, and content or target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) mode: u32,
    pub(super) owner: (u32, u32),
    pub(super) inode: u64,
    pub(super) size: u64,
    pub(super) mtime: i64,
    pub(super) content: Vec<u8>,
}

pub(super) struct Bed {
    folder: TempDir,
    before: BTreeMap<PathBuf, Found>,
}

impl Bed {
    pub(super) fn new() -> Self {
        let folder = TempDir::new().unwrap();
        fs::create_dir(folder.path().join("rootfs")).unwrap();
        fs::set_permissions(folder.path().join("rootfs"), fs::Permissions::from_mode(0o755)).unwrap();
        let beside = folder.path().join("beside");
        fs::create_dir(&beside).unwrap();
        fs::write(beside.join("secret"), "don't touch").unwrap();
        fs::create_dir(beside.join("empty")).unwrap();
        symlink("secret", beside.join("link")).unwrap();
        let before = listing(&beside);
        Self { folder, before }
    }

    pub(super) fn root(&self) -> PathBuf {
        self.folder.path().join("rootfs")
    }

    pub(super) fn beside(&self) -> PathBuf {
        self.folder.path().join("beside")
    }

    pub(super) fn at(&self, path: &str) -> PathBuf {
        self.root().join(path)
    }

    /// Applies plain layers, lowest first.
    pub(super) fn apply(&self, layers: &[Vec<u8>]) -> Result<(), UnpackError> {
        self.apply_within(AMPLE, layers).map(drop)
    }

    /// Returns the bytes and entries that were counted.
    pub(super) fn apply_within(
        &self,
        limits: UnpackLimits,
        layers: &[Vec<u8>],
    ) -> Result<(u64, u64), UnpackError> {
        let layers: Vec<_> =
            layers.iter().map(|tar| (described(Compression::None, tar, tar), tar.clone())).collect();
        self.apply_described(limits, &layers)
    }

    pub(super) fn apply_described(
        &self,
        limits: UnpackLimits,
        layers: &[(Layer, Vec<u8>)],
    ) -> Result<(u64, u64), UnpackError> {
        let mut tree = Tree::open(&self.root(), Links::InsideRoot).unwrap();
        let budget = Budget::new(limits);
        let done = layers.iter().enumerate().try_for_each(|(number, (layer, sent))| {
            unpack_layer(sent.as_slice(), layer, number == 0, &mut tree, &budget)
        });
        self.nothing_outside_changed();
        done.map(|()| (budget.bytes.get(), budget.entries.get()))
    }

    pub(super) fn unzip(&self, limits: UnpackLimits, zip: &[u8]) -> Result<(u64, u64), UnpackError> {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, zip).unwrap();
        let mut tree = Tree::open(&self.root(), Links::Refused).unwrap();
        let budget = Budget::new(limits);
        let done = zipped::unpack(file, &mut tree, &budget);
        self.nothing_outside_changed();
        done.map(|()| (budget.bytes.get(), budget.entries.get()))
    }

    pub(super) fn nothing_outside_changed(&self) {
        assert_eq!(listing(&self.beside()), self.before);
        let mut names: Vec<_> =
            fs::read_dir(self.folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["beside", "rootfs"]);
    }

    /// All below the root, by relative path.
    pub(super) fn tree(&self) -> BTreeMap<PathBuf, Found> {
        listing(&self.root())
    }

    /// The same of any directory.
    pub(super) fn of(folder: &Path) -> BTreeMap<PathBuf, Found> {
        listing(folder)
    }

    /// Relative paths below the root.
    pub(super) fn names(&self) -> Vec<String> {
        self.tree().into_keys().map(|path| path.to_str().unwrap().to_owned()).collect()
    }

    pub(super) fn text(&self, path: &str) -> String {
        fs::read_to_string(self.at(path)).unwrap()
    }

    pub(super) fn stat(&self, path: &str) -> Metadata {
        fs::symlink_metadata(self.at(path)).unwrap()
    }

    pub(super) fn attribute(&self, path: &str, name: &str) -> Option<Vec<u8>> {
        let mut value = vec![0; 64 << 10];
        let length = rustix::fs::lgetxattr(self.at(path), name, value.as_mut_slice()).ok()?;
        value.truncate(length);
        Some(value)
    }
}

fn listing(root: &Path) -> BTreeMap<PathBuf, Found> {
    let mut all = BTreeMap::new();
    let mut left = vec![root.to_owned()];
    while let Some(folder) = left.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let stat = fs::symlink_metadata(&path).unwrap();
            let kind = stat.file_type();
            let content = if kind.is_symlink() {
                fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec()
            } else if kind.is_file() && stat.len() <= 1 << 20 {
                fs::read(&path).unwrap()
            } else {
                Vec::new()
            };
            if kind.is_dir() {
                left.push(path.clone());
            }
            let found = Found {
                mode: stat.mode(),
                owner: (stat.uid(), stat.gid()),
                inode: stat.ino(),
                size: if kind.is_file() { stat.len() } else { 0 },
                mtime: stat.mtime(),
                content,
            };
            all.insert(path.strip_prefix(root).unwrap().to_owned(), found);
        }
    }
    all
}

/// As the process that unpacks has them: one for each component of a path.
pub(super) fn with_many_descriptors() {
    let mut limit = rustix::process::getrlimit(Resource::Nofile);
    limit.current = limit.maximum.map_or(Some(8192), |maximum| Some(maximum.min(8192)));
    rustix::process::setrlimit(Resource::Nofile, limit).unwrap();
}

pub(super) fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    format!("sha256:{}", digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
}

/// A layer as an honest host describes it.
pub(super) fn described(compression: Compression, sent: &[u8], plain: &[u8]) -> Layer {
    let blob = Blob {
        digest: sha256(sent),
        size: sent.len().try_into().unwrap(),
        stream: Stream { port: 0, token: Token([0; 16]) },
    };
    Layer { compression, blob, diff_id: sha256(plain) }
}

/// The error's whole text, as the host is told it.
pub(super) fn said<T: std::fmt::Debug>(result: Result<T, UnpackError>) -> String {
    carrel_protocol::chain(&result.unwrap_err())
}
