//! What Cargo, or nextest, says in the environment of a test that it runs (The Cargo Book, *Environment variables*).
//!
//! A package's own folder goes with its tests, which read fixtures there. Programs of the package that a test starts it knows by paths that were put into
//! it when it was compiled (`env!("CARGO_BIN_EXE_name")`): they are found in its bytes, and in the variables that newer runners set.

use std::path::{Path, PathBuf};

/// What a test of Cargo's needs beside itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cargo {
    /// The package's folder, or its workspace's.
    pub(crate) package: Option<PathBuf>,
    /// Programs and folders that variables name.
    pub(crate) named: Vec<PathBuf>,
    /// `target/<profile>`, of a test in its `deps`.
    pub(crate) profile: Option<PathBuf>,
    /// `target/tmp`, which is there for tests to write to.
    pub(crate) scratch: Option<PathBuf>,
}

impl Cargo {
    /// Reads the variables. `program` is the test.
    pub(crate) fn of(program: &Path, whole_workspace: bool, variables: &[(String, String)]) -> Self {
        let value =
            |name: &str| variables.iter().find(|(known, _)| known == name).map(|(_, value)| Path::new(value));
        let Some(package) = value("CARGO_MANIFEST_DIR").filter(|path| path.is_absolute()) else {
            return Self::default();
        };
        let program_variable =
            |name: &str| name.starts_with("CARGO_BIN_EXE_") || name.starts_with("NEXTEST_BIN_EXE_");
        let mut named: Vec<PathBuf> = variables
            .iter()
            .filter(|(name, value)| program_variable(name) && value.starts_with('/'))
            .map(|(_, value)| value.into())
            .collect();
        named.extend(value("OUT_DIR").filter(|path| path.is_absolute()).map(Path::to_owned));
        named.sort();
        named.dedup();
        let folder = program.parent();
        let profile = folder.filter(|folder| folder.ends_with("deps")).and_then(Path::parent);
        let root = if whole_workspace { workspace(package) } else { package };
        Self {
            package: Some(root.to_owned()),
            named,
            scratch: profile
                .and_then(Path::parent)
                .map(|target| target.join("tmp"))
                .filter(|tmp| tmp.is_dir()),
            profile: profile.map(Path::to_owned),
        }
    }
}

/// The nearest folder above that has a lock file: only a workspace's root has one.
fn workspace(package: &Path) -> &Path {
    package.ancestors().find(|folder| folder.join("Cargo.lock").is_file()).unwrap_or(package)
}

/// The programs in `profile` that these words begin with: in a program's bytes nothing says where a name ends.
pub(crate) fn programs(profile: &Path, mentioned: &[String]) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(profile).into_iter().flatten().flatten();
    let named = |name: &str| mentioned.iter().any(|word| word.starts_with(name));
    let mut found: Vec<PathBuf> = entries
        .filter(|entry| entry.file_name().to_str().is_some_and(named))
        .map(|entry| entry.path())
        .filter(|path| path.is_file())
        .collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn without_cargo_nothing_is_taken_for_granted() {
        let found = Cargo::of(Path::new("/t/debug/deps/x-1"), false, &variables(&[("OUT_DIR", "/o")]));
        assert_eq!(found, Cargo::default());
    }

    #[test]
    fn a_tests_package_and_programs_are_what_the_variables_say() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let package = root.join("crates/one");
        std::fs::create_dir_all(&package).unwrap();
        std::fs::create_dir_all(root.join("target/tmp")).unwrap();
        std::fs::write(root.join("Cargo.lock"), "").unwrap();
        let tool = root.join("target/debug/tool");
        let all = variables(&[
            ("CARGO_MANIFEST_DIR", package.to_str().unwrap()),
            ("CARGO_BIN_EXE_tool", tool.to_str().unwrap()),
            ("NEXTEST_BIN_EXE_tool", tool.to_str().unwrap()),
        ]);
        let test = root.join("target/debug/deps/it-0123");
        let found = Cargo::of(&test, false, &all);
        assert_eq!(found.package, Some(package));
        assert_eq!(found.named, [tool]);
        assert_eq!(found.scratch, Some(root.join("target/tmp")));
        assert_eq!(found.profile, Some(root.join("target/debug")));
        assert_eq!(Cargo::of(&test, true, &all).package, Some(root.to_owned()));
    }

    #[test]
    fn programs_are_found_by_how_words_begin() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["tool", "other"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        std::fs::create_dir(folder.path().join("deps")).unwrap();
        let words = ["toolfailed".to_owned(), "deps".to_owned()];
        assert_eq!(programs(folder.path(), &words), [folder.path().join("tool")]);
    }
}
