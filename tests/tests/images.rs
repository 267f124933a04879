//! Images: from a real registry and from files, listed, removed, pruned; and what ordinary ones do in a room.

// A test fails by panicking, and so do the functions that tests share.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::process::Command;

use carrel_tests::layout::{Image, Layer, Tar};
use carrel_tests::registry::Registry;
use carrel_tests::{Carrel, Running, fixtures, wait_for};

#[test]
fn a_debian_image_from_a_registry_runs_python_as_a_user_who_writes_files() {
    let carrel = Carrel::new();
    let registry = Registry::start(&carrel.scratch());
    let name = registry.push(&fixtures::image("debian"), "debian:12");
    carrel.run(&["pull", &name]).succeeds();
    let script = "import os, pathlib, platform\n\
                  path = pathlib.Path.home() / 'written'\n\
                  path.write_text('by python')\n\
                  print(os.getuid(), path.read_text(), platform.release())";
    let arguments = ["run", "-u", "reader", "-m", "512m", &name, "python3", "-c", script];
    let done = carrel.run(&arguments).succeeds();
    let mut words = done.text().split_whitespace();
    assert_eq!(words.next(), Some("1000"), "{done:?}");
    assert!(done.text().contains("by python"), "{done:?}");
    assert!(words.next_back().unwrap().starts_with("6.12."), "our kernel: {done:?}");
    // From the store alone: the registry is gone.
    drop(registry);
    let again = carrel.run(&["run", "--pull", "never", &name, "cat", "/etc/os-release"]).succeeds();
    assert!(again.text().contains("bookworm"), "{again:?}");
}

#[test]
fn two_at_once_from_one_image_do_not_see_each_others_writes() {
    let carrel = Carrel::new();
    let image = fixtures::busybox();
    let script = "test ! -e /work/mine || exit 1; echo $0 > /work/mine; sleep 3; cat /work/mine";
    let rooms: Vec<Running> =
        ["one", "two"].iter().map(|name| carrel.start(&["run", &image, "sh", "-c", script, name])).collect();
    let seen: Vec<String> = rooms.into_iter().map(|room| room.done().succeeds().text().to_owned()).collect();
    assert_eq!(seen, ["one\n", "two\n"]);
}

#[test]
fn a_pull_is_quiet_about_progress_where_there_is_no_terminal_and_lists_what_it_got() {
    let carrel = Carrel::new();
    let registry = Registry::start(&carrel.scratch());
    let name = registry.push(&fixtures::busybox(), "tools/busybox:1");
    let done = carrel.run(&["pull", &name]).succeeds();
    assert!(!done.errors().contains('\r') && !done.errors().contains('\x1b'), "{done:?}");
    let digest = carrel.run(&["pull", "-q", &name]).succeeds();
    assert!(digest.text().starts_with("sha256:"), "{digest:?}");
    let images = carrel.json(&["images", "--json"]);
    assert_eq!(images.as_array().unwrap().len(), 1, "{images}");
    assert_eq!(images[0]["digest"], digest.text().trim());
    assert!(images[0]["size_bytes"].as_u64().unwrap() > 100_000, "{images}");
    let table = carrel.run(&["images"]).succeeds();
    assert!(table.text().contains("tools/busybox"), "{table:?}");
    assert_eq!(carrel.run(&["images", "-q"]).succeeds().text(), digest.text());
}

#[test]
fn removed_images_are_gone_and_their_blobs_pruned() {
    let carrel = Carrel::new();
    let registry = Registry::start(&carrel.scratch());
    let name = registry.push(&fixtures::busybox(), "busybox:1");
    carrel.run(&["pull", &name]).succeeds();
    carrel.run(&["rmi", &name]).succeeds();
    assert_eq!(carrel.json(&["images", "--json"]), serde_json::json!([]));
    carrel.run(&["rmi", &name]).complains(1, &[&name]);
    carrel.run(&["prune"]).succeeds();
    let bytes = disk_usage(carrel.home());
    assert!(bytes < 512 << 10, "{bytes} bytes stay in the store");
}

#[test]
fn a_dry_run_of_prune_removes_nothing() {
    let carrel = Carrel::new();
    carrel.run(&["pull", &fixtures::busybox()]).succeeds();
    let before = carrel.json(&["images", "--json"]);
    carrel.run(&["prune", "--all", "--dry-run"]).succeeds();
    assert_eq!(carrel.json(&["images", "--json"]), before);
    carrel.run(&["prune", "--all"]).succeeds();
    assert_eq!(carrel.json(&["images", "--json"]), serde_json::json!([]));
}

#[test]
fn archives_of_both_kinds_run() {
    let carrel = Carrel::new();
    for kind in ["oci-archive", "docker-archive"] {
        let file = carrel.scratch().join(format!("{kind}.tar"));
        let to = if kind == "oci-archive" {
            format!("{kind}:{}:it", file.display())
        } else {
            format!("{kind}:{}:it:latest", file.display())
        };
        let copied = Command::new("skopeo")
            .args(["copy", "--quiet", "--insecure-policy", &fixtures::busybox(), &to])
            .status()
            .expect("skopeo is installed");
        assert!(copied.success());
        let done = carrel.run(&["run", &format!("{kind}:{}", file.display()), "echo", kind]).succeeds();
        assert_eq!(done.text(), format!("{kind}\n"));
    }
}

#[test]
fn a_layout_without_a_tag_runs_its_only_image() {
    let carrel = Carrel::new();
    let layout = format!("oci:{}", fixtures::path("busybox").display());
    assert_eq!(carrel.run(&["run", &layout, "echo", "untagged"]).succeeds().text(), "untagged\n");
}

#[test]
fn upper_layers_replace_and_remove_what_lower_ones_hold() {
    let carrel = Carrel::new();
    let lower = Tar::with_shell()
        .directory("etc")
        .file("etc/replaced", b"lower")
        .file("etc/removed", b"lower")
        .directory("opaque")
        .file("opaque/hidden", b"lower")
        .file_with_mode("bin/setuid", b"#!/bin/sh\n", 0o4755);
    let upper = Tar::new()
        .file("etc/replaced", b"upper")
        .file("etc/.wh.removed", b"")
        .file("opaque/.wh..wh..opq", b"")
        .file("opaque/shown", b"upper")
        .symlink("etc/link", "replaced");
    let image = Image::new(vec![Layer::plain(lower), Layer::gzip(&upper.bytes())]);
    let name = image.write(&carrel.scratch());
    let script = "cat /etc/replaced /etc/link; ls /opaque; test -e /etc/removed || echo gone; test -u /bin/setuid && echo setuid";
    let done = carrel.run(&["run", &name, "/bin/busybox", "sh", "-c", &with_busybox(script)]).succeeds();
    assert_eq!(done.text(), "upperuppershown\ngone\nsetuid\n");
}

/// busybox's shell finds its applets by itself only when it was built so; say each by name.
fn with_busybox(script: &str) -> String {
    format!("alias test='busybox test'; {script}")
}

#[test]
fn a_layer_compressed_with_zstd_runs() {
    let carrel = Carrel::new();
    let to = format!("oci:{}:latest", carrel.scratch().join("zstd").display());
    let copied = Command::new("skopeo")
        .args(["copy", "--quiet", "--insecure-policy", "--dest-compress-format", "zstd", "--dest-compress"])
        .args([&fixtures::busybox(), &to])
        .status()
        .expect("skopeo is installed");
    assert!(copied.success());
    assert_eq!(carrel.run(&["run", &to, "echo", "zstd"]).succeeds().text(), "zstd\n");
}

#[test]
fn long_names_hard_links_and_sparse_files_survive() {
    let carrel = Carrel::new();
    let tree = carrel.scratch().join("tree");
    let long = "long-name-".repeat(20);
    std::fs::create_dir_all(tree.join(&long)).unwrap();
    std::fs::write(tree.join(&long).join("file"), "deep").unwrap();
    std::fs::hard_link(tree.join(&long).join("file"), tree.join("linked")).unwrap();
    let sparse = std::fs::File::create(tree.join("sparse")).unwrap();
    sparse.set_len(64 << 20).unwrap();
    let layer = carrel.scratch().join("layer.tar");
    let made = Command::new("tar")
        .args(["--format=gnu", "--sparse", "--owner=0", "--group=0", "-cf"])
        .arg(&layer)
        .arg("-C")
        .arg(&tree)
        .arg(".")
        .status()
        .expect("tar is installed");
    assert!(made.success());
    let upper = Layer::gzip(&std::fs::read(&layer).unwrap());
    let image = Image::new(vec![Layer::plain(Tar::with_shell()), upper]);
    let name = image.write(&carrel.scratch().join("image"));
    let script = format!(
        "cat /{long}/file; busybox stat -c ' %h' /linked; busybox stat -c '%s' /sparse; busybox du -k /sparse | busybox cut -f1"
    );
    let done = carrel.run(&["run", &name, "sh", "-c", &script]).succeeds();
    let lines: Vec<&str> = done.text().lines().collect();
    assert_eq!(lines[..2], ["deep 2", "67108864"], "{done:?}");
    assert!(lines[2].parse::<u64>().unwrap() < 1024, "the hole is kept: {done:?}");
}

#[test]
fn an_interrupted_pull_leaves_a_store_that_the_next_pull_completes() {
    let carrel = Carrel::new();
    let registry = Registry::start(&carrel.scratch());
    let name = registry.push(&fixtures::image("debian"), "debian:12");
    let pulling = carrel.start(&["pull", &name]);
    wait_for("the first bytes", || (disk_usage(carrel.home()) > 64 << 10).then_some(()));
    let _ = rustix::process::kill_process(pulling.pid(), rustix::process::Signal::KILL);
    pulling.done();
    carrel.run(&["pull", &name]).succeeds();
    assert_eq!(carrel.json(&["images", "--json"]).as_array().unwrap().len(), 1);
}

/// Bytes in all files below a folder.
fn disk_usage(folder: &std::path::Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => disk_usage(&entry.path()),
            Ok(metadata) => metadata.len(),
            // It may be renamed while it is looked at.
            Err(_) => 0,
        })
        .sum()
}
