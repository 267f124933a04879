//! Python: an interpreter is nothing without its standard library, and tests need what is installed beside it.
//!
//! It is found by its landmarks, as the interpreter itself finds it (`Modules/getpath.py`): `pyvenv.cfg` beside or above the program names the base;
//! `lib/pythonX.Y/os.py` marks the prefix. The interpreter is not asked: a project's own may be part of what nobody trusts yet.

use std::path::{Path, PathBuf};

use super::tree::Skip;

/// Of no use to anybody but who tests Python itself (the library's own words of `test`), and a quarter of the library.
const ITS_OWN_TESTS: Skip = Skip::Named(&["test"]);
/// The same, without packages: those of a virtual environment come from it alone.
const BARE: Skip = Skip::Named(&["test", "site-packages", "dist-packages"]);

/// Folders that an interpreter reads, each worth a layer of its own, and what of each is left out; nothing if the program is none. `program` is as it is
/// called, `real` what its links lead to.
pub(crate) fn folders(program: &Path, real: &Path, home: &Path, path_variable: &str) -> Vec<(PathBuf, Skip)> {
    let Some(version) = real.file_name().and_then(|name| name.to_str()).and_then(version) else {
        return Vec::new();
    };
    let environment = virtual_environment(program);
    let bare = environment.as_ref().is_some_and(|folder| !has_system_packages(folder));
    let mut found = Vec::new();
    found.extend(environment.map(|folder| (folder, Skip::Nothing)));
    let prefix = real.parent().and_then(Path::parent);
    let library =
        prefix.map(|prefix| prefix.join("lib").join(&version)).filter(|path| path.join("os.py").is_file());
    found.extend(library.map(|library| (library, if bare { BARE } else { ITS_OWN_TESTS })));
    if !bare {
        // Packages that Debian installs are shared by all versions; those of /usr/local are the machine's own.
        let shared = prefix.map(|prefix| prefix.join("lib/python3/dist-packages"));
        let local = Path::new("/usr/local/lib").join(&version).join("dist-packages");
        let own = home.join(".local/lib").join(&version).join("site-packages");
        found.extend(
            [shared, Some(local), Some(own)].into_iter().flatten().map(|folder| (folder, Skip::Nothing)),
        );
    }
    let named = path_variable.split(':').filter(|folder| folder.starts_with('/'));
    found.extend(named.map(|folder| (folder.into(), Skip::Caches)));
    let mut kept: Vec<(PathBuf, Skip)> = Vec::new();
    for (folder, skip) in found {
        if folder.is_dir() && !kept.iter().any(|(other, _)| folder.starts_with(other)) {
            kept.push((folder, skip));
        }
    }
    kept
}

/// PEP 405: only if it says so are the base's packages read too.
fn has_system_packages(environment: &Path) -> bool {
    let text = std::fs::read_to_string(environment.join("pyvenv.cfg")).unwrap_or_default();
    let value = |line: &str| {
        let (name, value) = line.split_once('=')?;
        (name.trim() == "include-system-site-packages").then(|| value.trim().eq_ignore_ascii_case("true"))
    };
    text.lines().find_map(value).unwrap_or(false)
}

/// `python3.11`, of the program's real name: `python3` is a link wherever there is more than one version.
fn version(name: &str) -> Option<String> {
    let (major, minor) = name.strip_prefix("python")?.split_once('.')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    (digits(major) && digits(minor)).then(|| name.to_owned())
}

/// PEP 405: the folder of the `pyvenv.cfg` beside or above the program.
fn virtual_environment(program: &Path) -> Option<PathBuf> {
    let beside = program.parent()?;
    [beside, beside.parent()?]
        .into_iter()
        .find(|folder| folder.join("pyvenv.cfg").is_file())
        .map(Path::to_owned)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn only_paths(found: Vec<(PathBuf, Skip)>) -> Vec<PathBuf> {
        found.into_iter().map(|(path, _)| path).collect()
    }

    fn touch(path: &Path) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    }

    #[test]
    fn an_interpreter_is_known_by_its_real_name() {
        assert_eq!(version("python3.11").as_deref(), Some("python3.11"));
        for other in ["python3", "python", "python3.11-config", "pythonx.y", "perl5.36"] {
            assert_eq!(version(other), None, "{other}");
        }
    }

    #[test]
    fn library_packages_and_the_users_own_are_found_by_their_landmarks() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        for path in [
            "lib/python3.11/os.py",
            "lib/python3/dist-packages/x.py",
            "home/.local/lib/python3.11/site-packages/y.py",
            "path/z.py",
        ] {
            touch(&root.join(path));
        }
        let path = format!("{}:relative:/missing", root.join("path").display());
        let found = only_paths(folders(
            &root.join("bin/python3"),
            &root.join("bin/python3.11"),
            &root.join("home"),
            &path,
        ));
        let expected = [
            "lib/python3.11",
            "lib/python3/dist-packages",
            "home/.local/lib/python3.11/site-packages",
            "path",
        ];
        for folder in expected {
            assert!(found.contains(&root.join(folder)), "{folder}: {found:?}");
        }
        assert!(folders(Path::new("/bin/sh"), Path::new("/bin/dash"), root, "").is_empty());
    }

    #[test]
    fn a_virtual_environment_comes_whole_with_the_base_that_it_names() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        for path in [
            "venv/pyvenv.cfg",
            "venv/lib/python3.11/site-packages/x.py",
            "usr/lib/python3.11/os.py",
            "home/.local/lib/python3.11/site-packages/y.py",
        ] {
            touch(&root.join(path));
        }
        let found = only_paths(folders(
            &root.join("venv/bin/python"),
            &root.join("usr/bin/python3.11"),
            &root.join("home"),
            "",
        ));
        assert!(
            found.contains(&root.join("venv")) && found.contains(&root.join("usr/lib/python3.11")),
            "{found:?}"
        );
        assert!(!found.iter().any(|folder| folder.starts_with(root.join("home"))), "{found:?}");
    }

    #[test]
    fn an_environment_that_asks_for_the_bases_packages_has_them() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        for path in ["venv/pyvenv.cfg", "usr/lib/python3.11/os.py", "usr/lib/python3/dist-packages/x.py"] {
            touch(&root.join(path));
        }
        // This machine may have packages of its own in /usr/local.
        let find = || {
            let (program, real) = (root.join("venv/bin/python"), root.join("usr/bin/python3.11"));
            let mut found = folders(&program, &real, &root.join("home"), "");
            found.retain(|(folder, _)| folder.starts_with(root));
            found
        };
        let library = (root.join("usr/lib/python3.11"), BARE);
        assert!(find().contains(&library) && find().len() == 2, "{:?}", find());
        fs::write(root.join("venv/pyvenv.cfg"), "home = /usr/bin\ninclude-system-site-packages = true\n")
            .unwrap();
        let library = (root.join("usr/lib/python3.11"), ITS_OWN_TESTS);
        assert!(find().contains(&library) && find().len() == 3, "{:?}", find());
    }
}
