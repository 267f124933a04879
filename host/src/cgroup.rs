//! The VMM's cgroup (cgroups(7), version 2): its limits, its meter, and the sure way to kill all that is in it.
//!
//! ```text
//!   root:    MOUNT/carrel/ID
//!   others:  the highest ancestor of one's own cgroup that one may write to (a delegated scope or slice)/carrel/ID
//! ```

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::Access;
use thiserror::Error;

use crate::spec::RoomId;

/// Controllers that hold a VMM down; `io` is used where there is one.
const NEEDED: [&str; 3] = ["cpu", "memory", "pids"];
/// cpu.max's period, µs.
const PERIOD_US: u64 = 100_000;
/// How long killed processes may take to be gone.
const GONE: Duration = Duration::from_secs(10);

/// A cgroup can't be had.
#[derive(Debug, Error)]
pub enum CgroupError {
    /// No cgroup v2 file system.
    #[error(
        "this host mounts no cgroup v2; mount one (`mount -t cgroup2 none /sys/fs/cgroup`), or use --unconfined"
    )]
    NotMounted,
    /// Nowhere to make one.
    #[error("no cgroup may be made below {}; run carrel as root or in a delegated scope (`systemd-run --user --scope -p Delegate=yes`), or use --unconfined", .0.display())]
    NotDelegated(PathBuf),
    /// A controller is not to be had.
    #[error("the cgroup controller {controller} can't be had below {}; boot with cgroup v2 alone (`systemd.unified_cgroup_hierarchy=1`), or use --unconfined", .path.display())]
    Controller {
        /// Which.
        controller: &'static str,
        /// Where.
        path: PathBuf,
        /// Why, where the kernel said so.
        #[source]
        source: Option<io::Error>,
    },
    /// The operating system refused.
    #[error("the cgroup file {} can't be written", .path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What a room may take from its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// `memory.max`, bytes.
    pub(crate) memory_bytes: u64,
    /// `cpu.max`, thousandths of one CPU.
    pub(crate) cpu_millis: u64,
    /// `pids.max`.
    pub(crate) threads: u64,
}

/// A room's cgroup. Not removed when dropped: [`Cgroup::remove`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// One that was made before.
    pub(crate) fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Makes a room's cgroup.
    pub(crate) fn create(id: &RoomId, limits: Limits) -> Result<Self, CgroupError> {
        let parent = parent()?;
        let path = parent.join(id.as_str());
        fs::create_dir(&path).map_err(|source| CgroupError::Io { path: path.clone(), source })?;
        let made = Self { path };
        let set = || {
            made.write("memory.max", limits.memory_bytes)?;
            // Swapped guest memory would be slow beyond reason, and readable on the host's disk. Not every host has swap accounting.
            let _ = made.write("memory.swap.max", 0);
            made.write("pids.max", limits.threads)?;
            made.limit_cpu(limits.cpu_millis)
        };
        set().inspect_err(|_| made.remove())?;
        Ok(made)
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Its directory, for clone3(2).
    pub(crate) fn directory(&self) -> io::Result<File> {
        File::open(&self.path)
    }

    /// Sets `cpu.max`.
    pub(crate) fn limit_cpu(&self, millis: u64) -> Result<(), CgroupError> {
        // The kernel takes no quota below 1 ms.
        let quota = (millis * PERIOD_US / 1000).max(1000);
        self.write("cpu.max", format_args!("{quota} {PERIOD_US}"))
    }

    fn write(&self, file: &str, value: impl std::fmt::Display) -> Result<(), CgroupError> {
        let path = self.path.join(file);
        fs::write(&path, value.to_string()).map_err(|source| CgroupError::Io { path, source })
    }

    /// The number after a key in one of its files, such as `usage_usec` in `cpu.stat`.
    pub(crate) fn keyed(&self, file: &str, key: &str) -> Option<u64> {
        let text = fs::read_to_string(self.path.join(file)).ok()?;
        text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
    }

    /// The number that is all of one of its files, such as `memory.peak`.
    pub(crate) fn number(&self, file: &str) -> Option<u64> {
        fs::read_to_string(self.path.join(file)).ok()?.trim().parse().ok()
    }

    /// The sum, over all devices, of a field of `io.stat`.
    pub(crate) fn io(&self, field: &str) -> Option<u64> {
        let text = fs::read_to_string(self.path.join("io.stat")).ok()?;
        Some(sum_of_field(&text, field))
    }

    /// Kills all that is in it and removes it. What can't be removed is said in the log; the next sweep tries again.
    pub(crate) fn remove(&self) {
        let deadline = Instant::now() + GONE;
        loop {
            match fs::remove_dir(&self.path) {
                Ok(()) => return,
                Err(e) if e.kind() == io::ErrorKind::NotFound => return,
                Err(e) if Instant::now() >= deadline => {
                    tracing::warn!(cgroup = %self.path.display(), error = %e, "a cgroup can't be removed");
                    return;
                }
                // Linux 5.14; before, its processes are killed by number.
                Err(_) if self.write("cgroup.kill", 1).is_err() => self.kill_each(),
                Err(_) => {}
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn kill_each(&self) {
        let processes = fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default();
        for pid in processes.lines().filter_map(|line| rustix::process::Pid::from_raw(line.parse().ok()?)) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

fn sum_of_field(io_stat: &str, field: &str) -> u64 {
    let values = io_stat.split_ascii_whitespace().filter_map(|word| word.split_once('='));
    values.filter(|(name, _)| *name == field).filter_map(|(_, value)| value.parse::<u64>().ok()).sum()
}

/// The directory in which rooms' cgroups are made; made, and its controllers enabled, if need be.
pub(crate) fn parent() -> Result<PathBuf, CgroupError> {
    let mount = mount_point(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
        .ok_or(CgroupError::NotMounted)?;
    let above = if rustix::process::geteuid().is_root() {
        mount
    } else {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        delegated(&mount, &own).ok_or(CgroupError::NotDelegated(mount))?
    };
    let parent = above.join("carrel");
    // The second level's controllers are those that the first hands down.
    enable(&above)?;
    match fs::create_dir(&parent) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            return Err(CgroupError::Io { path: parent, source: e });
        }
        Ok(()) | Err(_) => {}
    }
    enable(&parent)?;
    Ok(parent)
}

/// Hands controllers down to a cgroup's children.
fn enable(path: &Path) -> Result<(), CgroupError> {
    let read = |file: &str| fs::read_to_string(path.join(file)).unwrap_or_default();
    let has = |text: &str, controller: &str| text.split_ascii_whitespace().any(|word| word == controller);
    let (available, enabled) = (read("cgroup.controllers"), read("cgroup.subtree_control"));
    for controller in NEEDED {
        let missing = |source| CgroupError::Controller { controller, path: path.to_owned(), source };
        if has(&enabled, controller) {
            continue;
        }
        if !has(&available, controller) {
            return Err(missing(None));
        }
        fs::write(path.join("cgroup.subtree_control"), format!("+{controller}"))
            .map_err(|e| missing(Some(e)))?;
    }
    if has(&available, "io") && !has(&enabled, "io") {
        // Only the meter reads it.
        let _ = fs::write(path.join("cgroup.subtree_control"), "+io");
    }
    Ok(())
}

/// The first cgroup2 mount in `/proc/self/mountinfo` (proc(5): the type follows a lone hyphen).
fn mount_point(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        (after.split(' ').next() == Some("cgroup2")).then(|| before.split(' ').nth(4))?.map(PathBuf::from)
    })
}

/// The highest ancestor of one's own cgroup that one may change.
fn delegated(mount: &Path, own: &str) -> Option<PathBuf> {
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let leaf = mount.join(own.trim());
    let may_write = |path: &&Path| {
        rustix::fs::access(*path, Access::WRITE_OK).is_ok()
            && rustix::fs::access(path.join("cgroup.procs"), Access::WRITE_OK).is_ok()
    };
    leaf.ancestors().take_while(|path| path.starts_with(mount)).filter(may_write).last().map(Path::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup2_mount_is_found_among_others() {
        let mounts = "30 23 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
            31 23 0:27 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(mount_point(mounts), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(mount_point("30 23 0:26 / / rw - ext4 /dev/cgroup2 rw\n"), None);
    }

    #[test]
    fn io_is_summed_over_devices() {
        let text = "8:0 rbytes=10 wbytes=1 rios=2 wios=3\n8:16 rbytes=5 wbytes=0 rios=1 wios=0\n";
        assert_eq!((sum_of_field(text, "rbytes"), sum_of_field(text, "wios")), (15, 3));
        assert_eq!(sum_of_field("", "rbytes"), 0);
    }

    #[test]
    fn only_a_writable_ancestor_is_delegated() {
        let mount = tempfile::tempdir().unwrap();
        let scope = mount.path().join("user.slice/scope");
        fs::create_dir_all(&scope).unwrap();
        for path in [&scope, &mount.path().join("user.slice")] {
            fs::write(path.join("cgroup.procs"), "").unwrap();
        }
        let found = delegated(mount.path(), "0::/user.slice/scope\n").unwrap();
        assert_eq!(found, mount.path().join("user.slice"), "the mount itself has no cgroup.procs to write");
        assert_eq!(delegated(mount.path(), "1:name=systemd:/x\n"), None);
    }
}
