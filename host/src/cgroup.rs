//! The VMM's cgroup (cgroups(7), version 2): its limits, its meter, and the sure way to kill all that is in it.
//!
//! ```text
//!   PARENT/carrel/ID      locked (flock(2)) by the room's owner while it lives: what nobody has locked is swept up
//! ```

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use thiserror::Error;

use crate::spec::RoomId;

mod parent;

pub(crate) use parent::{make_way, sweep};

/// cpu.max's period, µs.
const PERIOD_US: u64 = 100_000;
/// How long killed processes may take to be gone.
const GONE: Duration = Duration::from_secs(10);

/// A cgroup can't be had.
#[derive(Debug, Error)]
pub enum CgroupError {
    /// No cgroup v2 file system.
    #[error(
        "this host mounts no cgroup v2; mount one (`mount -t cgroup2 none /sys/fs/cgroup`), or use --unconfined=cgroup"
    )]
    NotMounted,
    /// Nowhere to make one.
    #[error("no cgroup may be made below {}; run carrel as root or in a delegated scope (`systemd-run --user --scope -p Delegate=yes`), or use --unconfined=cgroup", .0.display())]
    NotDelegated(PathBuf),
    /// A controller is not to be had.
    #[error("the cgroup controller {controller} can't be had below {}; boot with cgroup v2 alone (`systemd.unified_cgroup_hierarchy=1`), or use --unconfined=cgroup", .path.display())]
    Controller {
        /// Which.
        controller: &'static str,
        /// Where.
        path: PathBuf,
        /// Why, where the kernel said so.
        #[source]
        source: Option<io::Error>,
    },
    /// A cgroup with processes of its own hands no controllers down (cgroups(7), *no internal processes*).
    #[error("there are other processes than carrel's in the cgroup {0} itself, so it can't have rooms below it; move them into a leaf (`mkdir {0}/rest; for p in $(cat {0}/cgroup.procs); do echo $p > {0}/rest/cgroup.procs; done`), or use --unconfined=cgroup", .path.display())]
    Occupied {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
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
#[derive(Clone, Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
    /// Its directory, locked for as long as this process lives; `None` for one that somebody else made.
    _claim: Option<Arc<File>>,
}

impl Cgroup {
    /// One that was made before.
    pub(crate) fn at(path: PathBuf) -> Self {
        Self { path, _claim: None }
    }

    /// Makes a room's cgroup.
    pub(crate) fn create(id: &RoomId, limits: Limits) -> Result<Self, CgroupError> {
        let parent = parent::parent()?;
        let path = parent.join(id.as_str());
        let claim =
            claimed(&parent, &path).map_err(|source| CgroupError::Io { path: path.clone(), source })?;
        let made = Self { path, _claim: Some(Arc::new(claim)) };
        // Swapped guest memory would be slow beyond reason, and readable on the host's disk. Not every host has swap accounting.
        let _ = made.write("memory.swap.max", 0);
        made.limit(limits).inspect_err(|_| made.remove())?;
        Ok(made)
    }

    /// Sets all limits anew.
    pub(crate) fn limit(&self, limits: Limits) -> Result<(), CgroupError> {
        self.write("memory.max", limits.memory_bytes)?;
        self.write("pids.max", limits.threads)?;
        self.limit_cpu(limits.cpu_millis)
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

/// Makes a cgroup and locks it. A sweep can't look in between, when it would take it for one that nobody has.
fn claimed(parent: &Path, path: &Path) -> io::Result<File> {
    let making = File::open(parent)?;
    rustix::io::retry_on_intr(|| rustix::fs::flock(&making, FlockOperation::LockShared))?;
    DirBuilder::new().mode(0o700).create(path)?;
    let claim = File::open(path)?;
    rustix::fs::flock(&claim, FlockOperation::NonBlockingLockExclusive)?;
    Ok(claim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn io_is_summed_over_devices() {
        let text = "8:0 rbytes=10 wbytes=1 rios=2 wios=3\n8:16 rbytes=5 wbytes=0 rios=1 wios=0\n";
        assert_eq!((sum_of_field(text, "rbytes"), sum_of_field(text, "wios")), (15, 3));
        assert_eq!(sum_of_field("", "rbytes"), 0);
    }
}
