use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::*;

struct Bed {
    folder: tempfile::TempDir,
    account: Account,
}

impl Bed {
    fn new() -> Self {
        let home = PathBuf::from("/nonexistent/home");
        Self {
            folder: tempfile::tempdir().unwrap(),
            account: Account { name: "me".into(), uid: 1000, gid: 1000, home },
        }
    }

    fn root(&self) -> PathBuf {
        fs::canonicalize(self.folder.path()).unwrap()
    }

    fn write(&self, path: &str, text: &str, mode: u32) -> PathBuf {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    /// Packs a program with these variables; further files too.
    fn pack(&self, word: &str, variables: &[(&str, &str)], with: &[With]) -> Result<Packed, ProgramError> {
        let store = Store::open(&self.root().join("store")).unwrap();
        let mut all = vec![("PATH".to_owned(), "/usr/bin:/bin".to_owned())];
        all.extend(variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        let program = Program {
            word,
            directory: &self.root(),
            variables: &all,
            account: &self.account,
            with,
            whole_workspace: false,
        };
        program.pack(&store)
    }
}

/// All paths, by layer.
fn paths(packed: Packed) -> Vec<BTreeSet<PathBuf>> {
    let of = |blob: OwnedFd| {
        let mut archive = tar::Archive::new(fs::File::from(blob));
        let path =
            |entry: std::io::Result<tar::Entry<'_, _>>| Path::new("/").join(entry.unwrap().path().unwrap());
        archive.entries().unwrap().map(path).collect()
    };
    packed.blobs.into_iter().map(of).collect()
}

#[test]
fn a_program_comes_with_its_loader_and_its_libraries() {
    let bed = Bed::new();
    let test = fs::canonicalize("/bin/sh").unwrap();
    let packed = bed.pack(test.to_str().unwrap(), &[], &[]).unwrap();
    assert_eq!(packed.notices, [] as [&str; 0]);
    let layers = paths(packed);
    assert_eq!(layers.len(), 3);
    assert!(layers[0].contains(Path::new("/etc/passwd")) && layers[0].contains(Path::new("/tmp")));
    let name = |beginning: &str| {
        layers[1].iter().any(|path| path.file_name().unwrap().to_str().unwrap().starts_with(beginning))
    };
    assert!(name("ld-") && name("libc."), "{layers:?}");
    assert_eq!(layers[2], [test].into());
}

#[test]
fn the_same_program_is_the_same_layers() {
    let bed = Bed::new();
    let digests = || -> Vec<String> {
        let packed = bed.pack("sh", &[], &[]).unwrap();
        packed.layers.into_iter().map(|layer| layer.digest).collect()
    };
    assert_eq!(digests(), digests());
}

#[test]
fn a_script_comes_with_its_interpreters() {
    let bed = Bed::new();
    bed.write("script", "#!/usr/bin/env sh\necho\n", 0o755);
    let layers = paths(bed.pack("./script", &[], &[]).unwrap());
    let program = layers.last().unwrap();
    for file in [
        bed.root().join("script"),
        fs::canonicalize("/usr/bin/env").unwrap(),
        fs::canonicalize("/bin/sh").unwrap(),
    ] {
        assert!(program.contains(&file), "{}: {program:?}", file.display());
    }
}

#[test]
fn what_is_asked_for_comes_along_or_is_named() {
    let bed = Bed::new();
    bed.write("files/one", "1", 0o644);
    let with = |path: &str, at: Option<&str>| With { path: path.into(), at: at.map(Into::into) };
    let layers = paths(
        bed.pack(
            "true",
            &[],
            &[with("files", Some("/elsewhere")), with("cat", None), with("files/one", None)],
        )
        .unwrap(),
    );
    let all: BTreeSet<PathBuf> = layers.into_iter().flatten().collect();
    for path in
        [PathBuf::from("/elsewhere/one"), fs::canonicalize("/bin/cat").unwrap(), bed.root().join("files/one")]
    {
        assert!(all.contains(&path), "{}", path.display());
    }
    let error = bed.pack("true", &[], &[with("missing/file", None)]).unwrap_err();
    assert!(
        matches!(&error, ProgramError::Unreadable { path, .. } if path.ends_with("missing/file")),
        "{error}"
    );
    let error = bed.pack("true", &[], &[with("files", Some("relative"))]).unwrap_err();
    assert!(matches!(error, ProgramError::Place(_)), "{error}");
    let error = bed.pack("no-such-program-anywhere", &[], &[]).unwrap_err();
    assert!(error.to_string().contains("no-such-program-anywhere"), "{error}");
}

#[test]
fn a_test_of_cargos_comes_with_its_package_and_the_programs_that_it_starts() {
    let bed = Bed::new();
    let tool = bed.write("package/target/debug/tool", "#!/bin/sh\necho tool\n", 0o755);
    bed.write("package/target/debug/other", "", 0o755);
    bed.write("package/target/CACHEDIR.TAG", "Signature: 8a477f597d28d172789f06886806bc55", 0o644);
    bed.write("package/src/lib.rs", "", 0o644);
    fs::create_dir(bed.root().join("package/target/tmp")).unwrap();
    let test =
        bed.write("package/target/debug/deps/it-1", &format!("#!/bin/sh\n{}failed", tool.display()), 0o755);
    let package = bed.root().join("package");
    let layers = paths(
        bed.pack(test.to_str().unwrap(), &[("CARGO_MANIFEST_DIR", package.to_str().unwrap())], &[]).unwrap(),
    );
    let all: BTreeSet<PathBuf> = layers.into_iter().flatten().collect();
    for path in [test, tool, package.join("src/lib.rs"), package.join("target/tmp")] {
        assert!(all.contains(&path), "{}: {all:?}", path.display());
    }
    assert!(!all.contains(&package.join("target/debug/other")));
}

#[test]
fn pythons_library_is_a_layer_of_its_own() {
    let bed = Bed::new();
    if script::look_up("python3", Path::new("/"), "/usr/bin").is_none() {
        return;
    }
    let layers = paths(bed.pack("python3", &[], &[]).unwrap());
    let os = |layer: &BTreeSet<PathBuf>| {
        layer.iter().any(|path| path.ends_with("os.py") && path.to_str().unwrap().contains("/python3."))
    };
    assert_eq!(layers.iter().filter(|layer| os(layer)).count(), 1);
}

#[test]
fn variables_are_sorted_filtered_and_text() {
    use std::os::unix::ffi::OsStrExt;
    let odd = OsStr::from_bytes(b"\xff");
    let all = [
        (OsStr::new("PATH"), OsStr::new("/bin")),
        (OsStr::new("SECRET"), OsStr::new("x")),
        (OsStr::new("LANG"), odd),
        (OsStr::new("HOME"), OsStr::new("/h")),
    ];
    let (kept, left_out) = variables(all.into_iter(), &[]);
    assert_eq!(left_out, ["LANG"], "what would have gone along");
    assert_eq!(kept, [("HOME".to_owned(), "/h".to_owned()), ("PATH".to_owned(), "/bin".to_owned())]);
}
