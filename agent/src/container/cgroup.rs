//! A container's cgroup (cgroup-v2.rst): made before its first process is born in it, kept until the room ends so that
//! its counters can be read.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use carrel_protocol::agent::{ContainerId, Surroundings};
use rustix::fs::{Mode, OFlags};

use super::devices;

/// Processes and threads of a container that names no limit of its own.
const PROCESSES: u32 = 16_384;
/// `cpu.max`'s period, µs.
const PERIOD_US: u64 = 100_000;
/// Cgroups that a workload may make below its own. With `nsdelegate` (see `boot`) limits can't be written at the root of a cgroup
/// namespace, but from a namespace whose root lies deeper they could, through a mount made before.
const BELOW: u32 = 0;
/// How often freezing is looked at. It takes less than that as a rule, and happens once in a template's life.
const FREEZING: Duration = Duration::from_millis(1);
/// What is counted and limited.
const CONTROLLERS: [&str; 4] = ["cpu", "memory", "io", "pids"];

/// Where containers' cgroups are.
#[derive(Clone, Debug)]
pub(crate) struct Tree {
    containers: PathBuf,
}

/// One container's cgroup.
#[derive(Clone, Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
}

impl Tree {
    /// Makes `containers` below the mounted hierarchy, hands the controllers down to it, and takes the room's devices away from it.
    ///
    /// # Errors
    ///
    /// The hierarchy isn't cgroup2, can't be written, or takes no program.
    pub(crate) fn new(mounted: &Path) -> io::Result<Self> {
        let containers = mounted.join("containers");
        if !containers.is_dir() {
            fs::create_dir(&containers)?;
        }
        for group in [mounted, &containers] {
            let has = fs::read_to_string(group.join("cgroup.controllers"))?;
            for controller in
                CONTROLLERS.iter().filter(|name| has.split_whitespace().any(|one| one == **name))
            {
                fs::write(group.join("cgroup.subtree_control"), format!("+{controller}"))?;
            }
        }
        devices::confine(open(&containers)?.as_fd())?;
        Ok(Self { containers })
    }

    /// Below any directory.
    #[cfg(test)]
    pub(crate) fn at(containers: &Path) -> Self {
        Self { containers: containers.to_owned() }
    }

    /// A container's cgroup, which may not be there.
    pub(crate) fn of(&self, id: ContainerId) -> Cgroup {
        Cgroup { path: self.containers.join(id.0.to_string()) }
    }

    /// Makes a container's cgroup, without limits of the container's own.
    ///
    /// # Errors
    ///
    /// It exists, or can't be made.
    pub(crate) fn make(&self, id: ContainerId) -> io::Result<Cgroup> {
        let group = self.of(id);
        fs::create_dir(&group.path)?;
        let limited = group
            .set("cgroup.max.descendants", &BELOW.to_string())
            .and_then(|()| group.set("pids.max", &PROCESSES.to_string()));
        match limited {
            Ok(()) => Ok(group),
            Err(error) => {
                group.remove();
                Err(error)
            }
        }
    }
}

impl Cgroup {
    /// Any directory.
    #[cfg(test)]
    pub(crate) fn at(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// Sets the limits that a container was asked for with.
    ///
    /// # Errors
    ///
    /// One can't be set: a limit whose controller isn't there can't be kept.
    pub(crate) fn limit(&self, surroundings: &Surroundings) -> io::Result<()> {
        if let Some(processes) = surroundings.processes {
            self.set("pids.max", &processes.to_string())?;
        }
        if let Some(bytes) = surroundings.memory_bytes {
            self.set("memory.max", &bytes.to_string())?;
        }
        if let Some(millis) = surroundings.cpu_millis {
            // The kernel takes no quota below 1 ms.
            let quota = (u64::from(millis) * PERIOD_US / 1000).max(1000);
            self.set("cpu.max", &format!("{quota} {PERIOD_US}"))?;
        }
        Ok(())
    }

    /// Removes it, when nothing is in it.
    pub(crate) fn remove(&self) {
        let _ = fs::remove_dir(&self.path);
    }

    fn set(&self, file: &str, value: &str) -> io::Result<()> {
        fs::write(self.path.join(file), value)
    }

    /// For `CLONE_INTO_CGROUP`.
    pub(crate) fn open(&self) -> io::Result<OwnedFd> {
        open(&self.path)
    }

    /// One of its files; empty if there is none.
    pub(crate) fn read(&self, file: &str) -> String {
        fs::read_to_string(self.path.join(file)).unwrap_or_default()
    }

    /// Sets `cpu.max` while processes run in it.
    ///
    /// # Errors
    ///
    /// The kernel takes no such quota.
    pub(crate) fn set_cpu(&self, quota: &str) -> io::Result<()> {
        fs::write(self.path.join("cpu.max"), quota)
    }

    /// Stops all in it, and waits until they have stopped (cgroup-v2.rst, *cgroup.freeze*). SIGKILL works all the same.
    ///
    /// # Errors
    ///
    /// The kernel refuses, or something in it sleeps where it can't be stopped for as long as `limit`: it is thawed again.
    pub(crate) async fn freeze(&self, limit: Duration) -> io::Result<()> {
        fs::write(self.path.join("cgroup.freeze"), "1")?;
        let stopped = async {
            while !self.is_frozen() {
                tokio::time::sleep(FREEZING).await;
            }
        };
        if tokio::time::timeout(limit, stopped).await.is_ok() {
            return Ok(());
        }
        self.thaw()?;
        Err(io::Error::new(io::ErrorKind::TimedOut, "a process sleeps in the kernel and can't be stopped"))
    }

    /// Lets all in it run on.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub(crate) fn thaw(&self) -> io::Result<()> {
        fs::write(self.path.join("cgroup.freeze"), "0")
    }

    /// Whether all in it have stopped.
    pub(crate) fn is_frozen(&self) -> bool {
        self.read("cgroup.events").lines().any(|line| line == "frozen 1")
    }

    /// SIGKILL to all in it. An empty one is no error.
    pub(crate) fn kill(&self) {
        let _ = fs::write(self.path.join("cgroup.kill"), "1");
    }
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn made(surroundings: &Surroundings) -> (TempDir, Cgroup) {
        let folder = TempDir::new().unwrap();
        let tree = Tree { containers: folder.path().to_owned() };
        let group = tree.make(ContainerId(3)).unwrap();
        group.limit(surroundings).unwrap();
        (folder, group)
    }

    #[test]
    fn limits_are_written_as_the_kernel_reads_them() {
        let surroundings = Surroundings {
            memory_bytes: Some(64 << 20),
            cpu_millis: Some(1500),
            processes: Some(7),
            ..Surroundings::default()
        };
        let (_folder, group) = made(&surroundings);
        assert_eq!((group.read("pids.max"), group.read("memory.max")), ("7".into(), "67108864".into()));
        assert_eq!(group.read("cpu.max"), "150000 100000");
    }

    #[test]
    fn what_is_not_limited_stays_the_kernels_but_processes() {
        let (_folder, group) = made(&Surroundings::default());
        assert_eq!(group.read("pids.max"), "16384");
        assert_eq!(group.read("cgroup.max.descendants"), "0");
        assert_eq!((group.read("memory.max"), group.read("cpu.max")), (String::new(), String::new()));
    }

    #[test]
    fn a_share_too_small_for_the_kernel_is_the_smallest_it_takes() {
        for millis in [0, 1, 9, 10] {
            let (_folder, group) =
                made(&Surroundings { cpu_millis: Some(millis), ..Surroundings::default() });
            assert_eq!(group.read("cpu.max"), "1000 100000", "{millis}");
        }
        let (_folder, group) = made(&Surroundings { cpu_millis: Some(u32::MAX), ..Surroundings::default() });
        assert_eq!(group.read("cpu.max"), "429496729500 100000");
    }

    #[test]
    fn a_container_is_made_once() {
        let folder = TempDir::new().unwrap();
        let tree = Tree { containers: folder.path().to_owned() };
        tree.make(ContainerId(0)).unwrap();
        let again = tree.make(ContainerId(0)).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
        tree.make(ContainerId(1)).unwrap();
    }

    #[test]
    fn a_hierarchy_that_is_no_cgroup2_is_an_error() {
        let folder = TempDir::new().unwrap();
        assert_eq!(Tree::new(folder.path()).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    fn run(work: impl Future<Output = ()>) {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work);
    }

    #[test]
    fn freezing_waits_for_the_kernel_to_say_so() {
        let (folder, group) = made(&Surroundings::default());
        let events = folder.path().join("3/cgroup.events");
        fs::write(&events, "populated 1\nfrozen 0\n").unwrap();
        run(async {
            let frozen = group.freeze(Duration::from_secs(20));
            let kernel = async {
                tokio::time::sleep(Duration::from_millis(30)).await;
                assert_eq!(group.read("cgroup.freeze"), "1");
                fs::write(&events, "populated 1\nfrozen 1\n").unwrap();
            };
            let began = std::time::Instant::now();
            let (frozen, ()) = tokio::join!(frozen, kernel);
            frozen.unwrap();
            assert!(began.elapsed() >= Duration::from_millis(30));
        });
        group.thaw().unwrap();
        assert_eq!(group.read("cgroup.freeze"), "0");
    }

    #[test]
    fn what_cannot_be_frozen_runs_on() {
        let (folder, group) = made(&Surroundings::default());
        fs::write(folder.path().join("3/cgroup.events"), "populated 1\nfrozen 0\n").unwrap();
        run(async {
            let error = group.freeze(Duration::from_millis(20)).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        });
        assert_eq!(group.read("cgroup.freeze"), "0");
    }

    /// Where this machine has a cgroup2 that its root may write to; the guest has, always.
    #[test]
    fn a_frozen_process_does_nothing_until_it_is_thawed() {
        let mounts = fs::read_to_string("/proc/mounts").unwrap();
        let mounted = mounts.lines().find_map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            (words.get(2) == Some(&"cgroup2")).then(|| words.get(1).map(PathBuf::from)).flatten()
        });
        let path = mounted.map(|at| at.join(format!("carrel-agent-test-{}", std::process::id())));
        let Some(path) = path.filter(|path| fs::create_dir(path).is_ok()) else {
            return println!("no cgroup2 to be had here");
        };
        let group = Cgroup::at(&path);
        let folder = TempDir::new().unwrap();
        let count = folder.path().join("count");
        let script = format!("while :; do echo x >>{}; done", count.display());
        let mut busy = std::process::Command::new("/bin/sh").args(["-c", &script]).spawn().unwrap();
        fs::write(path.join("cgroup.procs"), busy.id().to_string()).unwrap();
        let size = || fs::metadata(&count).map_or(0, |count| count.len());
        run(async {
            // An empty one is frozen as soon as it is asked to; this one has the process in it.
            group.freeze(Duration::from_secs(20)).await.unwrap();
            let then = size();
            tokio::time::sleep(Duration::from_millis(50)).await;
            assert!(group.is_frozen() && size() == then);
            group.thaw().unwrap();
            while size() == then {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            group.freeze(Duration::from_secs(20)).await.unwrap();
            group.kill();
        });
        busy.wait().unwrap();
        fs::remove_dir(&path).unwrap();
    }

    #[test]
    fn a_file_that_is_not_there_is_empty_and_an_ended_cgroup_can_be_killed() {
        let (folder, group) = made(&Surroundings::default());
        assert_eq!(group.read("memory.peak"), "");
        drop(folder);
        group.kill();
        assert_eq!(group.read("pids.max"), "");
        assert!(group.open().is_err());
    }
}
