//! Templates between processes: this very program is executed again, in a role, as often as a case needs it.

// A test fails by panicking, and so do the functions that tests share.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeSet;
use std::env;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use carrel_store::templates::{
    Acquired, Damage, Maker, Part, Point, TemplateError, TemplatePolicy, as_long_as_it_takes, not_at_all,
};
use carrel_store::{Store, Template, TemplateKey, Templates};
use serde_json::json;

const MEMORY: u64 = 1 << 20;
const DISK: u64 = 4 << 20;

fn key(number: u64) -> TemplateKey {
    TemplateKey::of(&json!({ "number": number })).unwrap()
}

fn templates(root: &Path) -> Templates {
    Store::open(root).unwrap().templates().clone()
}

/// Every template's content follows from its key: so a mix of two would be seen.
fn content(key: &TemplateKey) -> Vec<u8> {
    key.as_str().bytes().cycle().take(10_000).collect()
}

/// Writes what belongs to a key, piece by piece, as a VMM would.
fn fill(maker: &mut Maker) -> Result<(), TemplateError> {
    let written = |file: &File, at: u64, bytes: &[u8]| {
        let full = |source| TemplateError::NoSpace { root: PathBuf::new(), source };
        file.write_all_at(bytes, at).map_err(full)
    };
    let content = content(maker.key());
    let (state, memory, disk) = (maker.state()?, maker.memory(MEMORY)?, maker.disk(DISK)?);
    for (file, offsets) in
        [(&state, &[0][..]), (&memory, &[0, 40_960, 500_000]), (&disk, &[1 << 20, 3 << 20])]
    {
        for at in offsets {
            written(file, *at, &content)?;
        }
    }
    Ok(())
}

fn publish(mut maker: Maker) -> Result<Template, TemplateError> {
    fill(&mut maker)?;
    let number = maker.key().to_string();
    maker.publish(Point::Unpacked, json!({ "key": number }))
}

/// That a template is what was published under its key, read through the descriptors that one has of it.
fn check(template: &Template, key: &TemplateKey) {
    assert_eq!(template.key(), key);
    assert_eq!(template.record().description["key"], key.as_str());
    let content = content(key);
    for (part, at) in [(Part::State, 0), (Part::Memory, 40_960), (Part::Disk, 3 << 20)] {
        let mut bytes = vec![0; content.len()];
        template.file(part).read_exact_at(&mut bytes, at).unwrap();
        assert!(bytes == content, "{part} of {key} has another content");
    }
    assert!(template.verify().is_none());
}

/// After a sweep: whole templates, and nothing else.
fn nothing_else_is_left(root: &Path) {
    let templates = templates(root);
    for folder in ["making", "going"] {
        let left: Vec<_> = fs::read_dir(root.join("templates").join(folder)).unwrap().collect();
        assert!(left.is_empty(), "{folder}: {left:?}");
    }
    for listed in templates.list().unwrap() {
        listed.record.unwrap_or_else(|damage| panic!("{}: {damage}", listed.key));
        check(&templates.find(&listed.key).unwrap().unwrap(), &listed.key);
    }
    for entry in fs::read_dir(root.join("templates")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(["making", "going"].contains(&&*name) || name.parse::<TemplateKey>().is_ok(), "{name}");
    }
}

/// Numbers that look random and are the same in every run (xorshift64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Starts this program in a role; `before` are the words that stand in front of it.
fn start(before: &[&str], role: &str, root: &Path, number: u64) -> Child {
    let program = env::current_exe().unwrap();
    let mut words: Vec<&str> = before.to_vec();
    words.push(program.to_str().unwrap());
    Command::new(words[0])
        .args(&words[1..])
        .args(["--exact", "role", "--ignored", "--nocapture", "--test-threads=1"])
        .env("TEMPLATES_ROLE", role)
        .env("TEMPLATES_ROOT", root)
        .env("TEMPLATES_NUMBER", number.to_string())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

fn all_succeed(children: Vec<Child>) {
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
}

#[test]
#[ignore = "a process of the other tests"]
fn role() {
    let root = PathBuf::from(env::var_os("TEMPLATES_ROOT").expect("the other tests say which"));
    let number = env::var("TEMPLATES_NUMBER").unwrap().parse().unwrap();
    match env::var("TEMPLATES_ROLE").unwrap().as_str() {
        "crowd" => crowd(&root, number),
        "make for ever" => make_for_ever(&root, number),
        "make, use, prune" => make_use_prune(&root, number),
        "fill up" => fill_up(&root),
        "verity" => verity(&root),
        other => panic!("{other}"),
    }
}

/// So many threads that all want the same template.
fn crowd(root: &Path, threads: u64) {
    let templates = templates(root);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                match templates.acquire(&key(1), as_long_as_it_takes) {
                    Ok(Acquired::Ready(template)) => check(&template, &key(1)),
                    Ok(Acquired::Make(maker)) => {
                        let log = File::options().append(true).create(true).open(root.join("made")).unwrap();
                        (&log).write_all(b"made\n").unwrap();
                        // Long enough that everybody else is waiting.
                        thread::sleep(Duration::from_millis(300));
                        check(&publish(maker).unwrap(), &key(1));
                    }
                    Ok(Acquired::Busy) => panic!("nobody gave up"),
                    Err(error) => panic!("{error}"),
                }
            });
        }
    });
}

#[test]
fn of_a_hundred_that_ask_at_once_one_makes_and_all_have_it() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    all_succeed((0..5).map(|_| start(&[], "crowd", root, 20)).collect());
    assert_eq!(fs::read_to_string(root.join("made")).unwrap(), "made\n");
    nothing_else_is_left(root);
}

/// Makes templates and removes them again, until it is killed.
fn make_for_ever(root: &Path, seed: u64) {
    let templates = templates(root);
    let mut numbers = Numbers(seed);
    File::create(root.join("begun")).unwrap();
    loop {
        let key = key(numbers.below(3));
        match templates.acquire(&key, as_long_as_it_takes).unwrap() {
            Acquired::Ready(_) => templates.remove(&key).unwrap(),
            Acquired::Make(maker) => drop(publish(maker).unwrap()),
            Acquired::Busy => panic!("nobody gave up"),
        }
    }
}

#[test]
fn a_maker_that_is_killed_at_any_moment_leaves_whole_templates_and_nothing_else() {
    const ROUNDS: u64 = 40;
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    let (mut unfinished, mut finished) = (0, 0);
    for round in 1..=ROUNDS {
        let mut child = start(&[], "make for ever", root, round);
        let begun = Instant::now();
        while !root.join("begun").exists() {
            assert!(begun.elapsed() < Duration::from_secs(60), "it does not begin");
            thread::sleep(Duration::from_micros(200));
        }
        thread::sleep(Duration::from_micros(numbers.below(25_000)));
        child.kill().unwrap();
        child.wait().unwrap();
        fs::remove_file(root.join("begun")).unwrap();
        let left = |folder| fs::read_dir(root.join("templates").join(folder)).unwrap().count();
        unfinished += u64::from(left("making") + left("going") > 0);
        nothing_else_is_left(root);
        finished += u64::from(!templates(root).list().unwrap().is_empty());
        // Its place is free at once.
        let templates = templates(root);
        if let Acquired::Make(maker) = templates.acquire(&key(round % 3), not_at_all).unwrap() {
            check(&publish(maker).unwrap(), &key(round % 3));
        }
        templates.prune(&TemplatePolicy { all: true, ..TemplatePolicy::default() }).unwrap();
    }
    eprintln!("{unfinished} of {ROUNDS} kills hit a making or a removal, {finished} left a whole template");
    assert!(unfinished > 0, "no kill hit anything: the test shows nothing");
}

#[test]
fn the_next_in_line_makes_it_when_the_maker_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let templates = templates(root);
    // Holds key 1's place for the whole of its sleep.
    let mut child = start(&[], "crowd", root, 1);
    let begun = Instant::now();
    while !root.join("made").exists() {
        assert!(begun.elapsed() < Duration::from_secs(60), "it does not begin");
        thread::sleep(Duration::from_millis(1));
    }
    let killed = thread::scope(|scope| {
        let next = scope.spawn(|| templates.acquire(&key(1), as_long_as_it_takes));
        thread::sleep(Duration::from_millis(20));
        assert!(!next.is_finished(), "the maker lives");
        child.kill().unwrap();
        child.wait().unwrap();
        let killed = Instant::now();
        match next.join().unwrap().unwrap() {
            Acquired::Make(maker) => check(&publish(maker).unwrap(), &key(1)),
            other @ (Acquired::Ready(_) | Acquired::Busy) => panic!("{other:?}"),
        }
        killed
    });
    assert!(killed.elapsed() < Duration::from_secs(20));
    nothing_else_is_left(root);
}

/// Does all that can be done to three templates, for a second.
fn make_use_prune(root: &Path, seed: u64) {
    let templates = templates(root);
    let mut numbers = Numbers(seed);
    let begun = Instant::now();
    let mut held = Vec::new();
    while begun.elapsed() < Duration::from_secs(1) {
        let key = key(numbers.below(3));
        match numbers.below(16) {
            0 => {
                let policy =
                    TemplatePolicy { most_bytes: Some(numbers.below(200_000)), ..TemplatePolicy::default() };
                templates.prune(&policy).unwrap();
            }
            1 => drop(templates.remove(&key)),
            2 => {
                let verified = templates.verify(&key).unwrap();
                assert!(verified.is_none_or(|verified| verified.damage.is_none()), "{key} was damaged");
            }
            3 => assert!(templates.list().unwrap().iter().all(|listed| listed.record.is_ok())),
            4 => drop(templates.sweep(false).unwrap()),
            5 => match templates.acquire(&key, not_at_all).unwrap() {
                // Given up half-way.
                Acquired::Make(mut maker) => drop(fill(&mut maker)),
                Acquired::Ready(_) | Acquired::Busy => {}
            },
            6 => match templates.pin(&key).and_then(|()| templates.unpin(&key)) {
                Ok(()) | Err(TemplateError::Unknown(_)) => {}
                Err(error) => panic!("{error}"),
            },
            _ => {
                let template = match templates.acquire(&key, as_long_as_it_takes).unwrap() {
                    Acquired::Ready(template) => *template,
                    Acquired::Make(maker) => publish(maker).unwrap(),
                    Acquired::Busy => panic!("nobody gave up"),
                };
                check(&template, &key);
                held.push((template, key));
            }
        }
        if held.len() > 8 {
            let (template, key) = held.remove(0);
            check(&template, &key);
        }
    }
    assert!(!held.is_empty());
}

#[test]
fn processes_that_make_use_and_prune_the_same_templates_at_once_see_whole_ones_only() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    all_succeed((1..=4).map(|seed| start(&[], "make, use, prune", root, seed * 7919)).collect());
    nothing_else_is_left(root);
}

/// Makes a template on a disk with ever more space left, until there is enough.
fn fill_up(root: &Path) {
    const PAGE: usize = 4096;
    let status =
        Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "none"]).arg(root).status().unwrap();
    assert!(status.success());
    let store = root.join("store");
    let templates = templates(&store);
    let empty = used(root);
    let mut full_at = BTreeSet::new();
    for left in 0..200 {
        let mut ballast = File::create(root.join("ballast")).unwrap();
        while ballast.write_all(&[1; PAGE]).is_ok() {}
        let length = ballast.metadata().unwrap().size() - left * PAGE as u64;
        ballast.set_len(length).unwrap();
        let made = templates.acquire(&key(1), not_at_all).and_then(|acquired| match acquired {
            Acquired::Make(maker) => publish(maker),
            other @ (Acquired::Ready(_) | Acquired::Busy) => panic!("{other:?}"),
        });
        fs::remove_file(root.join("ballast")).unwrap();
        drop(ballast);
        match made {
            Ok(template) => {
                check(&template, &key(1));
                assert!(full_at.len() >= 3, "it was full at {full_at:?} only");
                drop(template);
                templates.remove(&key(1)).unwrap();
                assert_eq!(used(root), empty);
                return;
            }
            Err(TemplateError::NoSpace { root: at, source }) => {
                assert_eq!(source.kind(), io::ErrorKind::StorageFull);
                full_at.insert(left);
                assert!(at.as_os_str().is_empty() || at.starts_with(&store), "{}", at.display());
            }
            Err(error) => panic!("with {left} pages left: {error}"),
        }
        // Without a sweep.
        for folder in ["making", "going"] {
            assert_eq!(fs::read_dir(store.join("templates").join(folder)).unwrap().count(), 0, "{left}");
        }
        assert!(templates.find(&key(1)).unwrap().is_none());
        assert_eq!(used(root), empty, "{left} pages left");
    }
    panic!("a template needs more than 200 pages");
}

/// Blocks that are taken of a file system.
fn used(root: &Path) -> u64 {
    let now = rustix::fs::statvfs(root).unwrap();
    now.f_blocks - now.f_bfree
}

#[test]
fn a_disk_that_is_full_at_any_point_is_said_and_nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    // A mount namespace of its own, so that the disk goes with the process.
    let unshare = ["unshare", "--user", "--map-root-user", "--mount"];
    all_succeed(vec![start(&unshare, "fill up", folder.path(), 0)]);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "it was another process's disk");
}

/// Makes templates on an ext4 with fs-verity, flips a bit on the disk below, and looks who notices.
fn verity(root: &Path) {
    const MARK: &[u8; 4096] = &[0xc5; 4096];
    let (disk, place) = (root.join("disk"), root.join("place"));
    File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    fs::create_dir(&place).unwrap();
    let run = |program: &str, words: &[&str], last: &[&Path]| {
        Command::new(program).args(words).args(last).stderr(Stdio::null()).status().unwrap().success()
    };
    // Loops need the machine's own root. Mounted by two steps: a kernel that lets nobody write to what is mounted finds `mount -o loop` writing.
    let mount = || {
        let looped = Command::new("losetup").args(["--find", "--show"]).arg(&disk).output().unwrap();
        let device = PathBuf::from(String::from_utf8(looped.stdout).unwrap().trim());
        // Detached now, it goes with the mount.
        looped.status.success() && {
            let mounted = run("mount", &[], &[&device, &place]);
            run("losetup", &["--detach"], &[&device]) && mounted
        }
    };
    assert!(run("mkfs.ext4", &["-q", "-b", "4096", "-O", "verity"], &[&disk]));
    let has_verity = Path::new("/sys/fs/ext4/features/verity").exists();
    if !has_verity || !mount() {
        eprintln!("no file system with fs-verity can be had here");
        let template = make_marked(&place, MARK).unwrap();
        assert!(Part::ALL.iter().all(|part| !template.record().part(*part).verity));
        return;
    }
    let template = make_marked(&place, MARK).unwrap();
    let checked = Part::ALL.map(|part| template.record().part(part).verity);
    // Before Linux 6.17 fs-verity hashes by the crypto API, which may lack SHA-256 (ENOPKG).
    if checked == [false; 3] && !fs::read_to_string("/proc/crypto").unwrap_or_default().contains("sha256") {
        eprintln!("this kernel has fs-verity without SHA-256");
        return;
    }
    assert_eq!(checked, [true; 3]);
    assert!(template.verify().is_none());
    let path = place.join("templates").join(key(1).as_str()).join("memory");
    assert!(File::options().write(true).open(path).is_err(), "root can write to it");
    drop(template);

    // Whoever still could write is an error: here a VMM that did not end.
    let templates = Templates::open(&place).unwrap();
    let Acquired::Make(mut maker) = templates.acquire(&key(2), not_at_all).unwrap() else {
        panic!("there is one")
    };
    fill(&mut maker).unwrap();
    let memory = maker.memory(MEMORY).unwrap();
    let error = maker.publish(Point::Unpacked, json!({})).unwrap_err();
    assert!(matches!(error, TemplateError::StillWritten(Part::Memory)), "{error}");
    drop(memory);
    assert!(templates.find(&key(2)).unwrap().is_none());

    assert!(run("umount", &[], &[&place]));
    let content = fs::read(&disk).unwrap();
    let at = content.chunks(4096).position(|block| block == MARK).unwrap() * 4096;
    File::options().write(true).open(&disk).unwrap().write_all_at(&[0xc4], at as u64 + 1000).unwrap();
    assert!(mount());
    let template = templates.find(&key(1)).unwrap().expect("nothing is to be seen at a glance");
    let mut byte = [0];
    assert!(template.file(Part::Memory).read_exact_at(&mut byte, 40_960).is_err(), "a clone would run on it");
    template.file(Part::Memory).read_exact_at(&mut byte, 0).unwrap();
    let damage = templates.verify(&key(1)).unwrap().unwrap().damage.unwrap();
    assert!(matches!(damage, Damage::Unreadable("memory", _)), "{damage}");
    assert!(templates.find(&key(1)).unwrap().is_none());
    drop(template);
    eprintln!("fs-verity noticed");
}

/// A template whose memory has a page of these bytes at 40,960.
fn make_marked(root: &Path, mark: &[u8]) -> Result<Template, TemplateError> {
    let Acquired::Make(mut maker) = Templates::open(root)?.acquire(&key(1), not_at_all)? else {
        panic!("there is one")
    };
    fill(&mut maker)?;
    maker.memory(MEMORY)?.write_all_at(mark, 40_960).unwrap();
    maker.publish(Point::Unpacked, json!({}))
}

#[test]
fn the_file_system_checks_what_is_read_where_it_can_and_the_record_says_whether() {
    let folder = tempfile::tempdir().unwrap();
    let own_mounts: &[&str] = if rustix::process::geteuid().is_root() {
        &["unshare", "--mount"]
    } else {
        &["unshare", "--user", "--map-root-user", "--mount"]
    };
    all_succeed(vec![start(own_mounts, "verity", folder.path(), 0)]);
}
