//! Images: from a real registry and from files, listed, removed, pruned; and what ordinary ones do in a room.

// A test fails by panicking, and so do the functions that tests share.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use carrel_tests::layout::{Image, Layer, Tar};
use carrel_tests::pty::Terminal;
use carrel_tests::registry::{READER, Registry, Request};
use carrel_tests::{Carrel, Running, fixtures, wait_for};
use rustix::process::Signal;
use serde_json::json;

#[test]
fn a_debian_image_from_a_registry_runs_python_as_a_user_who_writes_files() {
    let carrel = Carrel::with_own_store();
    let registry = Registry::start(&carrel.scratch());
    let name = registry.push(&fixtures::image("debian"), "debian:12");
    carrel.run(&["pull", &name]).succeeds();
    let script = "import os, pathlib, platform\n\
                  path = pathlib.Path.home() / 'written'\n\
                  path.write_text('by python')\n\
                  print(os.getuid(), path.read_text(), platform.release())";
    let arguments = ["run", "--cold", "-u", "reader", &name, "python3", "-c", script];
    let done = carrel.run(&arguments).succeeds();
    let mut words = done.text().split_whitespace();
    assert_eq!(words.next(), Some("1000"), "{done:?}");
    assert!(done.text().contains("by python"), "{done:?}");
    assert!(words.next_back().unwrap().ends_with("-carrel"), "our kernel, not the host's: {done:?}");
    // From the store alone: the registry is gone.
    drop(registry);
    let again = carrel.run(&["run", "--cold", "--pull", "never", &name, "cat", "/etc/os-release"]).succeeds();
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
    let carrel = Carrel::with_own_store();
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
    let carrel = Carrel::with_own_store();
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
    let carrel = Carrel::with_own_store();
    carrel.run(&["pull", &fixtures::busybox()]).succeeds();
    let before = carrel.json(&["images", "--json"]);
    carrel.run(&["prune", "--all", "--dry-run"]).succeeds();
    assert_eq!(carrel.json(&["images", "--json"]), before);
    carrel.run(&["prune", "--all"]).succeeds();
    assert_eq!(carrel.json(&["images", "--json"]), serde_json::json!([]));
}

#[test]
fn archives_of_both_kinds_run() {
    let carrel = Carrel::cold();
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
    let carrel = Carrel::cold();
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
    let carrel = Carrel::cold();
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
    let carrel = Carrel::cold();
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
    let carrel = Carrel::with_own_store();
    let registry = Registry::start(&carrel.scratch());
    let name = registry.push(&fixtures::image("debian"), "debian:12");
    let pulling = carrel.start(&["pull", &name]);
    let deadline = Instant::now() + carrel_tests::patience();
    while downloads(carrel.home()) < 1 << 20 {
        assert!(Instant::now() < deadline, "no megabyte came");
        std::thread::sleep(Duration::from_millis(1));
    }
    pulling.signal(Signal::KILL);
    pulling.done().ends_with(137);
    let there = downloads(carrel.home());
    assert!(there >= 1 << 20, "the pull was over before it was killed: {there} bytes are on their way");

    // The registry's own account of it, so that it isn't taken for the next pull's.
    let large = |request: &Request| request.is_blob() && request.bytes >= there;
    wait_for("the registry's notice", || registry.requests().iter().any(large).then_some(()));
    let before = registry.requests().len();
    carrel.run(&["pull", &name]).succeeds();
    let images = carrel.json(&["images", "--json"]);
    assert_eq!(images.as_array().unwrap().len(), 1);
    let requests = registry.requests();
    let blobs: Vec<_> = requests[before..].iter().filter(|request| request.is_blob()).collect();
    assert!(blobs.iter().any(|request| request.status == 206), "no range was asked for: {blobs:?}");
    // What had come didn't come again.
    let moved: u64 = blobs.iter().map(|request| request.bytes).sum();
    let whole = images[0]["size_bytes"].as_u64().unwrap();
    assert!(moved + there <= whole, "{moved} bytes came beside the {there} of {whole} that were there");
    let done = carrel.run(&["run", "--cold", "--pull", "never", &name, "echo", "whole"]).succeeds();
    assert_eq!(done.text(), "whole\n");
}

/// Bytes of downloads that are on their way (docs/store.md, *On disk*).
fn downloads(home: &Path) -> u64 {
    let bytes = |folder: &Path| -> u64 {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let parts = entries.filter(|entry| entry.file_name().to_string_lossy().ends_with(".part"));
        parts.filter_map(|entry| Some(entry.metadata().ok()?.len())).sum()
    };
    let folders = std::fs::read_dir(home).into_iter().flatten().flatten();
    bytes(&home.join("ingest")) + folders.map(|entry| bytes(&entry.path().join("ingest"))).sum::<u64>()
}

#[test]
fn a_registry_that_asks_who_pulls_is_told_by_dockers_configuration() {
    let carrel = Carrel::with_own_store();
    let registry = Registry::start_for_reader(&carrel.scratch());
    let name = registry.push(&fixtures::busybox(), "closed/busybox:1");
    let docker = carrel.scratch().join("docker");
    std::fs::create_dir(&docker).unwrap();
    let pull_as = |account: Option<(&str, &str)>| {
        // As `docker login` writes it.
        let accounts = account.map(|(user, password)| {
            let auth = base64(format!("{user}:{password}").as_bytes());
            serde_json::json!({ &registry.address: { "auth": auth } })
        });
        let document = serde_json::json!({ "auths": accounts.unwrap_or_else(|| serde_json::json!({})) });
        std::fs::write(docker.join("config.json"), document.to_string()).unwrap();
        let mut command = carrel.command(&["pull", &name]);
        Running::spawn(command.env("DOCKER_CONFIG", &docker)).done()
    };
    pull_as(None).complains(1, &["denies access", "docker login"]);
    pull_as(Some((READER.0, "wrong"))).complains(1, &["denies access", "docker login"]);
    assert_eq!(carrel.json(&["images", "--json"]), serde_json::json!([]));
    pull_as(Some(READER)).succeeds();
    let done = carrel.run(&["run", "--cold", "--pull", "never", &name, "echo", "let in"]).succeeds();
    assert_eq!(done.text(), "let in\n");
}

/// RFC 4648, section 4.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let number = group.iter().fold(0_usize, |number, byte| number << 8 | usize::from(*byte));
        let number = number << (8 * (3 - group.len()));
        for digit in 0..4 {
            let shown = DIGITS[number >> (18 - 6 * digit) & 63];
            text.push(if digit <= group.len() { char::from(shown) } else { '=' });
        }
    }
    text
}

#[test]
fn a_pull_on_a_terminal_shows_a_bar_and_takes_it_away_again() {
    let carrel = Carrel::with_own_store();
    let registry = Registry::start(&carrel.scratch());
    let name = registry.push(&fixtures::image("debian"), "debian:12");
    let mut command = carrel.command(&["pull", &name]);
    let (terminal, running) = Terminal::run(command.env("TERM", "xterm"), 24, 100);
    // So much of so much, and how fast: the layer has some fifty megabytes.
    terminal.wait_for(" MiB/");
    terminal.wait_for("iB/s");
    terminal.wait_for("█");
    running.done().succeeds();
    let shown = terminal.shown();
    // Erase in line (ECMA-48, EL): the last that is done to a bar. What is left after it is no bar.
    let (_, after) = shown.rsplit_once("\x1b[2K").unwrap_or_else(|| panic!("{shown:?}"));
    assert!(!after.contains("iB/s"), "{shown:?}");
}

/// Bytes in all files below a folder.
fn disk_usage(folder: &Path) -> u64 {
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

#[test]
fn an_images_stop_signal_is_what_stop_sends() {
    let carrel = Carrel::cold();
    let mut image = Image::new(vec![Layer::plain(Tar::with_shell())]);
    image.config = json!({ "StopSignal": "SIGUSR1" });
    let name = image.write(&carrel.scratch().join("image"));
    let script = "trap 'echo heard; exit 9' USR1; echo up; while :; do busybox sleep 0.1; done";
    carrel.detach(&["--name", "desk", &name, "sh", "-c", script]);
    carrel.wait_for_log("desk", "up");
    carrel.run(&["stop", "desk"]).succeeds();
    assert_eq!(carrel.run(&["wait", "desk"]).succeeds().text(), "9\n");
    assert_eq!(carrel.run(&["logs", "desk"]).succeeds().text(), "up\nheard\n");
}
