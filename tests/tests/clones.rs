//! Rooms that begin as clones of a template: what they share, what each has of its own, and what becomes of templates that can't be used.

// A test fails by panicking, and so do the functions that tests share.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use carrel_tests::{Carrel, Done, fixtures};
use serde_json::Value;

/// Small, so that saving one takes seconds under emulation.
const MEMORY: &str = "128m";

fn run(carrel: &Carrel, script: &str) -> Done {
    carrel.run(&["run", "-m", MEMORY, "--timeline", &fixtures::busybox(), "sh", "-c", script])
}

/// How a room began, as its timeline says.
fn start(done: &Done) -> &str {
    let line = done.errors().lines().find(|line| line.starts_with("start: "));
    line.unwrap_or_else(|| panic!("no timeline: {done:?}")).trim_start_matches("start: ")
}

fn templates(carrel: &Carrel) -> Vec<Value> {
    carrel.json(&["template", "ls", "--json"]).as_array().unwrap().clone()
}

/// The only template's folder.
fn folder(carrel: &Carrel) -> PathBuf {
    let all: Vec<PathBuf> = fs::read_dir(carrel.store().join("templates"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("template.json").exists())
        .collect();
    assert_eq!(all.len(), 1, "{all:?}");
    all.into_iter().next().unwrap()
}

#[test]
fn every_start_of_an_image_is_a_clone_and_behaves_as_a_boot_does() {
    let carrel = Carrel::with_own_store();
    for n in 0..3 {
        let done = run(&carrel, "echo out; echo err >&2; exit 7").ends_with(7);
        assert_eq!(done.text(), "out\n");
        assert!(done.errors().contains("err\n"));
        assert_eq!(start(&done), "clone", "start {n}");
        for step in ["template found", "clone awake", "workload started", "first output"] {
            assert!(done.errors().contains(step), "{step}: {done:?}");
        }
        assert_eq!(done.errors().contains("template made"), n == 0, "{done:?}");
    }
    assert_eq!(templates(&carrel).len(), 1);
    let cold =
        carrel.run(&["run", "-m", MEMORY, "--cold", "--timeline", &fixtures::busybox(), "true"]).succeeds();
    assert_eq!(start(&cold), "cold");
    // Another machine is another template, and so is another domain.
    carrel.run(&["run", "-m", "160m", &fixtures::busybox(), "true"]).succeeds();
    carrel.run(&["run", "-m", MEMORY, "--domain", "other", &fixtures::busybox(), "true"]).succeeds();
    assert_eq!(templates(&carrel).len(), 3);
}

#[test]
fn two_clones_share_neither_random_numbers_nor_names_nor_what_they_write() {
    let carrel = Carrel::new();
    // The generator's first bytes, its device, the kernel's own ids (the boot's is drawn when it is first read), the hostname, and what the last room left on the disk.
    let script = "head -c 32 /dev/urandom | sha256sum; head -c 32 /dev/random | sha256sum; \
                  cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id; hostname; ls /left 2>&1; echo here > /left; cat /left";
    let said: Vec<Vec<String>> =
        (0..3).map(|_| run(&carrel, script).succeeds().text().lines().map(str::to_owned).collect()).collect();
    for line in 0..5 {
        let all: BTreeSet<&String> = said.iter().map(|lines| &lines[line]).collect();
        assert_eq!(all.len(), said.len(), "line {line} of {said:?}");
    }
    for lines in &said {
        assert!(lines[5].contains("No such file") && lines[6] == "here", "{lines:?}");
    }
}

#[test]
fn a_clone_knows_the_time_before_its_workload_runs() {
    let carrel = Carrel::new();
    run(&carrel, "true").succeeds();
    // A clone that believed its template's time would be late by this and the template's age.
    std::thread::sleep(std::time::Duration::from_secs(3));
    for _ in 0..2 {
        let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let done = run(&carrel, "date +%s").succeeds();
        let after = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let said: u64 = done.text().trim().parse().unwrap();
        assert!((before..=after).contains(&said), "{said} not in {before}..={after}");
    }
}

#[test]
fn a_crowd_that_asks_at_once_has_one_template_made() {
    let carrel = Carrel::with_own_store();
    let image = fixtures::busybox();
    let line = ["run", "-m", MEMORY, "--timeline", &image, "sh", "-c", "cat /proc/sys/kernel/random/uuid"];
    let crowd: Vec<_> = (0..5).map(|_| carrel.start(&line)).collect();
    let done: Vec<Done> = crowd.into_iter().map(|running| running.done().succeeds()).collect();
    assert_eq!(done.iter().filter(|done| done.errors().contains("template made")).count(), 1);
    assert!(done.iter().all(|done| start(done) == "clone"));
    let said: BTreeSet<&str> = done.iter().map(Done::text).collect();
    assert_eq!(said.len(), done.len(), "{said:?}");
    assert_eq!(templates(&carrel).len(), 1);
}

#[test]
fn a_damaged_template_never_runs_and_is_made_again() {
    let carrel = Carrel::with_own_store();
    run(&carrel, "true").succeeds();
    let state = folder(&carrel).join("state");
    let good = fs::read(&state).unwrap();
    let mut bad = good.clone();
    bad[good.len() / 2] ^= 1;
    for damaged in [bad, good[..good.len() - 1].to_vec(), Vec::new()] {
        fs::remove_file(&state).unwrap();
        fs::write(&state, damaged).unwrap();
        let done = run(&carrel, "echo well").succeeds();
        assert_eq!((done.text(), start(&done)), ("well\n", "clone"), "{done:?}");
        assert_eq!(fs::read(folder(&carrel).join("state")).unwrap().len(), good.len(), "made again");
        assert_eq!(start(&run(&carrel, "true").succeeds()), "clone");
    }
    carrel.run(&["template", "verify"]).succeeds();
}

/// What is whole in itself, but not what was saved with the rest.
#[test]
fn another_templates_state_and_an_empty_memory_are_found_out_and_made_again() {
    let carrel = Carrel::with_own_store();
    let image = fixtures::busybox();
    run(&carrel, "true").succeeds();
    let own = folder(&carrel);
    let (state, memory) = (own.join("state"), own.join("memory"));
    let good = fs::read(&state).unwrap();
    carrel.run(&["run", "-m", MEMORY, "--domain", "other", &image, "true"]).succeeds();
    let other = templates(&carrel).into_iter().map(|listed| listed["key"].as_str().unwrap().to_owned());
    let other =
        other.map(|key| carrel.store().join("templates").join(key)).find(|path| *path != own).unwrap();
    let foreign = fs::read(other.join("state")).unwrap();
    assert!(foreign != good && foreign.len() == good.len(), "of one shape, and not the same");
    fs::remove_file(&state).unwrap();
    fs::write(&state, &foreign).unwrap();
    let done = run(&carrel, "echo well").succeeds();
    assert_eq!((done.text(), start(&done)), ("well\n", "clone"), "{done:?}");
    assert!(done.errors().contains("state was changed"), "{done:?}");
    // The memory is as long as it was, so only its guest's end tells: it has no kernel any more.
    let length = fs::metadata(&memory).unwrap().len();
    fs::remove_file(&memory).unwrap();
    File::create(&memory).unwrap().set_len(length).unwrap();
    let done = run(&carrel, "echo well").succeeds();
    assert_eq!((done.text(), start(&done)), ("well\n", "clone"), "{done:?}");
    assert!(done.errors().contains("memory was changed"), "{done:?}");
    carrel.run(&["template", "verify"]).succeeds();
    // A detached room that never began is none: the one that began has its name.
    fs::remove_file(&memory).unwrap();
    File::create(&memory).unwrap().set_len(length).unwrap();
    let room = carrel.detach(&["--name", "desk", "-m", MEMORY, &image, "sleep", "600"]);
    let rooms = carrel.rooms(true);
    assert_eq!(rooms.len(), 1, "{rooms:?}");
    carrel.run(&["exec", "desk", "true"]).succeeds();
    carrel.run(&["rm", "--force", &room]).succeeds();
    carrel.expect_nothing_left();
}

/// Bytes of the page cache that are charged to a room's cgroup (cgroup-v2.rst, `memory.stat`).
fn page_cache_of(carrel: &Carrel, room: &str) -> u64 {
    let stats = carrel.json(&["stats", "--no-stream", "--json", room]);
    let id = stats[0]["room"].as_str().unwrap();
    let text = fs::read_to_string(format!("/sys/fs/cgroup/carrel/{id}/memory.stat")).unwrap();
    text.lines().find_map(|line| line.strip_prefix("file ")).unwrap().parse().unwrap()
}

#[test]
fn the_first_clone_does_not_pay_for_what_all_share() {
    let carrel = Carrel::with_own_store();
    let image = fixtures::busybox();
    run(&carrel, "true").succeeds();
    let folder = folder(&carrel);
    for name in ["memory", "disk"] {
        let file = File::open(folder.join(name)).unwrap();
        file.sync_all().unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    }
    let first = carrel.run(&["run", "-m", MEMORY, "--timeline", &image, "true"]).succeeds();
    assert!(first.errors().contains("template read ahead"), "{first:?}");
    for name in ["memory", "disk"] {
        let file = File::open(folder.join(name)).unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    }
    let held = fs::metadata(folder.join("memory")).unwrap().blocks() * 512;
    for n in 0..2 {
        let room = carrel.detach(&["-m", MEMORY, &image, "sleep", "600"]);
        // The kernel adds up every 2 s (FLUSH_TIME in mm/memcontrol.c).
        std::thread::sleep(std::time::Duration::from_secs(3));
        let charged = page_cache_of(&carrel, &room);
        println!("clone {n}: {charged} bytes of the page cache");
        // What the files hold is in no room's account; of their holes, which are zeros, what a guest touches is in the first one's.
        assert!(charged < held / 3, "clone {n} is charged {charged} bytes of the page cache, of {held}");
        carrel.run(&["rm", "--force", &room]).succeeds();
    }
    let second = carrel.run(&["run", "-m", MEMORY, "--timeline", &image, "true"]).succeeds();
    assert!(!second.errors().contains("template read ahead"), "it is there: {second:?}");
    carrel.expect_nothing_left();
}

#[test]
fn a_function_begins_as_a_clone() {
    let carrel = Carrel::with_own_store();
    let source = "def handler(event, context):\n    return {'got': event}\n";
    let zip = carrel_tests::functions::python(&carrel.scratch(), source);
    for _ in 0..2 {
        let line = [
            "invoke",
            "--timeline",
            "--timeout",
            "600s",
            "--runtime",
            "python3.11",
            "--handler",
            "app.handler",
            "--zip",
            &zip,
            "--event",
            "{\"a\":1}",
        ];
        let done = carrel.run(&line).succeeds();
        assert_eq!(serde_json::from_str::<Value>(done.text()).unwrap(), serde_json::json!({"got": {"a": 1}}));
        assert_eq!(start(&done), "clone");
    }
}

#[test]
fn a_template_made_ahead_of_need_is_found_and_old_ones_go_by_themselves() {
    let carrel = Carrel::with_own_store();
    let image = fixtures::busybox();
    let create = |memory: &str, more: &[&str]| {
        carrel.json(&[&["template", "create", "--json", "-m", memory], more, &[&image]].concat())
    };
    let made = create(MEMORY, &[]);
    assert_eq!((&made["made"], &made["point"]), (&Value::from(true), &Value::from("unpacked")));
    let again = create(MEMORY, &["--pin"]);
    assert_eq!(
        (&again["made"], &again["pinned"], &again["key"]),
        (&false.into(), &true.into(), &made["key"])
    );
    let done = run(&carrel, "true").succeeds();
    assert_eq!((start(&done), done.errors().contains("template made")), ("clone", false));
    carrel.run(&["template", "create", &image, "true"]).complains(1, &["--initialised"]);
    // One that nobody uses, and one that a room runs from, are there when there shall be none.
    create("144m", &[]);
    carrel.detach(&["--name", "user", "-m", "160m", &image, "sleep", "600"]);
    let mut command = carrel.command(&["template", "create", "--json", "-m", "176m", &image]);
    let last = carrel_tests::Running::spawn(command.env("CARREL_TEMPLATE_BYTES", "0")).done().succeeds();
    let last: Value = serde_json::from_str(last.text()).unwrap();
    let memory = |listed: &Value| listed["description"]["memory_mib"].as_u64().unwrap();
    let mut left: Vec<u64> = templates(&carrel).iter().map(memory).collect();
    left.sort_unstable();
    assert_eq!(left, [128, 160, 176], "the pinned one, that in use, the newest: {last}");
    carrel.run(&["rm", "--force", "user"]).succeeds();
}
