//! The libraries that objects load, found as their loader would find them (ld.so(8)).
//!
//! ```text
//!   objects ─▶ for each library that one names: its RPATH and its loaders' ─▶ LD_LIBRARY_PATH ─▶ its RUNPATH ─▶ ld.so.cache ─▶ default folders
//!      ▲                                                                                                        │ the first for x86_64
//!      └────────────────────────────────────── not seen before ◀──────────────────────────────────────────────┘
//! ```
//!
//! What is loaded by name at run time (dlopen) nobody can know: `--with` brings it.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use serde::{Deserialize, Serialize};

use super::elf::{self, Needs};
use super::loader_cache::LoaderCache;

/// Objects that a program may consist of.
const MOST_OBJECTS: usize = 16_384;
/// glibc's on x86_64, as Debian's and as Fedora's is built.
const GLIBC_FOLDERS: [&str; 6] =
    ["/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib"];
const MUSL_FOLDERS: [&str; 3] = ["/lib", "/usr/local/lib", "/usr/lib"];
/// What libraries load by themselves: glibc its name services (before 2.34) and the unwinder, for pthread_cancel(3).
const LOADED_LATER: [&str; 3] = ["libnss_files.so.2", "libnss_dns.so.2", "libgcc_s.so.1"];

/// A program or library, and what it asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Object {
    /// Where it is on this host.
    pub(crate) path: PathBuf,
    /// What it asks for.
    pub(crate) needs: Needs,
}

/// What objects load.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Libraries {
    /// Interpreters and libraries, by the paths at which they are opened.
    pub(crate) paths: BTreeSet<PathBuf>,
    /// Names that were not found, and who asks for each.
    pub(crate) missing: BTreeMap<String, PathBuf>,
}

/// Finds libraries.
#[derive(Clone, Debug, Default)]
pub(crate) struct Loader {
    cache: LoaderCache,
    /// `LD_LIBRARY_PATH`.
    library_path: Vec<PathBuf>,
    /// What was opened already: every program asks for the C library, and most libraries do.
    opened: RefCell<BTreeMap<PathBuf, Option<Needs>>>,
}

/// An object whose libraries are to be found.
struct Waiting {
    object: Object,
    /// RPATHs of those that load it, nearest first.
    inherited: Rc<[PathBuf]>,
}

impl Loader {
    /// This machine's, with what `LD_LIBRARY_PATH` says.
    pub(crate) fn of_this_machine(library_path: &str) -> Self {
        let cache = fs::read("/etc/ld.so.cache").map(|bytes| LoaderCache::parse(&bytes)).unwrap_or_default();
        // An empty folder is the working directory, which a room has too.
        let folders = library_path.split([':', ';']).filter(|folder| !folder.is_empty());
        Self { cache, library_path: folders.map(PathBuf::from).collect(), ..Self::default() }
    }

    /// Everything that these objects load, and what that loads.
    pub(crate) fn closure(&self, objects: Vec<Object>) -> Libraries {
        let mut found = Libraries::default();
        let mut seen: BTreeSet<PathBuf> = objects.iter().map(|object| object.path.clone()).collect();
        let none: Rc<[PathBuf]> = Rc::new([]);
        let is_musl =
            |object: &Object| object.needs.interpreter.as_ref().is_some_and(|name| name.contains("ld-musl"));
        let musl = objects.iter().any(is_musl);
        let dynamic = objects.iter().any(|object| !object.needs.libraries.is_empty());
        let mut waiting: VecDeque<Waiting> =
            objects.into_iter().map(|object| Waiting { object, inherited: Rc::clone(&none) }).collect();
        if dynamic && !musl {
            let path = PathBuf::from("the C library");
            let libraries = LOADED_LATER.map(str::to_owned).to_vec();
            let later = Object { path, needs: Needs { libraries, ..Needs::default() } };
            waiting.push_back(Waiting { object: later, inherited: none });
        }
        while let Some(Waiting { object, inherited }) = waiting.pop_front() {
            if let Some(interpreter) = &object.needs.interpreter {
                found.paths.insert(interpreter.into());
            }
            let search = Search::of(&object, &inherited);
            for name in &object.needs.libraries {
                let Some((path, needs)) = self.find(name, &search, musl) else {
                    found.missing.entry(name.clone()).or_insert_with(|| object.path.clone());
                    continue;
                };
                found.paths.insert(path.clone());
                if seen.len() < MOST_OBJECTS && seen.insert(path.clone()) {
                    let inherited = Rc::clone(&search.handed_down);
                    waiting.push_back(Waiting { object: Object { path, needs }, inherited });
                }
            }
        }
        for later in LOADED_LATER {
            found.missing.remove(later);
        }
        found
    }

    fn find(&self, name: &str, search: &Search, musl: bool) -> Option<(PathBuf, Needs)> {
        let open = |path: PathBuf| {
            let mut opened = self.opened.borrow_mut();
            let read = || elf::needs(&File::open(&path).ok()?);
            let needs = opened.entry(path.clone()).or_insert_with(read).clone()?;
            Some((path, needs))
        };
        if name.contains('/') {
            return open(std::path::absolute(name).ok()?);
        }
        let defaults: &[&str] = if musl { &MUSL_FOLDERS } else { &GLIBC_FOLDERS };
        let cached: &mut dyn Iterator<Item = &PathBuf> =
            if musl { &mut std::iter::empty() } else { &mut self.cache.paths(name) };
        let early = search.rpaths.iter().chain(&self.library_path).chain(&search.runpath);
        let early = early.map(|folder| folder.join(name));
        early
            .chain(cached.cloned())
            .chain(defaults.iter().map(|folder| Path::new(folder).join(name)))
            .find_map(open)
    }
}

/// Where one object's libraries are looked for before the places that all share.
struct Search {
    rpaths: Rc<[PathBuf]>,
    runpath: Vec<PathBuf>,
    /// RPATHs for what it loads.
    handed_down: Rc<[PathBuf]>,
}

impl Search {
    fn of(object: &Object, inherited: &Rc<[PathBuf]>) -> Self {
        let folders = |list: &Option<String>| -> Vec<PathBuf> {
            let list = list.as_deref().unwrap_or_default();
            list.split(':').filter_map(|folder| expand(folder, &object.path)).collect()
        };
        if object.needs.runpath.is_some() {
            // Who has a RUNPATH uses no RPATH, not its loaders' either; those that it loads do again.
            let handed_down = Rc::clone(inherited);
            return Self { rpaths: Rc::new([]), runpath: folders(&object.needs.runpath), handed_down };
        }
        let own = folders(&object.needs.rpath);
        let rpaths: Rc<[PathBuf]> = if own.is_empty() {
            Rc::clone(inherited)
        } else {
            own.into_iter().chain(inherited.iter().cloned()).collect()
        };
        Self { handed_down: Rc::clone(&rpaths), rpaths, runpath: Vec::new() }
    }
}

/// `$ORIGIN` is the object's folder (ld.so(8), *Dynamic string tokens*); a folder with any other token, or a relative one, is left out.
fn expand(folder: &str, object: &Path) -> Option<PathBuf> {
    let origin = fs::canonicalize(object).unwrap_or_else(|_| object.to_owned());
    let origin = origin.parent()?.to_str()?;
    let folder = folder.replace("${ORIGIN}", origin).replace("$ORIGIN", origin);
    (folder.starts_with('/') && !folder.contains('$')).then(|| folder.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(path: &str) -> Object {
        let path = fs::canonicalize(path).unwrap();
        let needs = elf::needs(&File::open(&path).unwrap()).unwrap();
        Object { path, needs }
    }

    /// What the loader itself says that a program of this machine's own would load.
    fn said_by_the_loader(program: &Path, interpreter: &str) -> BTreeSet<PathBuf> {
        let out = std::process::Command::new(interpreter).arg("--list").arg(program).output().unwrap();
        assert!(out.status.success());
        let text = String::from_utf8(out.stdout).unwrap();
        let path = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(str::to_owned);
        text.lines().filter_map(path).map(|path| fs::canonicalize(path).unwrap()).collect()
    }

    #[test]
    fn libraries_are_those_that_the_loader_would_take() {
        for program in ["/bin/sh", "/usr/bin/python3", "/usr/bin/ssh", "/usr/bin/curl"] {
            if !Path::new(program).exists() {
                continue;
            }
            let object = object(program);
            let interpreter = object.needs.interpreter.clone().unwrap();
            let said = said_by_the_loader(&object.path, &interpreter);
            let found = Loader::of_this_machine("").closure(vec![object]);
            assert_eq!(found.missing, BTreeMap::new(), "{program}");
            let found: BTreeSet<_> = found.paths.iter().map(|path| fs::canonicalize(path).unwrap()).collect();
            let missing: Vec<_> = said.difference(&found).collect();
            assert!(missing.is_empty(), "{program}: {missing:?} of {said:?}");
            // Nothing else, but for what is loaded later.
            assert!(found.len() <= said.len() + LOADED_LATER.len(), "{program}: {found:?}");
        }
    }

    #[test]
    fn rpath_is_for_what_is_loaded_too_and_runpath_for_oneself_alone() {
        let needs = |rpath: Option<&str>, runpath: Option<&str>| Object {
            path: "/opt/app/bin/app".into(),
            needs: Needs {
                rpath: rpath.map(Into::into),
                runpath: runpath.map(Into::into),
                ..Needs::default()
            },
        };
        let inherited: Rc<[PathBuf]> = Rc::new(["/outer".into()]);
        let both = Search::of(&needs(Some("/a:$ORIGIN/../lib"), None), &inherited);
        let expected: [PathBuf; 3] = ["/a".into(), "/opt/app/bin/../lib".into(), "/outer".into()];
        assert_eq!((&*both.rpaths, both.runpath.len()), (&expected[..], 0));
        let own = Search::of(&needs(Some("/a"), Some("${ORIGIN}")), &inherited);
        assert_eq!((own.rpaths.len(), own.runpath), (0, vec![PathBuf::from("/opt/app/bin")]));
        assert_eq!(own.handed_down, inherited);
        assert!(Search::of(&needs(None, Some("lib:$LIB/x:")), &inherited).runpath.is_empty());
    }

    #[test]
    fn what_is_nowhere_is_named_with_who_wants_it() {
        let path = PathBuf::from("/app");
        let needs = Needs { libraries: vec!["libcarrel-nowhere.so.9".into()], ..Needs::default() };
        let found = Loader::default().closure(vec![Object { path: path.clone(), needs }]);
        assert_eq!(found.missing, [("libcarrel-nowhere.so.9".to_owned(), path)].into());
    }
}
