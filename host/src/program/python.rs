//! Python: an interpreter is nothing without its standard library, and tests need what is installed beside it.
//!
//! It is found by its landmarks, as the interpreter itself finds it (`Modules/getpath.py`): `pyvenv.cfg` beside or above the program names the base;
//! `lib/pythonX.Y/os.py` marks the prefix. The interpreter is not asked: a project's own may be part of what nobody trusts yet.

use std::path::{Path, PathBuf};

/// Folders that an interpreter reads, each worth a layer of its own; nothing if the program is none. `program` is as it is called, `real` what its
/// links lead to.
pub(crate) fn folders(program: &Path, real: &Path, home: &Path, path_variable: &str) -> Vec<PathBuf> {
    let Some(version) = real.file_name().and_then(|name| name.to_str()).and_then(version) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    let environment = virtual_environment(program);
    found.extend(environment.clone());
    let prefix = real.parent().and_then(Path::parent);
    for prefix in prefix.into_iter().chain([Path::new("/usr/local")]) {
        let library = prefix.join("lib").join(&version);
        // Packages that Debian installs are shared by all versions; those of /usr/local are the machine's own.
        for folder in [library, prefix.join("lib/python3/dist-packages")] {
            if folder.join("os.py").is_file()
                || folder.ends_with("dist-packages")
                || folder.join("dist-packages").is_dir()
            {
                found.push(folder);
            }
        }
    }
    if environment.is_none() {
        found.push(home.join(".local/lib").join(&version).join("site-packages"));
    }
    found.extend(path_variable.split(':').filter(|folder| folder.starts_with('/')).map(PathBuf::from));
    found.retain(|folder| folder.is_dir());
    let mut kept: Vec<PathBuf> = Vec::new();
    for folder in found {
        if !kept.iter().any(|other| folder.starts_with(other)) {
            kept.push(folder);
        }
    }
    kept
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
        let found =
            folders(&root.join("bin/python3"), &root.join("bin/python3.11"), &root.join("home"), &path);
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
        let found =
            folders(&root.join("venv/bin/python"), &root.join("usr/bin/python3.11"), &root.join("home"), "");
        assert!(
            found.contains(&root.join("venv")) && found.contains(&root.join("usr/lib/python3.11")),
            "{found:?}"
        );
        assert!(!found.iter().any(|folder| folder.starts_with(root.join("home"))), "{found:?}");
    }
}
