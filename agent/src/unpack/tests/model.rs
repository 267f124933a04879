//! Sequences of honest layers, against a model in memory that is written from image-spec's layer.md and not from the code: a layer's
//! whiteouts are applied to what is below it, all of them first; then come its entries, in order.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use proptest::collection::vec;
use proptest::prelude::*;

use super::bed::Bed;
use super::tarball::{Member, tar};

#[derive(Clone, Debug)]
enum Change {
    File(PathBuf, Vec<u8>, u32),
    Directory(PathBuf, u32),
    Symlink(PathBuf, String),
    HardLink(PathBuf, PathBuf),
    Whiteout(PathBuf),
    Opaque(PathBuf),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Node {
    /// Its mode, if an entry ever named it.
    Directory(Option<u32>),
    /// Which file, mode, content.
    File(usize, u32, Vec<u8>),
    Symlink(usize, String),
}

#[derive(Clone, Debug, Default)]
struct Model {
    nodes: BTreeMap<PathBuf, Node>,
    made: usize,
}

impl Model {
    fn is_directory(&self, path: &Path) -> bool {
        matches!(self.nodes.get(path), Some(Node::Directory(_)))
    }

    fn remove(&mut self, path: &Path) {
        self.nodes.retain(|other, _| !other.starts_with(path));
    }

    fn below(&mut self, path: &Path) {
        self.nodes.retain(|other, _| other == path || !other.starts_with(path));
    }

    /// Whether an entry can be made here without going through a file or a link.
    fn reaches(&self, path: &Path) -> bool {
        parents(path).all(|parent| !self.nodes.contains_key(parent) || self.is_directory(parent))
    }

    fn allows(&self, change: &Change) -> bool {
        match change {
            Change::File(path, ..) | Change::Directory(path, _) | Change::Symlink(path, _) => {
                self.reaches(path)
            }
            Change::HardLink(path, target) => {
                self.reaches(path)
                    && self.reaches(target)
                    && self.nodes.contains_key(target)
                    && !self.is_directory(target)
                    && !target.starts_with(path)
            }
            Change::Whiteout(_) | Change::Opaque(_) => false,
        }
    }

    fn make(&mut self, change: &Change) {
        let (path, node) = match change {
            Change::File(path, content, mode) => (path, Node::File(self.made, *mode, content.clone())),
            Change::Directory(path, mode) => (path, Node::Directory(Some(*mode))),
            Change::Symlink(path, target) => (path, Node::Symlink(self.made, target.clone())),
            Change::HardLink(path, target) => (path, self.nodes[target].clone()),
            Change::Whiteout(_) | Change::Opaque(_) => return,
        };
        self.made += 1;
        for parent in parents(path) {
            self.nodes.entry(parent.to_owned()).or_insert(Node::Directory(None));
        }
        if !(self.is_directory(path) && matches!(node, Node::Directory(_))) {
            self.remove(path);
        }
        self.nodes.insert(path.clone(), node);
    }

    fn hide(&mut self, change: &Change) {
        if let Change::Whiteout(path) = change
            && self.reaches(path)
        {
            self.remove(path);
        }
        if let Change::Opaque(path) = change
            && self.reaches(path)
            && (self.is_directory(path) || path == Path::new(""))
        {
            self.below(path);
        }
    }

    /// Applies a layer. Returns what of it was honest, in its order: no entry goes through a file, and no way leads over a link.
    fn apply(&mut self, layer: &[Change]) -> Vec<Change> {
        let mut unhidden = self.clone();
        let links: BTreeSet<&Path> = layer
            .iter()
            .filter_map(|change| match change {
                Change::Symlink(path, _) | Change::HardLink(path, _) => Some(&**path),
                Change::File(..) | Change::Directory(..) | Change::Whiteout(_) | Change::Opaque(_) => None,
            })
            .collect();
        let over_link = |model: &Self, path: &Path| {
            path.ancestors()
                .any(|at| links.contains(at) || matches!(model.nodes.get(at), Some(Node::Symlink(..))))
        };
        let mut kept: Vec<Option<Change>> = layer.iter().cloned().map(Some).collect();
        for (change, kept) in layer.iter().zip(&mut kept) {
            if let Change::Whiteout(path) | Change::Opaque(path) = change {
                let way = if matches!(change, Change::Opaque(_)) { Some(&**path) } else { path.parent() };
                if way.is_some_and(|way| over_link(&unhidden, way)) {
                    *kept = None;
                } else {
                    self.hide(change);
                }
            }
        }
        for (change, kept) in layer.iter().zip(&mut kept) {
            if matches!(change, Change::Whiteout(_) | Change::Opaque(_)) {
                continue;
            }
            // An entry may come before the whiteout that clears its way.
            if self.allows(change) && unhidden.allows(change) {
                self.make(change);
                unhidden.make(change);
            } else {
                *kept = None;
            }
        }
        kept.into_iter().flatten().collect()
    }
}

/// The nearest first, without the root.
fn parents(path: &Path) -> impl Iterator<Item = &Path> {
    path.ancestors().skip(1).filter(|parent| *parent != Path::new(""))
}

fn member(change: &Change) -> Member {
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    match change {
        Change::File(path, content, mode) => Member::file(text(path), content).mode(*mode),
        Change::Directory(path, mode) => Member::directory(text(path)).mode(*mode),
        Change::Symlink(path, target) => Member::symlink(text(path), target),
        Change::HardLink(path, target) => Member::hard_link(text(path), text(target)),
        Change::Whiteout(path) => {
            let name = format!(".wh.{}", path.file_name().unwrap().to_str().unwrap());
            Member::file(text(&path.with_file_name(name)), "")
        }
        Change::Opaque(path) => Member::file(text(&path.join(".wh..wh..opq")), ""),
    }
}

fn path() -> impl Strategy<Value = PathBuf> {
    vec(prop::sample::select(&["a", "b", "c"][..]), 1..4).prop_map(|parts| parts.iter().collect())
}

fn change() -> impl Strategy<Value = Change> {
    let mode = || prop::sample::select(&[0o600_u32, 0o644, 0o755, 0o4711, 0o700][..]);
    let target = prop::sample::select(&["a", "/b/c", "../a", "nowhere", "c"][..]).prop_map(str::to_owned);
    prop_oneof![
        6 => (path(), vec(any::<u8>(), 0..600), mode()).prop_map(|(path, content, mode)| Change::File(path, content, mode)),
        4 => (path(), mode()).prop_map(|(path, mode)| Change::Directory(path, mode)),
        1 => (path(), target).prop_map(|(path, target)| Change::Symlink(path, target)),
        3 => (path(), path()).prop_map(|(path, target)| Change::HardLink(path, target)),
        3 => path().prop_map(Change::Whiteout),
        2 => prop_oneof![path(), Just(PathBuf::new())].prop_map(Change::Opaque),
    ]
}

fn same(model: &Model, bed: &Bed) -> Result<(), TestCaseError> {
    let tree = bed.tree();
    prop_assert_eq!(tree.keys().collect::<Vec<_>>(), model.nodes.keys().collect::<Vec<_>>());
    let mut inodes = BTreeMap::new();
    for (path, node) in &model.nodes {
        let found = &tree[path];
        let (kind, permissions) = (found.mode & 0o170_000, found.mode & 0o7777);
        let id = match node {
            Node::Directory(mode) => {
                prop_assert!(kind == 0o040_000 && mode.is_none_or(|mode| mode == permissions), "{:?}", path);
                continue;
            }
            Node::File(id, mode, content) => {
                prop_assert_eq!(
                    (kind, permissions, &found.content),
                    (0o100_000, *mode, content),
                    "{:?}",
                    path
                );
                id
            }
            Node::Symlink(id, target) => {
                prop_assert_eq!((kind, &*found.content), (0o120_000, target.as_bytes()), "{:?}", path);
                id
            }
        };
        prop_assert_eq!(*inodes.entry(id).or_insert(found.inode), found.inode, "{:?}", path);
    }
    let distinct: BTreeSet<_> = inodes.values().collect();
    prop_assert_eq!(distinct.len(), inodes.len());
    Ok(())
}

proptest! {
    #[test]
    fn layers_make_what_the_specification_says(layers in vec(vec(change(), 0..14), 1..5)) {
        let bed = Bed::new();
        let mut model = Model::default();
        let layers: Vec<Vec<u8>> = layers
            .iter()
            .map(|layer| tar(&model.apply(layer).iter().map(member).collect::<Vec<_>>()))
            .collect();
        bed.apply(&layers).map_err(|error| TestCaseError::fail(carrel_protocol::chain(&error)))?;
        same(&model, &bed)?;
    }
}
