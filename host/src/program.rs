//! A program of this host's, packed for a room: what it needs to run there as it would here, as layers that are the same as long as it is.
//!
//! ```text
//!   word ─▶ script: look up, #! ─┬─▶ tree (names, sizes) ─▶ layer ─▶ store: found by fingerprint, or read, written as a tar, hashed
//!   --with, Cargo, Python ───────┘        ▲                  │ notes: which programs and libraries are in it
//!                                         └─── libraries ◀───┘
//!
//!   layers, lowest first:  surroundings │ libraries │ --with and Python, one each │ package │ programs it starts │ the program
//! ```
//!
//! Stable parts come first and are shared by all that use them. [`returned`] is the way back: files that the program wrote.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use carrel_protocol::vmm::Mark;
use carrel_store::{Store, StoreError};
use thiserror::Error;

use crate::spec::LayerSpec;
use crate::timestamp::mark;

mod cargo;
mod elf;
mod layer;
mod libraries;
mod loader_cache;
mod python;
pub mod returned;
mod script;
mod surroundings;
mod tree;
mod variables;

pub use surroundings::Account;

use cargo::Cargo;
use layer::{Layer, Times, Wanted};
use libraries::Loader;
use tree::{Skip, Tree};

/// Scripts whose interpreters are scripts: the kernel follows five.
const MOST_SCRIPTS: usize = 5;

/// Why a program can't be packed.
#[derive(Debug, Error)]
pub enum ProgramError {
    /// No such file.
    #[error("there is no program {0:?} on this host; give its path, or mend PATH")]
    NotFound(String),
    /// A folder.
    #[error("{} is a directory, and no program", .0.display())]
    Directory(PathBuf),
    /// A file that it needs can't be had.
    #[error("{} can't be taken along", .path.display())]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A path in the room that is none.
    #[error("{0:?} is no place in a room; give an absolute path after the colon")]
    Place(PathBuf),
    /// The store doesn't take it.
    #[error(transparent)]
    Store(#[from] Box<StoreError>),
}

/// A file or folder to be taken along.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct With {
    /// On this host; a word without a slash is a program's.
    pub path: PathBuf,
    /// In the room; without it the same path.
    pub at: Option<PathBuf>,
}

/// What is to be packed.
#[derive(Clone, Debug)]
pub struct Program<'a> {
    /// As it is called: a path, or a word that `PATH` knows.
    pub word: &'a str,
    /// The working directory, absolute.
    pub directory: &'a Path,
    /// The variables that it will have.
    pub variables: &'a [(String, String)],
    /// As whom it runs.
    pub account: &'a Account,
    /// What else it needs.
    pub with: &'a [With],
    /// Under Cargo, the whole workspace rather than the package.
    pub whole_workspace: bool,
}

/// A program's files, in the store.
#[derive(Debug)]
pub struct Packed {
    /// Lowest first.
    pub layers: Vec<LayerSpec>,
    /// Each opened.
    pub blobs: Vec<OwnedFd>,
    /// What was left out or not found, in sentences.
    pub notices: Vec<String>,
    /// When what was found.
    pub timeline: Vec<Mark>,
}

/// Those of the caller's variables that a program in a room has: of those that are known to be harmless, and of `patterns` (a `*` at the end is any ending).
/// What is not UTF-8 stays outside: such variables' names come second.
pub fn variables<'a>(
    all: impl Iterator<Item = (&'a OsStr, &'a OsStr)>,
    patterns: &[String],
) -> (Vec<(String, String)>, Vec<String>) {
    let (mut kept, mut left_out) = (Vec::new(), Vec::new());
    for (name, value) in all {
        let shown = name.to_string_lossy();
        if !variables::goes_along(&shown, patterns) {
            continue;
        }
        match (name.to_str(), value.to_str()) {
            (Some(name), Some(value)) => kept.push((name.to_owned(), value.to_owned())),
            _ => left_out.push(shown.into_owned()),
        }
    }
    kept.sort();
    left_out.sort();
    (kept, left_out)
}

impl Program<'_> {
    /// Brings its layers into the store. Hold a lease from before this until the room has them.
    ///
    /// # Errors
    ///
    /// If the program isn't there, or what was asked for by name can't be read. What it may do without is left out, and said.
    pub fn pack(&self, store: &Store) -> Result<Packed, ProgramError> {
        let (mut notices, mut timeline) = (Vec::new(), Vec::new());
        let found = self.look_up(self.word).ok_or_else(|| ProgramError::NotFound(self.word.to_owned()))?;
        // Before any of it is read: it may be a whole disk.
        if found.is_dir() {
            return Err(ProgramError::Directory(found));
        }
        let (program, interpreters) = self.program(&found)?;
        let real = std::fs::canonicalize(&found).unwrap_or_else(|_| found.clone());
        let cargo = Cargo::of(&real, self.whole_workspace, self.variables);

        let mut above = Vec::new();
        for (folder, skip) in interpreters.iter().flat_map(|path| self.python(path)) {
            above.push(self.layer(store, &self.folder(&folder, skip)?, Times::Kept, &mut notices)?);
        }
        for with in self.with {
            above.push(self.layer(store, &self.with(with)?, Times::Kept, &mut notices)?);
        }
        timeline.push(mark("interpreters and --with found"));
        if let Some(package) = &cargo.package {
            let mut tree = self.folder(package, Skip::Caches)?;
            tree.follow_links();
            above.push(self.layer(store, &tree, Times::Kept, &mut notices)?);
        }
        timeline.push(mark("package found"));
        let mentions = cargo.profile.as_ref().and_then(|profile| Some(format!("{}/", profile.to_str()?)));
        let program = Wanted { mentions: mentions.as_deref(), ..self.wanted(&program, Times::Dropped) };
        let program = program.obtain(store)?;
        let mut started = Tree::default();
        for path in
            cargo.profile.iter().flat_map(|profile| cargo::programs(profile, &program.notes.mentioned))
        {
            started.add(&path, Skip::Nothing).map_err(unreadable(&path))?;
        }
        for path in cargo.named.iter().filter(|path| path.exists()) {
            started.add(path, Skip::Nothing).map_err(unreadable(path))?;
        }
        if let Some(scratch) = cargo.scratch {
            started.directory(scratch, 0o777, tree::Owner::User);
        }
        if !started.is_empty() {
            above.push(self.layer(store, &started, Times::Dropped, &mut notices)?);
        }
        above.push(program);
        timeline.push(mark("program found"));

        let surroundings = self.wanted(&surroundings::tree(self.account), Times::Dropped).obtain(store)?;
        let libraries = self.libraries(&above, &mut notices)?;
        let libraries = self.layer(store, &libraries, Times::Dropped, &mut notices)?;
        timeline.push(mark("libraries found"));
        let mut packed = Packed { layers: Vec::new(), blobs: Vec::new(), notices, timeline };
        for Layer { spec, file, .. } in [surroundings, libraries].into_iter().chain(above) {
            packed.layers.push(spec);
            packed.blobs.push(file.into());
        }
        Ok(packed)
    }

    fn value(&self, name: &str) -> &str {
        self.variables.iter().find(|(known, _)| known == name).map_or("", |(_, value)| value)
    }

    fn look_up(&self, word: &str) -> Option<PathBuf> {
        script::look_up(word, self.directory, self.value("PATH"))
    }

    fn wanted<'t>(&self, tree: &'t Tree, times: Times) -> Wanted<'t> {
        Wanted { tree, times, ids: self.account.ids(), mentions: None }
    }

    fn layer(
        &self,
        store: &Store,
        tree: &Tree,
        times: Times,
        notices: &mut Vec<String>,
    ) -> Result<Layer, ProgramError> {
        for (path, why) in &tree.left_out {
            notices.push(format!("{} is left out: {why}.", path.display()));
        }
        Ok(self.wanted(tree, times).obtain(store)?)
    }

    /// The program, and the interpreters of a script. Returns also by which paths each of them is called.
    fn program(&self, found: &Path) -> Result<(Tree, Vec<PathBuf>), ProgramError> {
        let mut tree = Tree::default();
        let mut called = vec![found.to_owned()];
        let mut next = vec![found.to_owned()];
        for _ in 0..MOST_SCRIPTS {
            let Some(path) = next.pop() else { break };
            tree.add(&path, Skip::Nothing).map_err(unreadable(&path))?;
            if let Some(interpreter) = script::interpreter(&path) {
                let by_env = interpreter.by_env.and_then(|word| self.look_up(&word));
                // A missing one is what the program fails with, here as there.
                next.extend(
                    [Some(interpreter.path), by_env].into_iter().flatten().filter(|path| path.exists()),
                );
                called.extend(next.iter().cloned());
            }
        }
        for path in next {
            tree.add(&path, Skip::Nothing).map_err(unreadable(&path))?;
        }
        Ok((tree, called))
    }

    fn python(&self, called: &Path) -> Vec<(PathBuf, Skip)> {
        let real = std::fs::canonicalize(called).unwrap_or_else(|_| called.to_owned());
        python::folders(called, &real, &self.account.home, self.value("PYTHONPATH"))
    }

    fn folder(&self, path: &Path, skip: Skip) -> Result<Tree, ProgramError> {
        let mut tree = Tree::default();
        tree.add(path, skip).map_err(unreadable(path))?;
        Ok(tree)
    }

    fn with(&self, with: &With) -> Result<Tree, ProgramError> {
        let word = with.path.to_str().filter(|word| !word.contains('/') && !matches!(*word, "." | ".."));
        if let (Some(word), None) = (word, &with.at)
            && !self.directory.join(word).exists()
        {
            let found = self.look_up(word).ok_or_else(|| ProgramError::NotFound(word.to_owned()))?;
            return Ok(self.program(&found)?.0);
        }
        let path = self.directory.join(&with.path);
        let mut tree = Tree::default();
        match &with.at {
            None => {
                // Links stand for where they lead, so what was named must be there under its own name.
                tree.add(&path, Skip::Caches).map(drop)
            }
            Some(at) if !at.is_absolute() => return Err(ProgramError::Place(at.clone())),
            Some(at) => tree.add_at(&path, at, Skip::Caches),
        }
        .map_err(unreadable(&path))?;
        Ok(tree)
    }

    /// What all programs and libraries in these layers load that is not there yet.
    fn libraries(&self, above: &[Layer], notices: &mut Vec<String>) -> Result<Tree, ProgramError> {
        let objects = above.iter().flat_map(|layer| layer.notes.objects.iter().cloned()).collect();
        let found = Loader::of_this_machine(self.value("LD_LIBRARY_PATH")).closure(objects);
        let last = above.last().map_or(&[][..], |program| &program.notes.objects);
        for (name, by) in &found.missing {
            // Modules of others often name what whoever loads them has loaded before.
            if last.iter().any(|object| object.path == *by) {
                notices.push(format!("{} wants {name}, which its loader would not find here.", by.display()));
            }
        }
        let mut tree = Tree::default();
        for path in found.paths.iter().filter(|path| path.exists()) {
            tree.add(path, Skip::Nothing).map_err(unreadable(path))?;
        }
        Ok(tree)
    }
}

fn unreadable(path: &Path) -> impl FnOnce(std::io::Error) -> ProgramError + use<'_> {
    move |source| ProgramError::Unreadable { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests;
