//! Clones that come and go, templates that are made, damaged, pruned and killed under way, and what is there after it: nothing more than before.
//!
//! A short form always runs; `scripts/test --soak` (`CARREL_TEST_SOAK`) does each as often as is promised. What is drawn at random follows from one
//! number, which is printed; `CARREL_TEST_SEED` gives it again. Kills of rooms that boot: kills.rs. Saving under load: snapshots.rs. The store alone, with
//! makers killed and disks full at any point: `store/tests/templates.rs`. The reader of state files alone: `vmm/src/snapshot/tests.rs`.

// A test fails by panicking, and so do the functions that tests share.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use carrel_tests::chance::Chance;
use carrel_tests::initramfs::assets_with_agent_and;
use carrel_tests::leftovers::Disk;
use carrel_tests::mounted::Mounted;
use carrel_tests::processes::{self, Process};
use carrel_tests::{Carrel, Done, Running, fixtures, times, wait_for};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Small, so that a template takes seconds under emulation.
const MEMORY: &str = "128m";

/// A room of the small image that says how it began.
fn line<'a>(image: &'a str, script: &'a str) -> [&'a str; 8] {
    ["run", "-m", MEMORY, "--timeline", image, "sh", "-c", script]
}

fn echo(carrel: &Carrel, what: &str) -> Done {
    let done = carrel.run(&line(&fixtures::busybox(), &format!("echo {what} | tee /said"))).succeeds();
    assert_eq!(done.text(), format!("{what}\n"), "{done:?}");
    done
}

/// How a room began, as its timeline says.
fn start(done: &Done) -> &str {
    let line = done.errors().lines().find(|line| line.starts_with("start: "));
    line.unwrap_or_else(|| panic!("no timeline: {done:?}")).trim_start_matches("start: ")
}

/// The only template's folder.
fn the_folder(carrel: &Carrel) -> PathBuf {
    let entries = fs::read_dir(carrel.store().join("templates")).unwrap().map(|entry| entry.unwrap().path());
    let all: Vec<PathBuf> = entries.filter(|path| path.join("template.json").exists()).collect();
    assert_eq!(all.len(), 1, "{all:?}");
    all.into_iter().next().unwrap()
}

// Cycles.

#[test]
fn clones_that_come_and_go_leave_nothing() {
    let carrel = Carrel::with_own_store();
    for n in 0..2 {
        echo(&carrel, &format!("first {n}"));
    }
    let folders = [carrel.home().to_owned(), carrel.store().to_owned()];
    let (disk, open) = (Disk::of(&folders), open_files());
    let cycles = times(12, 1000);
    for n in 0..cycles {
        let done = echo(&carrel, &format!("cycle {n}"));
        assert_eq!(start(&done), "clone", "cycle {n}");
        if n % 25 == 0 {
            carrel.expect_nothing_left();
            println!("cycle {n}: {} cgroups not yet freed", dying_cgroups());
        }
    }
    carrel.expect_nothing_left();
    assert_eq!(Disk::of(&folders).beyond(&disk), "", "after {cycles} cycles");
    // The kernel counts for each CPU and adds up by 32: what is left by a few cycles is seen, a handful is not. No process is left that would have one open.
    let more = open_files().saturating_sub(open);
    println!(
        "{cycles} cycles; {more} more open files on the host, {} cgroups not yet freed",
        dying_cgroups()
    );
    assert!(more < 64, "{more} more open files on the host after {cycles} cycles");
}

/// Rooms of a resident owner that come and go, every third one by a kill of its command, leave it as it was after the first few.
#[test]
fn a_resident_owners_rooms_that_come_and_go_leave_it_as_it_was() {
    let carrel = Carrel::with_own_store();
    let mut chance = Chance::new();
    let pool = carrel.start(&["pool", "--ready", "1"]);
    wait_for("the resident owner", || (carrel.run(&["pool", "status"]).status == 0).then_some(()));
    let folder = PathBuf::from(format!("/proc/{}", pool.pid().as_raw_nonzero()));
    // Descriptors and threads, when no room is there and one VMM is ready: what begins and ends meanwhile takes a moment.
    let at_rest = || {
        wait_for("an owner at rest", || {
            let status = carrel.json(&["pool", "status", "--json"]);
            let none = ["rooms", "starting", "memory_promised"].iter().all(|name| status[*name] == 0);
            let kinds = status["ready"].as_array()?.iter().filter(|kind| kind["memory_mib"] == 128);
            let ready: u64 = kinds.filter_map(|kind| kind["count"].as_u64()).sum();
            let entries = |name: &str| fs::read_dir(folder.join(name)).map_or(0, Iterator::count);
            if !(none && ready == 1) {
                println!("{status}");
                return None;
            }
            Some((entries("fd"), entries("task")))
        })
    };
    // Among the first few is a killed one, too: what the owner keeps for later is there.
    for n in 0..3 {
        echo(&carrel, &format!("first {n}"));
    }
    kill_one(&carrel, Duration::from_millis(300));
    let (before, folders) = (at_rest(), [carrel.home().to_owned(), carrel.store().to_owned()]);
    let disk = Disk::of(&folders);
    let cycles = times(12, 1000);
    for n in 0..cycles {
        if n % 3 != 2 {
            assert_eq!(start(&echo(&carrel, &format!("cycle {n}"))), "clone", "cycle {n}");
            continue;
        }
        let moment = Duration::from_micros(chance.below(1_500_000).try_into().unwrap());
        kill_one(&carrel, moment);
        println!("cycle {n}: killed after {moment:?}");
    }
    // A thread that has just ended may be there for a moment still.
    let mut after = at_rest();
    for _ in 0..20 {
        if after.0 <= before.0 && after.1 <= before.1 {
            break;
        }
        sleep(Duration::from_millis(500));
        after = at_rest();
    }
    println!("{before:?}, after {cycles} rooms {after:?}");
    assert!(after.0 <= before.0 && after.1 <= before.1, "{before:?}, after {cycles} rooms {after:?}");
    assert_eq!(Disk::of(&folders).beyond(&disk), "", "after {cycles} cycles");
    pool.signal(Signal::TERM);
    pool.done().succeeds();
    carrel.expect_nothing_left();
}

/// A room whose command is killed a moment after it was begun.
fn kill_one(carrel: &Carrel, moment: Duration) {
    let mut command = carrel.command(&["run", "-i", "-m", MEMORY, &fixtures::busybox(), "cat"]);
    let mut running = Running::spawn(command.stdin(std::process::Stdio::piped()));
    let input = running.stdin();
    sleep(moment);
    running.signal(Signal::KILL);
    drop(input);
    running.done().ends_with(137);
}

/// Open files of the whole host (proc(5), `file-nr`).
fn open_files() -> usize {
    let text = fs::read_to_string("/proc/sys/fs/file-nr").unwrap();
    text.split_whitespace().next().unwrap().parse().unwrap()
}

/// Cgroups that are removed and wait for memory that was charged to them (cgroup-v2.rst, `cgroup.stat`).
fn dying_cgroups() -> String {
    let text = fs::read_to_string("/sys/fs/cgroup/cgroup.stat").unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix("nr_dying_descendants ")).unwrap_or("?").to_owned()
}

// Kills.

#[derive(Clone, Copy, Debug)]
enum Victim {
    Command,
    Owner,
    Vmm,
    All,
}

/// Command, owner and VMM of the room that begins or runs now, those that there are.
fn processes_of(carrel: &Carrel, command: Pid) -> [Option<Pid>; 3] {
    let all = processes::all();
    let pid = |found: Option<&Process>| Pid::from_raw(found?.pid.try_into().ok()?);
    let home = carrel.home().to_str().unwrap();
    let owner = all.iter().find(|process| process.line.contains(" owner ") && process.line.contains(home));
    let vmm =
        owner.and_then(|owner| all.iter().find(|process| process.status("PPid") == Some(owner.pid.into())));
    [Some(command), pid(owner), pid(vmm)]
}

#[test]
fn a_clone_whose_command_owner_or_vmm_is_killed_at_a_random_moment_leaves_nothing() {
    let carrel = Carrel::with_own_store();
    let mut chance = Chance::new();
    let image = fixtures::busybox();
    echo(&carrel, "first");
    let folders = [carrel.home().to_owned(), carrel.store().to_owned()];
    let disk = Disk::of(&folders);
    for n in 0..times(12, 1000) {
        // Now and then the kill meets the making of a template.
        let making = chance.below(6) == 0;
        if making {
            carrel.run(&["template", "prune", "--all"]).succeeds();
        }
        let victim = [Victim::Command, Victim::Owner, Victim::Vmm, Victim::All][chance.below(4)];
        // Half of them at any moment of what it takes under emulation, half in the short time of which a start on hardware is made.
        let within = if making { 8_000_000 } else { 2_000_000 };
        let micros = if chance.below(2) == 0 { chance.below(within) } else { 1 << chance.below(21) };
        let moment = Duration::from_micros(micros.try_into().unwrap());
        let what = format!("cycle {n}: {victim:?} after {moment:?}{}", if making { ", making" } else { "" });
        println!("{what}");
        // It ends with its input: so that a room which survives does so too.
        let mut command = carrel.command(&["run", "-i", "-m", MEMORY, &image, "cat"]);
        let mut running = Running::spawn(command.stdin(std::process::Stdio::piped()));
        let input = running.stdin();
        sleep(moment);
        let there = processes_of(&carrel, running.pid());
        let meant = match victim {
            Victim::Command => vec![there[0]],
            Victim::Owner => vec![there[1]],
            Victim::Vmm => vec![there[2]],
            Victim::All => there.to_vec(),
        };
        let meant: Vec<Pid> = meant.into_iter().flatten().collect();
        // All of them stopped first, so that none sees another's end.
        for signal in [Signal::STOP, Signal::KILL] {
            for pid in &meant {
                // It may have ended by itself.
                let _ = kill_process(*pid, signal);
            }
        }
        drop(input);
        let done = running.done();
        match (victim, meant.is_empty()) {
            (Victim::Command | Victim::All, _) => assert_eq!(done.status, 137, "{what}: {done:?}"),
            (Victim::Owner | Victim::Vmm, true) => assert_eq!(done.status, 0, "{what}: {done:?}"),
            // The room may have been over, or have been one that was to become a template: then another begins, with a boot.
            (Victim::Owner | Victim::Vmm, false) => {
                assert!(done.status == 0 || done.status == 125, "{what}: {done:?}");
                assert!(!done.errors().contains("panicked at"), "{what}: {done:?}");
            }
        }
        // The next command sweeps, and after it nothing is there.
        carrel.run(&["ps", "-a"]).succeeds();
        carrel.expect_nothing_left();
        let rooms = fs::read_dir(carrel.home().join("rooms")).map_or(0, Iterator::count);
        assert_eq!(rooms, 0, "{what}: a room's directory is left");
    }
    // What is there is whole and of use.
    carrel.run(&["template", "verify"]).succeeds();
    assert_eq!(start(&echo(&carrel, "last")), "clone");
    let rest = Disk::of(&folders).beyond(&disk);
    // Of a template that was made anew the memory may take some pages more or less.
    assert!(rest.lines().all(|line| line.contains("/templates/")), "{rest}");
    the_folder(&carrel);
}

#[test]
fn a_room_whose_agent_dies_at_a_random_moment_leaves_nothing() {
    let carrel = Carrel::with_own_store();
    let assets = assets_with_agent_and(&carrel, Path::new(env!("CARGO_BIN_EXE_carrel-tests-killer")));
    let (mut starts, mut disk) = (Vec::new(), None);
    for n in 0..times(4, 1000) {
        let begun = Instant::now();
        let mut command =
            carrel.command(&["run", "-i", "-m", MEMORY, "--timeline", &fixtures::busybox(), "cat"]);
        command.env("CARREL_ASSETS", &assets).stdin(std::process::Stdio::piped());
        let mut running = Running::spawn(&mut command);
        // Held, so that nothing else ends it; the agent may die while a template is made, and does then in the room that boots instead.
        let input = running.stdin();
        wait_for("the agent's death", || running.has_ended().then_some(()));
        drop(input);
        let done = running.done().complains(125, &[]);
        println!("cycle {n}: {:?}, {}", begun.elapsed(), done.errors().replace('\n', " | "));
        starts.push(done.errors().contains("start: clone"));
        carrel.expect_nothing_left();
        let rooms = fs::read_dir(carrel.home().join("rooms")).map_or(0, Iterator::count);
        assert_eq!(rooms, 0, "cycle {n}: a room's directory is left");
        // From the first clone on nothing more is to come but the working set, of one that lived for long enough.
        if starts.contains(&true) {
            let folders = [carrel.home().to_owned(), carrel.store().to_owned()];
            let first = disk.get_or_insert_with(|| Disk::of(&folders));
            let more = Disk::of(&folders).beyond(first);
            assert!(more.lines().all(|line| line.contains("/working-set: ")), "cycle {n}: {more}");
        }
    }
    println!("{} of {} were clones", starts.iter().filter(|clone| **clone).count(), starts.len());
}

// A template and its users.

#[test]
fn processes_that_make_use_and_prune_a_template_at_once_all_succeed() {
    let carrel = Carrel::with_own_store();
    let until = Instant::now() + Duration::from_secs(times(25, 600).try_into().unwrap());
    let (clones, colds, removed) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let users: Vec<_> = (0..3)
            .map(|user| {
                let (carrel, clones, colds) = (&carrel, &clones, &colds);
                scope.spawn(move || {
                    let mut n = 0;
                    while Instant::now() < until || n == 0 {
                        let done = echo(carrel, &format!("user {user} run {n}"));
                        let count = if start(&done) == "clone" { clones } else { colds };
                        count.fetch_add(1, Ordering::Relaxed);
                        n += 1;
                    }
                })
            })
            .collect();
        for (how, pause) in
            [(&["template", "prune", "--all", "--json"][..], 1300), (&["template", "rm"], 1700)]
        {
            let (carrel, removed, over) = (&carrel, &removed, &over);
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    sleep(Duration::from_millis(pause));
                    removed.fetch_add(remove(carrel, how), Ordering::Relaxed);
                }
            });
        }
        // A user that fails must not leave the others waiting.
        let failed: Vec<_> = users.into_iter().filter_map(|user| user.join().err()).collect();
        over.store(true, Ordering::Relaxed);
        if let Some(failed) = failed.into_iter().next() {
            std::panic::resume_unwind(failed);
        }
    });
    let [clones, colds, removed] = [clones, colds, removed].map(AtomicUsize::into_inner);
    println!("{clones} clones and {colds} boots; {removed} times the template was removed");
    assert_eq!(colds, 0, "a template that somebody removes is made again, and not done without");
    assert!(removed > 0, "nobody removed anything");
    carrel.run(&["template", "verify"]).succeeds();
    carrel.expect_nothing_left();
}

/// Removes templates, and says how many. Another may be faster.
fn remove(carrel: &Carrel, how: &[&str]) -> usize {
    if how.contains(&"prune") {
        return carrel.json(how)["templates"].as_array().unwrap().len();
    }
    let keys = carrel.run(&["template", "ls", "-q"]).succeeds();
    let Some(key) = keys.text().lines().next() else { return 0 };
    let done = carrel.run(&[how, &[key]].concat());
    match done.status {
        0 => 1,
        _ => {
            done.complains(1, &["no template"]);
            0
        }
    }
}

// Damage.

#[test]
fn a_state_file_damaged_at_random_places_is_thrown_away_and_made_anew() {
    let carrel = Carrel::with_own_store();
    let mut chance = Chance::new();
    echo(&carrel, "first");
    for n in 0..times(4, 100) {
        let state = the_folder(&carrel).join("state");
        let good = fs::read(&state).unwrap();
        let mut bad = good.clone();
        let place = chance.below(good.len());
        let what = match chance.below(3) {
            0 => {
                bad.truncate(place);
                format!("round {n}: cut off at {place} of {}", good.len())
            }
            _ => {
                bad[place] ^= 1 << chance.below(8);
                format!("round {n}: a bit of byte {place} of {} turned", good.len())
            }
        };
        println!("{what}");
        // As good as new at a glance: fs-verity keeps the old file from being written.
        fs::remove_file(&state).unwrap();
        fs::write(&state, &bad).unwrap();
        let done = echo(&carrel, "well");
        assert_eq!(start(&done), "clone", "{what}: {done:?}");
        assert_ne!(fs::read(the_folder(&carrel).join("state")).unwrap(), bad, "{what}");
    }
    assert_eq!(start(&echo(&carrel, "last")), "clone");
    carrel.run(&["template", "verify"]).succeeds();
}

#[test]
fn verify_throws_a_template_away_whose_memory_or_disk_was_damaged() {
    let carrel = Carrel::with_own_store();
    let mut chance = Chance::new();
    for part in ["memory", "disk"] {
        echo(&carrel, "first");
        let file = the_folder(&carrel).join(part);
        let whole = fs::metadata(&file).unwrap();
        replace_with_a_bit_turned(&file, &mut chance);
        assert_eq!(
            fs::metadata(&file).unwrap().len(),
            whole.len(),
            "as long as it was: only reading it tells"
        );
        let done = carrel.run(&["template", "verify", "--json"]).ends_with(1);
        let said: Value = serde_json::from_str(done.text()).unwrap();
        assert_eq!(said[0]["status"], "damaged", "{done:?}");
        assert!(said[0]["damage"].as_str().unwrap().contains(part), "{done:?}");
        assert_eq!(carrel.json(&["template", "ls", "--json"]), serde_json::json!([]));
        carrel.expect_nothing_left();
    }
    assert_eq!(start(&echo(&carrel, "anew")), "clone");
    carrel.run(&["template", "verify"]).succeeds();
}

/// A copy in the file's place, holes kept, with one bit of what it holds turned.
fn replace_with_a_bit_turned(path: &Path, chance: &mut Chance) {
    const BLOCK: usize = 4096;
    let old = File::open(path).unwrap();
    let new = path.with_extension("new");
    let copy = File::options().read(true).write(true).create_new(true).open(&new).unwrap();
    let length = old.metadata().unwrap().len();
    copy.set_len(length).unwrap();
    let mut held = Vec::new();
    let mut at = 0;
    // What is held, by what lies between holes (lseek(2)).
    while let Ok(from) = rustix::fs::seek(&old, rustix::fs::SeekFrom::Data(at)) {
        let to = rustix::fs::seek(&old, rustix::fs::SeekFrom::Hole(from)).unwrap();
        let mut block = [0; BLOCK];
        for offset in (from..to).step_by(BLOCK) {
            let read = old.read_at(&mut block, offset).unwrap();
            copy.write_all_at(&block[..read], offset).unwrap();
            held.push(offset);
        }
        at = to;
    }
    let offset = held[chance.below(held.len())] + u64::try_from(chance.below(BLOCK)).unwrap();
    let mut byte = [0];
    copy.read_exact_at(&mut byte, offset).unwrap();
    byte[0] ^= 1 << chance.below(8);
    copy.write_all_at(&byte, offset).unwrap();
    copy.set_permissions(old.metadata().unwrap().permissions()).unwrap();
    println!("a bit of byte {offset} of {} turned", path.display());
    fs::rename(new, path).unwrap();
}

// No space.

#[test]
fn a_store_without_space_for_a_template_has_its_rooms_begin_cold_and_says_so() {
    let carrel = Carrel::with_own_store();
    let image = fixtures::busybox();
    let small = Mounted::tmpfs(&carrel.scratch().join("small"), "1g");
    let store = small.path().join("store");
    let run = |what: &str| {
        let script = format!("echo {what}");
        let mut command = carrel.command(&line(&image, &script));
        Running::spawn(command.env("CARREL_STORE", &store)).done().succeeds()
    };
    let none_is_there = |free: u64| {
        for folder in ["", "making", "going"] {
            let entries = fs::read_dir(store.join("templates").join(folder)).unwrap();
            let names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
            let foreign = names.iter().filter(|name| *name != "making" && *name != "going").count();
            assert_eq!(foreign, 0, "{folder}, with {free} KiB free: {names:?}");
        }
    };
    // The image is there, and how much its template takes is known.
    let done = run("made");
    assert_eq!((done.text(), start(&done)), ("made\n", "clone"));
    let takes = allocated(&store.join("templates"));
    let mut command = carrel.command(&["template", "prune", "--all"]);
    Running::spawn(command.env("CARREL_STORE", &store)).done().succeeds();
    let mut chance = Chance::new();
    for n in 0..times(3, 20) {
        // From hardly a page to three quarters of what it took: its memory is a little more or less each time.
        let free = match n {
            0 => 64 << 10,
            1 => takes / 2,
            _ => u64::try_from(chance.below((takes / 4 * 3).try_into().unwrap())).unwrap(),
        };
        let fill = small.fill_but(free);
        let done = run("cold");
        assert_eq!((done.text(), start(&done)), ("cold\n", "cold"), "{free} bytes free: {done:?}");
        let said =
            done.errors().lines().filter(|line| line.contains(" WARN ") && line.contains("space")).count();
        assert_eq!(said, 1, "{free} bytes free: {done:?}");
        none_is_there(free >> 10);
        fs::remove_file(fill).unwrap();
    }
    let done = run("again");
    assert_eq!((done.text(), start(&done)), ("again\n", "clone"));
}

/// What all files below a folder take of the disk, in bytes.
fn allocated(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries
        .map(|entry| match entry.metadata().unwrap() {
            folder if folder.is_dir() => allocated(&entry.path()),
            file => file.blocks() * 512,
        })
        .sum()
}
