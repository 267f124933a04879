//! What carrel may leave behind on a machine, and must not: processes, cgroups, mounts, sockets, files.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// All that belongs to carrel on this machine, one line a thing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leftovers(BTreeSet<String>);

impl Leftovers {
    /// Looks around.
    pub fn now() -> Self {
        let mut all = BTreeSet::new();
        processes(&mut all);
        cgroups(Path::new("/sys/fs/cgroup"), &mut all);
        lines("/proc/self/mountinfo", "mount", &mut all);
        lines("/proc/net/unix", "socket", &mut all);
        for folder in ["/run", "/tmp", "/dev/shm"] {
            files(Path::new(folder), &mut all);
        }
        Self(all)
    }

    /// What is there that wasn't before, as text; empty if nothing is.
    pub fn beyond(&self, before: &Self) -> String {
        self.0.difference(&before.0).map(|line| format!("  {line}\n")).collect()
    }
}

fn processes(all: &mut BTreeSet<String>) {
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let pid = entry.file_name().to_string_lossy().into_owned();
        if !pid.bytes().all(|byte| byte.is_ascii_digit()) || pid == std::process::id().to_string() {
            continue;
        }
        // It may end while it is looked at. A zombie has no command line and is its parent's business.
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if name.starts_with("carrel") && !line.is_empty() && !line.contains("carrel-tests") {
            all.insert(format!("process {pid} {line}"));
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

fn lines(file: &str, kind: &str, all: &mut BTreeSet<String>) {
    let text = fs::read_to_string(file).unwrap_or_default();
    // 9p is the test bed's: another caller of the emulated host may have a directory shared meanwhile.
    for line in text.lines().filter(|line| line.contains("carrel") && !line.contains(" - 9p ")) {
        // A socket's line begins with its address in the kernel, which says nothing.
        let name = if kind == "socket" { line.rsplit(' ').next().unwrap_or(line) } else { line };
        all.insert(format!("{kind} {name}"));
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
