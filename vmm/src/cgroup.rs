//! The cgroup in which a VMM that runs on its own is born: the one that was named, or a new one below its launcher's.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process;

/// A cgroup v2 directory; removed when dropped if it was made for this run.
#[derive(Debug)]
pub struct Cgroup {
    /// Open, for `CLONE_INTO_CGROUP`.
    pub directory: File,
    made: Option<PathBuf>,
}

/// Cgroups that were made below a launcher's: this and its process id.
const PREFIX: &str = "carrel-vmm.";

impl Cgroup {
    /// Opens the cgroup at `path`; made if missing.
    pub fn open(path: &Path) -> io::Result<Self> {
        let made = match fs::create_dir(path) {
            Ok(()) => Some(path.to_owned()),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => None,
            Err(e) => return Err(e),
        };
        Ok(Self { directory: File::open(path)?, made })
    }

    /// Makes one below this process's own, and removes those that launchers left which were killed.
    pub fn below_own() -> io::Result<Self> {
        let own = own()?;
        sweep(&own);
        let path = own.join(format!("{PREFIX}{}", process::id()));
        let mut cgroup = Self::open(&path)?;
        cgroup.made = Some(path);
        Ok(cgroup)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Some(path) = &self.made {
            let _ = fs::remove_dir(path);
        }
    }
}

/// The directory of this process's cgroup (cgroups(7), */proc files*).
fn own() -> io::Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let cgroups = fs::read_to_string("/proc/self/cgroup")?;
    place(&mounts, &cgroups).ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "there is no cgroup v2"))
}

fn place(mounts: &str, cgroups: &str) -> Option<PathBuf> {
    let mounted = mounts.lines().find_map(|line| {
        let mut words = line.split(' ');
        let (_, at, kind) = (words.next()?, words.next()?, words.next()?);
        (kind == "cgroup2").then_some(at)
    })?;
    let below = cgroups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(Path::new(mounted).join(below))
}

/// Empty ones whose launcher is gone. One that still holds a VMM can't be removed.
fn sweep(own: &Path) {
    let Ok(entries) = fs::read_dir(own) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let launcher = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.parse::<u32>().ok());
        if launcher.is_some_and(|launcher| !Path::new(&format!("/proc/{launcher}")).exists()) {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_cgroup_is_found_beside_others_of_version_1() {
        let mounts =
            "cgroup /sys/fs/cgroup/pids cgroup rw,pids 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        let found = place(mounts, "8:pids:/a\n0::/user.slice/x.scope\n");
        assert_eq!(found.as_deref(), Some(Path::new("/sys/fs/cgroup/unified/user.slice/x.scope")));
        assert_eq!(place(mounts, "0::/\n").as_deref(), Some(Path::new("/sys/fs/cgroup/unified")));
        assert_eq!(place("proc /proc proc rw 0 0\n", "0::/\n"), None);
    }

    #[test]
    fn what_a_killed_launcher_left_is_removed_and_what_lives_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let names =
            [format!("{PREFIX}{}", u32::MAX), format!("{PREFIX}{}", process::id()), "other.1".to_owned()];
        for name in &names {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        sweep(folder.path());
        let left = names.map(|name| folder.path().join(name).exists());
        assert_eq!(left, [false, true, true]);
    }
}
