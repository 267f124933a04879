//! What Debian's own `tar`, `zip`, `umoci` and Python make of a tree is unpacked to the same tree.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::process::Command;

use carrel_protocol::agent::{Compression, Layer};
use serde_json::Value;
use tempfile::TempDir;

use super::bed::{AMPLE, Bed, described};

/// A test that is left out in silence proves nothing: what is missing is named, with Debian's package of it. `scripts/test` installs them.
fn need(program: &str, package: &str) {
    let found = Command::new(program).arg("--help").output();
    assert!(found.is_ok(), "there is no {program} to be tested with: apt-get install {package}");
}

fn run(program: &str, at: &Path, arguments: &[&str]) {
    let done = Command::new(program).args(arguments).current_dir(at).output().unwrap();
    assert!(done.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
}

fn some_tree() -> TempDir {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir_all(at("dir/deep")).unwrap();
    fs::write(at("dir/file"), "content").unwrap();
    fs::write(at(&format!("dir/deep/{}", "n".repeat(200))), "long").unwrap();
    fs::write(at("dir/ünïcode"), "names").unwrap();
    symlink("t".repeat(150), at("dir/link")).unwrap();
    fs::hard_link(at("dir/file"), at("dir/same")).unwrap();
    rustix::fs::chmod(at("dir/file"), 0o4751.into()).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        at("null"),
        rustix::fs::FileType::CharacterDevice,
        0o600.into(),
        rustix::fs::makedev(1, 3),
    )
    .unwrap();
    let holes = fs::File::create(at("holes")).unwrap();
    for n in 0..60 {
        std::os::unix::fs::FileExt::write_at(&holes, b"data", n << 16).unwrap();
    }
    holes.set_len(8 << 20).unwrap();
    for path in ["dir/file", "null", "holes", "dir/deep"] {
        std::os::unix::fs::lchown(at(path), Some(3_000_000), Some(77)).unwrap();
    }
    // chown(2) took setuid away.
    rustix::fs::chmod(at("dir/file"), 0o4751.into()).unwrap();
    rustix::fs::lsetxattr(at("dir/file"), "user.note", b"\0kept\n", rustix::fs::XattrFlags::empty()).unwrap();
    folder
}

#[test]
fn every_format_that_tar_writes_unpacks_to_the_same_tree() {
    need("tar", "tar");
    let source = some_tree();
    for options in [
        &["--format=gnu"][..],
        &["--format=gnu", "--sparse"],
        &["--format=oldgnu", "--sparse"],
        &["--format=pax", "--xattrs"],
        &["--format=pax", "--sparse", "--sparse-version=0.0"],
        &["--format=pax", "--sparse", "--sparse-version=0.1"],
        &["--format=pax", "--sparse", "--sparse-version=1.0", "--xattrs"],
        &["--format=pax", "--pax-option=globexthdr.name=g,comment=of-all"],
    ] {
        let folder = TempDir::new().unwrap();
        let archive = folder.path().join("archive.tar");
        let mut arguments = vec!["-cf", archive.to_str().unwrap(), "--numeric-owner"];
        arguments.extend(options);
        arguments.push(".");
        run("tar", source.path(), &arguments);
        let bed = Bed::new();
        bed.apply(&[fs::read(&archive).unwrap()]).unwrap_or_else(|error| panic!("{options:?}: {error:?}"));
        let from = Bed::of(source.path());
        let to = bed.tree();
        assert_eq!(to.keys().collect::<Vec<_>>(), from.keys().collect::<Vec<_>>());
        for (path, expected) in &from {
            let found = &to[path];
            assert_eq!(
                (found.mode, found.owner, found.size),
                (expected.mode, expected.owner, expected.size),
                "{options:?} {path:?}"
            );
            assert_eq!(
                (&found.content, found.mtime),
                (&expected.content, expected.mtime),
                "{options:?} {path:?}"
            );
        }
        assert_eq!(fs::read(bed.at("holes")).unwrap(), fs::read(source.path().join("holes")).unwrap());
        assert_eq!(bed.stat("dir/same").ino(), bed.stat("dir/file").ino());
        assert_eq!(bed.stat("null").rdev(), rustix::fs::makedev(1, 3));
        if options.contains(&"--sparse") {
            assert!(bed.stat("holes").blocks() * 512 < 1 << 20, "{options:?}");
        }
        if options.contains(&"--xattrs") {
            assert_eq!(bed.attribute("dir/file", "user.note").unwrap(), b"\0kept\n");
        }
    }
}

#[test]
fn the_tar_crates_archives_unpack_too() {
    let mut builder = tar::Builder::new(Vec::new());
    builder.follow_symlinks(false);
    let source = some_tree();
    fs::remove_file(source.path().join("null")).unwrap();
    builder.append_dir_all(".", source.path()).unwrap();
    let bed = Bed::new();
    bed.apply(&[builder.into_inner().unwrap()]).unwrap();
    let (from, to) = (Bed::of(source.path()), bed.tree());
    assert_eq!(to.keys().collect::<Vec<_>>(), from.keys().collect::<Vec<_>>());
    assert!(from.iter().all(|(path, expected)| to[path].content == expected.content));
}

#[test]
fn info_zip_keeps_modes_links_and_times() {
    need("zip", "zip");
    let source = TempDir::new().unwrap();
    fs::create_dir(source.path().join("d")).unwrap();
    fs::write(source.path().join("d/app.py"), "print()\n".repeat(1000)).unwrap();
    fs::write(source.path().join("bootstrap"), "#!/bin/sh\n").unwrap();
    rustix::fs::chmod(source.path().join("bootstrap"), 0o755.into()).unwrap();
    symlink("d/app.py", source.path().join("link")).unwrap();
    let folder = TempDir::new().unwrap();
    let archive = folder.path().join("code.zip");
    run("zip", source.path(), &["-q", "-r", "-y", archive.to_str().unwrap(), "."]);
    let bed = Bed::new();
    bed.unzip(AMPLE, &fs::read(&archive).unwrap()).unwrap();
    let (from, to) = (Bed::of(source.path()), bed.tree());
    assert_eq!(to.keys().collect::<Vec<_>>(), from.keys().collect::<Vec<_>>());
    for (path, expected) in from.iter().filter(|(path, _)| *path != Path::new("d")) {
        let found = &to[path];
        assert_eq!(
            (found.mode, &found.content, found.mtime),
            (expected.mode, &expected.content, expected.mtime),
            "{path:?}"
        );
    }
    // A password makes it nothing that can be unpacked.
    run("zip", source.path(), &["-q", "-P", "word", archive.to_str().unwrap(), "bootstrap"]);
    let said = super::bed::said(Bed::new().unzip(AMPLE, &fs::read(&archive).unwrap()));
    assert_eq!(said, "the entry 'bootstrap' is encrypted; make the zip without a password");
}

#[test]
fn pythons_zips_unpack() {
    need("python3", "python3");
    let folder = TempDir::new().unwrap();
    let script = r"
import sys, zipfile
with zipfile.ZipFile('code.zip', 'w', zipfile.ZIP_DEFLATED) as z:
    z.writestr('app.py', 'print()' * 1000)
    z.writestr('päckage/__init__.py', '')
    z.mkdir('empty') if hasattr(z, 'mkdir') else z.writestr('empty/', '')
    with z.open('large', 'w', force_zip64=True) as f:
        f.write(b'x' * 100000)
";
    run("python3", folder.path(), &["-c", script]);
    let bed = Bed::new();
    bed.unzip(AMPLE, &fs::read(folder.path().join("code.zip")).unwrap()).unwrap();
    assert_eq!(bed.names(), ["app.py", "empty", "large", "päckage", "päckage/__init__.py"]);
    assert_eq!((bed.text("app.py"), bed.stat("large").len()), ("print()".repeat(1000), 100_000));
}

/// The layers of a layout's only image, as the host would describe them.
fn layers_of(layout: &Path) -> Vec<(Layer, Vec<u8>)> {
    let blob = |digest: &Value| {
        let digest = digest.as_str().unwrap().strip_prefix("sha256:").unwrap();
        fs::read(layout.join("blobs/sha256").join(digest)).unwrap()
    };
    let parse = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap();
    let index = parse(&fs::read(layout.join("index.json")).unwrap());
    let manifest = parse(&blob(&index["manifests"][0]["digest"]));
    let configuration = parse(&blob(&manifest["config"]["digest"]));
    let diff_ids = configuration["rootfs"]["diff_ids"].as_array().unwrap();
    let of = |(layer, diff_id): (&Value, &Value)| {
        let sent = blob(&layer["digest"]);
        let described = described(Compression::Gzip, &sent, b"");
        assert_eq!(layer["mediaType"], "application/vnd.oci.image.layer.v1.tar+gzip");
        (Layer { diff_id: diff_id.as_str().unwrap().into(), ..described }, sent)
    };
    manifest["layers"].as_array().unwrap().iter().zip(diff_ids).map(of).collect()
}

#[test]
fn an_image_of_umocis_unpacks_as_umoci_unpacks_it() {
    need("umoci", "umoci");
    let folder = TempDir::new().unwrap();
    let at = folder.path();
    run("umoci", at, &["init", "--layout", "image"]);
    run("umoci", at, &["new", "--image", "image:t"]);
    let changes: [&dyn Fn(&Path); 3] = [
        &|root| {
            let source = some_tree();
            let from = format!("{}/.", source.path().display());
            run("cp", root, &["-a", &from, "."]);
            fs::create_dir_all(root.join("gone/deep")).unwrap();
            fs::write(root.join("gone/deep/file"), "1").unwrap();
            fs::create_dir(root.join("becomes-file")).unwrap();
            fs::write(root.join("becomes-file/inside"), "1").unwrap();
            fs::write(root.join("becomes-directory"), "1").unwrap();
        },
        &|root| {
            fs::remove_dir_all(root.join("gone")).unwrap();
            fs::remove_file(root.join("dir/same")).unwrap();
            fs::remove_dir_all(root.join("becomes-file")).unwrap();
            fs::write(root.join("becomes-file"), "2").unwrap();
            fs::remove_file(root.join("becomes-directory")).unwrap();
            fs::create_dir(root.join("becomes-directory")).unwrap();
            fs::write(root.join("becomes-directory/inside"), "2").unwrap();
            rustix::fs::chmod(root.join("dir"), 0o2750.into()).unwrap();
        },
        &|root| {
            fs::create_dir(root.join("gone")).unwrap();
            fs::write(root.join("gone/again"), "3").unwrap();
            fs::remove_file(root.join("null")).unwrap();
            symlink("dir", root.join("null")).unwrap();
        },
    ];
    for (number, change) in changes.iter().enumerate() {
        let bundle = format!("bundle{number}");
        run("umoci", at, &["unpack", "--image", "image:t", &bundle]);
        change(&at.join(&bundle).join("rootfs"));
        run("umoci", at, &["repack", "--image", "image:t", &bundle]);
    }
    run("umoci", at, &["unpack", "--image", "image:t", "last"]);
    let layers = layers_of(&at.join("image"));
    assert_eq!(layers.len(), changes.len());
    let bed = Bed::new();
    bed.apply_described(AMPLE, &layers).unwrap();
    let (from, to) = (Bed::of(&at.join("last/rootfs")), bed.tree());
    assert_eq!(to.keys().collect::<Vec<_>>(), from.keys().collect::<Vec<_>>());
    for (path, expected) in &from {
        let found = &to[path];
        assert_eq!(
            (found.mode, found.owner, found.size),
            (expected.mode, expected.owner, expected.size),
            "{path:?}"
        );
        assert_eq!((&found.content, found.mtime), (&expected.content, expected.mtime), "{path:?}");
    }
}
