//! What carrel may leave behind on a machine, and must not: processes, cgroups, mounts, sockets, files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::processes;

/// What may stay of a detached room that has ended: docs/host.md, and its head in `home.rs`.
const RECORDED: [&str; 6] = ["lock", "room.json", "state.json", "owner.log", "log", "log.old"];

/// All that belongs to carrel on this machine, one line a thing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leftovers(BTreeSet<String>);

impl Leftovers {
    /// Looks around, and into a home and a store.
    pub fn now(home: &Path, store: &Path) -> Self {
        let mut all = BTreeSet::new();
        all.extend(
            processes::all().iter().map(|process| format!("process {} {}", process.pid, process.line)),
        );
        cgroups(Path::new("/sys/fs/cgroup"), &mut all);
        mounts(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default(), &mut all);
        sockets(&fs::read_to_string("/proc/net/unix").unwrap_or_default(), &mut all);
        for folder in ["/run", "/tmp", "/dev/shm"] {
            files(Path::new(folder), &mut all);
        }
        rooms(&home.join("rooms"), &mut all);
        ingests(&store.join("ingest"), &mut all);
        templates(&store.join("templates"), &mut all);
        Self(all)
    }

    /// What is there that wasn't before, as text; empty if nothing is.
    pub fn beyond(&self, before: &Self) -> String {
        self.0.difference(&before.0).map(|line| format!("  {line}\n")).collect()
    }
}

/// Files below some folders, and what they take of the disk, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Disk(BTreeMap<PathBuf, u64>);

impl Disk {
    /// Looks at all of it.
    pub fn of(folders: &[PathBuf]) -> Self {
        let mut all = BTreeMap::new();
        folders.iter().for_each(|folder| allocated(folder, &mut all));
        Self(all)
    }

    /// What is new, or takes more than before, as text; empty if nothing does.
    pub fn beyond(&self, before: &Self) -> String {
        let more = self.0.iter().filter(|(path, bytes)| before.0.get(*path).is_none_or(|then| then < bytes));
        more.map(|(path, bytes)| {
            let then = before.0.get(path).map_or("not there".to_owned(), |then| format!("{then} bytes"));
            format!("  {}: {bytes} bytes, before {then}\n", path.display())
        })
        .collect()
    }
}

fn allocated(folder: &Path, all: &mut BTreeMap<PathBuf, u64>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.metadata() {
            Ok(found) if found.is_dir() => allocated(&entry.path(), all),
            Ok(found) => drop(all.insert(entry.path(), found.blocks() * 512)),
            // It goes while it is looked at.
            Err(_) => {}
        }
    }
}

fn cgroups(folder: &Path, all: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let path = entry.path();
        // The parent of all rooms' cgroups may stay; a room's may not.
        let below = path.parent().is_some_and(|parent| parent.to_string_lossy().contains("carrel"));
        if below {
            all.insert(format!("cgroup {}", path.display()));
        }
        cgroups(&path, all);
    }
}

fn mounts(mountinfo: &str, all: &mut BTreeSet<String>) {
    // 9p is the test bed's: another caller of the emulated host may have a directory shared meanwhile.
    let ours = mountinfo.lines().filter(|line| line.contains("carrel") && !line.contains(" - 9p "));
    all.extend(ours.map(|line| format!("mount {line}")));
}

/// Sockets that are bound to a name of carrel's. An owner binds its own through `/proc/self/fd/N`, a path that all of them share, so
/// what tells one from another is its inode (the seventh word; the eighth, if there is one, is the path).
fn sockets(table: &str, all: &mut BTreeSet<String>) {
    for line in table.lines().skip(1) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, _, _, flags, _, _, inode, path] = words[..] else { continue };
        // An accepted connection has its listener's path; a listener is flagged (SO_ACCEPTCON).
        let listens = flags == "00010000";
        if listens && (path.contains("carrel") || path.ends_with("/owner.sock")) {
            all.insert(format!("socket {inode} {path}"));
        }
    }
}

fn files(folder: &Path, all: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.contains("carrel") && !name.starts_with("carrel-test") {
            all.insert(format!("file {}", entry.path().display()));
        }
    }
}

/// A room's folder goes with the room; a detached room's stays with its record and its log, and nothing else, until `rm`.
fn rooms(folder: &Path, all: &mut BTreeSet<String>) {
    for room in fs::read_dir(folder).into_iter().flatten().flatten() {
        let room = room.path();
        let record = fs::read(room.join("state.json")).unwrap_or_default();
        let record: Value = serde_json::from_slice(&record).unwrap_or_default();
        if record["phase"] != "ended" {
            all.insert(format!("room {}", room.display()));
            continue;
        }
        let remains = fs::read_dir(&room).into_iter().flatten().flatten();
        for file in remains.filter(|file| !RECORDED.contains(&file.file_name().to_string_lossy().as_ref())) {
            all.insert(format!("file {}", file.path().display()));
        }
    }
}

/// What was on its way into the store. Half a download (`.part`) is kept on purpose, to be resumed: docs/store.md.
fn ingests(folder: &Path, all: &mut BTreeSet<String>) {
    for file in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = file.file_name();
        if !name.to_string_lossy().ends_with(".part") {
            all.insert(format!("file {}", file.path().display()));
        }
    }
}

/// Templates that nobody made to the end, or removed to the end (docs/store.md).
fn templates(folder: &Path, all: &mut BTreeSet<String>) {
    for half in ["making", "going"] {
        for entry in fs::read_dir(folder.join(half)).into_iter().flatten().flatten() {
            all.insert(format!("template {}", entry.path().display()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(look: impl Fn(&mut BTreeSet<String>)) -> Vec<String> {
        let mut all = BTreeSet::new();
        look(&mut all);
        all.into_iter().collect()
    }

    #[test]
    fn an_owners_socket_is_seen_by_its_inode() {
        let table = "Num       RefCount Protocol Flags    Type St Inode Path\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 29901 /proc/self/fd/9/owner.sock\n\
            0000000000000000: 00000003 00000000 00000000 0001 03 29902 /proc/self/fd/9/owner.sock\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 29903 @carrel-test\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 29904 /run/dbus/socket\n\
            0000000000000000: 00000003 00000000 00000000 0001 03 29905\n";
        assert_eq!(
            seen(|all| sockets(table, all)),
            ["socket 29901 /proc/self/fd/9/owner.sock", "socket 29903 @carrel-test"]
        );
    }

    #[test]
    fn the_test_beds_own_mounts_are_not_carrels() {
        let table = "30 1 0:9 / /work/carrel rw - 9p shared rw\n31 1 0:8 / /run/carrel rw - tmpfs tmpfs rw\n32 1 0:7 / /tmp rw - tmpfs t rw\n";
        assert_eq!(seen(|all| mounts(table, all)), ["mount 31 1 0:8 / /run/carrel rw - tmpfs tmpfs rw"]);
    }

    #[test]
    fn a_room_that_has_ended_may_leave_its_record_and_its_log_alone() {
        let home = tempfile::tempdir().unwrap();
        let room = |id: &str, phase: &str, files: &[&str]| {
            let folder = home.path().join(id);
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join("state.json"), format!(r#"{{"phase":"{phase}"}}"#)).unwrap();
            files.iter().for_each(|name| fs::write(folder.join(name), "").unwrap());
        };
        room("a", "running", &["lock"]);
        room("b", "ended", &["lock", "room.json", "log", "log.old", "owner.log"]);
        room("c", "ended", &["owner.sock", "disk"]);
        let expected = ["file c/disk", "file c/owner.sock", "room a"];
        let strip = |line: &String| line.replace(&format!("{}/", home.path().display()), "");
        assert_eq!(seen(|all| rooms(home.path(), all)).iter().map(strip).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn a_file_that_is_new_or_grew_is_told_and_one_that_went_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::create_dir(path("below")).unwrap();
        for name in ["same", "gone", "below/grows"] {
            fs::write(path(name), [1; 100]).unwrap();
        }
        let look = || Disk::of(&[folder.path().to_owned()]);
        let before = look();
        assert_eq!(look().beyond(&before), "");
        fs::remove_file(path("gone")).unwrap();
        fs::write(path("below/grows"), [1; 100_000]).unwrap();
        fs::write(path("empty"), "").unwrap();
        let said = look().beyond(&before);
        let lines: Vec<&str> = said.lines().collect();
        assert_eq!(lines.len(), 2, "{said}");
        assert!(
            lines[0].contains("below/grows: ") && lines[1].contains("empty: 0 bytes, before not there"),
            "{said}"
        );
    }

    #[test]
    fn a_template_that_is_half_made_or_half_gone_is_left_over_and_a_whole_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["0a", "making/0b", "going/0c-7"] {
            fs::create_dir_all(folder.path().join(name)).unwrap();
        }
        let seen = seen(|all| templates(folder.path(), all));
        assert!(
            matches!(&seen[..], [gone, made] if gone.ends_with("going/0c-7") && made.ends_with("making/0b")),
            "{seen:?}"
        );
    }

    #[test]
    fn what_has_no_name_yet_is_left_over_and_what_the_store_resumes_is_not() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["sha256-1.part", "sha256-1.copy", "new-3-1"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let seen = seen(|all| ingests(folder.path(), all));
        assert!(
            matches!(&seen[..], [new, copy] if new.ends_with("/new-3-1") && copy.ends_with("/sha256-1.copy")),
            "{seen:?}"
        );
    }
}
