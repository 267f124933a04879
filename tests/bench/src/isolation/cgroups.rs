//! Where the bench and all that it starts lives, so that nothing outlives it.
//!
//! ```text
//!  /sys/fs/cgroup/carrel-bench-PID/      locked (flock) by the bench while it lives
//!      bench/                            the bench itself
//!      room-N/                           killed and removed with its room
//!          own/                          what was started
//!          …                             what runc and crun make for their container
//! ```
//!
//! A bench that was killed leaves a tree that nobody locks: the next one kills what is in it and removes it.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};

const ROOT: &str = "/sys/fs/cgroup";
const PREFIX: &str = "carrel-bench-";
/// How long the kernel may take to let go of what was killed.
const GONE: Duration = Duration::from_secs(30);

/// The bench's own part of the hierarchy.
pub(crate) struct Tree {
    path: PathBuf,
    /// Where the bench was before.
    before: PathBuf,
    next: AtomicU32,
    /// Held to the end, and given back by the kernel whatever that is.
    _lock: Flock<File>,
}

impl Tree {
    /// Removes what a killed bench has left, makes the tree and moves the bench into it.
    pub(crate) fn new() -> Result<Self> {
        sweep();
        let path = Path::new(ROOT).join(format!("{PREFIX}{}", std::process::id()));
        let why = "a bench needs cgroup v2 at /sys/fs/cgroup, and root";
        let controllers = fs::read_to_string(Path::new(ROOT).join("cgroup.controllers")).context(why)?;
        let wanted: Vec<String> = ["memory", "pids", "cpu"]
            .into_iter()
            .filter(|name| controllers.split_whitespace().any(|there| there == *name))
            .map(|name| format!("+{name}"))
            .collect();
        let wanted = wanted.join(" ");
        fs::write(Path::new(ROOT).join("cgroup.subtree_control"), &wanted).context(why)?;
        fs::create_dir(&path).context(why)?;
        let lock = Flock::lock(File::open(&path)?, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, errno)| io::Error::from(errno))?;
        let before = Path::new(ROOT).join(of(std::process::id()).unwrap_or_default());
        let tree = Self { path, before, next: AtomicU32::new(0), _lock: lock };
        fs::write(tree.path.join("cgroup.subtree_control"), &wanted)?;
        let own = tree.path.join("bench");
        fs::create_dir(&own)?;
        fs::write(own.join("cgroup.procs"), "0")?;
        Ok(tree)
    }

    /// A new room's cgroup.
    pub(crate) fn room(&self) -> Result<RoomCgroup> {
        let path = self.path.join(format!("room-{}", self.next.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir(&path).with_context(|| format!("{} can't be made", path.display()))?;
        let room = RoomCgroup { path };
        fs::create_dir(room.path.join("own"))?;
        Ok(room)
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let _ = fs::write(self.before.join("cgroup.procs"), "0");
        remove(&self.path);
    }
}

/// A room's own part of the tree; what is in it is killed when this is dropped.
#[derive(Debug)]
pub(crate) struct RoomCgroup {
    path: PathBuf,
}

impl RoomCgroup {
    /// Open for a child to write itself into.
    pub(crate) fn procs(&self) -> Result<OwnedFd> {
        let path = self.path.join("own/cgroup.procs");
        Ok(File::options().write(true).open(&path).with_context(|| path.display().to_string())?.into())
    }

    /// As a container runtime wants a path: from the hierarchy's root, for a cgroup that it makes.
    pub(crate) fn for_container(&self) -> String {
        let below = self.path.strip_prefix(ROOT).unwrap_or(&self.path);
        format!("/{}/container", below.display())
    }

    /// Processes in it and below, and all their descendants, wherever those are, by a look at every process's parent.
    pub(crate) fn processes(&self, parents: &[(u32, u32)]) -> Vec<u32> {
        let mut found = Vec::new();
        for path in tree_of(&self.path) {
            let text = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
            for pid in text.lines().filter_map(|line| line.parse().ok()) {
                found.extend(crate::meter::family_in(parents, pid));
            }
        }
        found.sort_unstable();
        found.dedup();
        found
    }

    /// Kernel memory, KiB, of it and of those cgroups outside of it that its processes have moved to.
    pub(crate) fn kernel_kib(&self, processes: &[u32]) -> Result<u64> {
        let mut cgroups: Vec<PathBuf> =
            processes.iter().filter_map(|&pid| of(pid)).map(|p| Path::new(ROOT).join(p)).collect();
        cgroups.retain(|path| !path.starts_with(&self.path));
        cgroups.push(self.path.clone());
        cgroups.sort();
        cgroups.dedup();
        let mut total = 0;
        for path in cgroups {
            let text = fs::read_to_string(path.join("memory.stat"))
                .context("this host's cgroups have no memory controller")?;
            total += crate::meter::field(&text, "kernel ").context("memory.stat has no line kernel")? / 1024;
        }
        Ok(total)
    }
}

impl Drop for RoomCgroup {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// A process's cgroup below the root, from the v2 line of /proc/PID/cgroup.
fn of(pid: u32) -> Option<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(PathBuf::from(path))
}

/// A cgroup and all below it, parents first.
fn tree_of(path: &Path) -> Vec<PathBuf> {
    let mut tree = vec![path.to_owned()];
    let mut next = 0;
    while let Some(of) = tree.get(next) {
        let below = fs::read_dir(of).into_iter().flatten().flatten();
        let below: Vec<PathBuf> =
            below.filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir())).map(|e| e.path()).collect();
        tree.extend(below);
        next += 1;
    }
    tree
}

/// Kills what is in a cgroup and removes it with all below.
fn remove(path: &Path) {
    let deadline = Instant::now() + GONE;
    while path.exists() && Instant::now() < deadline {
        // Again each time: what was being forked may have missed the first.
        let _ = fs::write(path.join("cgroup.kill"), "1");
        for cgroup in tree_of(path).iter().rev() {
            let _ = fs::remove_dir(cgroup);
        }
        if path.exists() {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    if path.exists() {
        eprintln!("bench: {} could not be removed within {} s", path.display(), GONE.as_secs());
    }
}

/// Removes the trees whose bench no longer lives.
fn sweep() {
    for entry in fs::read_dir(ROOT).into_iter().flatten().flatten() {
        let ours = entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX));
        if ours
            && File::open(entry.path())
                .is_ok_and(|dir| Flock::lock(dir, FlockArg::LockExclusiveNonblock).is_ok())
        {
            remove(&entry.path());
        }
    }
}
