//! Scripts: `#!` lines, as the kernel reads them (`fs/binfmt_script.c`), and programs looked up as execvp(3) does.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// BINPRM_BUF_SIZE.
const LONGEST_LINE: usize = 256;

/// The interpreter of a script, and the program that `env` will look for; `None` if it is no script.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Interpreter {
    /// `/bin/sh`, `/usr/bin/env`.
    pub(crate) path: PathBuf,
    /// What `/usr/bin/env` is given.
    pub(crate) by_env: Option<String>,
}

/// Reads a script's first line.
pub(crate) fn interpreter(program: &Path) -> Option<Interpreter> {
    let mut line = Vec::new();
    let most = u64::try_from(LONGEST_LINE).unwrap_or(u64::MAX);
    File::open(program).ok()?.take(most).read_to_end(&mut line).ok()?;
    parse(&line)
}

fn parse(begins: &[u8]) -> Option<Interpreter> {
    let line = begins.strip_prefix(b"#!")?.split(|byte| *byte == b'\n').next()?;
    let line = std::str::from_utf8(line).ok()?.trim_matches([' ', '\t']);
    let (path, argument) = line.split_once([' ', '\t']).unwrap_or((line, ""));
    if !path.starts_with('/') {
        return None;
    }
    // env -S splits its one argument itself; assignments and options come before the program's name.
    let word = argument.split_whitespace().find(|word| !word.starts_with('-') && !word.contains('='));
    let is_env = Path::new(path).file_name().is_some_and(|name| name == "env");
    Some(Interpreter { path: path.into(), by_env: word.filter(|_| is_env).map(str::to_owned) })
}

/// The file that this word would execute: as it is if it has a slash, else the first in `search` that may be executed.
pub(crate) fn look_up(word: &str, directory: &Path, search: &str) -> Option<PathBuf> {
    let executable = |path: &PathBuf| {
        fs::metadata(path).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    if word.contains('/') {
        let path = directory.join(word);
        return path.exists().then_some(path);
    }
    search.split(':').map(|folder| directory.join(folder).join(word)).find(executable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_lines_are_read_as_the_kernel_does() {
        let of =
            |line: &str| parse(line.as_bytes()).map(|found| (found.path.display().to_string(), found.by_env));
        assert_eq!(of("#!/bin/sh\necho"), Some(("/bin/sh".into(), None)));
        assert_eq!(of("#! /bin/bash -e"), Some(("/bin/bash".into(), None)));
        assert_eq!(of("#!/usr/bin/env python3\n"), Some(("/usr/bin/env".into(), Some("python3".into()))));
        assert_eq!(
            of("#!/usr/bin/env -S A=1 node --x\n"),
            Some(("/usr/bin/env".into(), Some("node".into())))
        );
        for none in ["", "#!", "#!sh\n", "# !/bin/sh", "\x7fELF", "#!\n/bin/sh"] {
            assert_eq!(of(none), None, "{none:?}");
        }
    }

    #[test]
    fn programs_are_looked_up_as_a_shell_would() {
        let folder = tempfile::tempdir().unwrap();
        for (name, mode) in [("plain", 0o644), ("tool", 0o755)] {
            let path = folder.path().join(name);
            fs::write(&path, "").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }
        let search = format!("/missing:{}", folder.path().display());
        let tool = folder.path().join("tool");
        assert_eq!(look_up("tool", Path::new("/"), &search), Some(tool.clone()));
        assert_eq!(look_up("plain", Path::new("/"), &search), None);
        assert_eq!(look_up("./tool", folder.path(), ""), Some(folder.path().join("./tool")));
        assert_eq!(look_up("./missing", folder.path(), ""), None);
        // A relative folder of PATH's is below the working directory.
        assert_eq!(look_up("tool", folder.path(), "."), Some(folder.path().join("./tool")));
        assert!(tool.exists());
    }
}
