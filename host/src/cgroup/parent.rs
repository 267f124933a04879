//! Where rooms' cgroups are made, and the sweep of those that no owner has any more.
//!
//! ```text
//!   root:    MOUNT/carrel/ID
//!   others:  ABOVE/carrel/ID            ABOVE: the highest ancestor of one's own cgroup that one may change, a delegated slice or scope
//!            ABOVE/carrel-commands      this process, if it is in ABOVE itself: what hands controllers down holds no processes
//! ```

use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, FlockOperation};

use super::{Cgroup, CgroupError};
use crate::spec::RoomId;

/// Controllers that hold a VMM down; `io` is used where there is one.
const NEEDED: [&str; 3] = ["cpu", "memory", "pids"];
const ROOMS: &str = "carrel";
const COMMANDS: &str = "carrel-commands";

/// Moves this process out of the way of rooms' cgroups, if it is in their way, so that an owner that it starts is not either. What can't be had is
/// said by whoever makes a room's.
pub(crate) fn make_way() {
    let _ = parent();
}

/// The directory in which rooms' cgroups are made; made, and its controllers enabled, if need be.
pub(super) fn parent() -> Result<PathBuf, CgroupError> {
    let mount = mount()?;
    let own = own(&mount);
    let above = above(&mount, own.as_deref())?;
    let parent = above.join(ROOMS);
    // The second level's controllers are those that the first hands down.
    enable(&above, own.as_deref())?;
    // Who can open a cgroup can lock it: that is for its owner alone.
    let made = match DirBuilder::new().mode(0o700).create(&parent) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            fs::set_permissions(&parent, Permissions::from_mode(0o700))
        }
        made => made,
    };
    made.map_err(|source| CgroupError::Io { path: parent.clone(), source })?;
    enable(&parent, None)?;
    Ok(parent)
}

/// Kills and removes what is left of rooms, and of the doctor's trials, whose owner is gone, whether or not there is a record of them.
pub(crate) fn sweep() {
    let Ok(mount) = mount() else { return };
    let Ok(above) = above(&mount, own(&mount).as_deref()) else { return };
    for (cgroup, _claim) in unclaimed(&above.join(ROOMS)) {
        tracing::info!(cgroup = %cgroup.path().display(), "sweeping up a cgroup whose owner is gone");
        cgroup.remove();
    }
    // Fails while a command is in it.
    let _ = fs::remove_dir(above.join(COMMANDS));
}

/// Cgroups that nobody has locked, each with its lock, so that only one command clears it away.
fn unclaimed(parent: &Path) -> Vec<(Cgroup, File)> {
    let Ok(scanning) = File::open(parent) else { return Vec::new() };
    // Whoever makes one holds this until it has locked it.
    if rustix::io::retry_on_intr(|| rustix::fs::flock(&scanning, FlockOperation::LockExclusive)).is_err() {
        return Vec::new();
    }
    let is_rooms = |name: &std::ffi::OsStr| name.to_str().is_some_and(|name| name.parse::<RoomId>().is_ok());
    let claim = |path: PathBuf| {
        let claim = File::open(&path).ok()?;
        rustix::fs::flock(&claim, FlockOperation::NonBlockingLockExclusive).ok()?;
        orphaned(&path).then(|| (Cgroup::at(path), claim))
    };
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    entries.filter(|entry| is_rooms(&entry.file_name())).filter_map(|entry| claim(entry.path())).collect()
}

/// Whether nothing in it has an owner: one of another version, which locks nothing, or one that can't be seen from this PID namespace.
fn orphaned(cgroup: &Path) -> bool {
    let processes = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let owned = |pid: &str| {
        let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else { return pid == "0" };
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).map(str::trim);
        let name = fs::read_to_string(format!("/proc/{}/comm", parent.unwrap_or("0"))).unwrap_or_default();
        name.starts_with("carrel")
    };
    !processes.lines().any(owned)
}

fn mount() -> Result<PathBuf, CgroupError> {
    mount_point(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
        .ok_or(CgroupError::NotMounted)
}

/// The cgroup that this process is in.
fn own(mount: &Path) -> Option<PathBuf> {
    own_of(mount, &fs::read_to_string("/proc/self/cgroup").unwrap_or_default())
}

fn own_of(mount: &Path, cgroups: &str) -> Option<PathBuf> {
    cgroups.lines().find_map(|line| line.strip_prefix("0::/")).map(|own| mount.join(own.trim()))
}

fn above(mount: &Path, own: Option<&Path>) -> Result<PathBuf, CgroupError> {
    if rustix::process::geteuid().is_root() {
        return Ok(mount.to_owned());
    }
    own.and_then(|own| delegated(mount, own)).ok_or_else(|| CgroupError::NotDelegated(mount.to_owned()))
}

/// Hands controllers down to a cgroup's children. This process leaves it if it must.
fn enable(path: &Path, own: Option<&Path>) -> Result<(), CgroupError> {
    let read = |file: &str| fs::read_to_string(path.join(file)).unwrap_or_default();
    let has = |text: &str, controller: &str| text.split_ascii_whitespace().any(|word| word == controller);
    let hand_down = |words: &str| fs::write(path.join("cgroup.subtree_control"), words);
    let (available, enabled) = (read("cgroup.controllers"), read("cgroup.subtree_control"));
    let refused = |controller, source| CgroupError::Controller { controller, path: path.to_owned(), source };
    if let Some(controller) = NEEDED.into_iter().find(|controller| !has(&available, controller)) {
        return Err(refused(controller, None));
    }
    // In one write: `cpu` alone would be taken from a cgroup with processes, as the root of a threaded one, which takes `memory` no more.
    let missing: Vec<&str> = NEEDED.into_iter().filter(|controller| !has(&enabled, controller)).collect();
    if let Some(first) = missing.first() {
        let words: String = missing.iter().map(|controller| format!("+{controller} ")).collect();
        let handed = match hand_down(&words) {
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy && own == Some(path) => {
                step_aside(path).and_then(|()| hand_down(&words))
            }
            handed => handed,
        };
        handed.map_err(|source| match source.kind() == io::ErrorKind::ResourceBusy {
            true => CgroupError::Occupied { path: path.to_owned(), source },
            false => refused(first, Some(source)),
        })?;
    }
    if has(&available, "io") && !has(&enabled, "io") {
        // Only the meter reads it.
        let _ = hand_down("+io");
    }
    Ok(())
}

/// This process moves into a leaf.
fn step_aside(path: &Path) -> io::Result<()> {
    let leaf = path.join(COMMANDS);
    let mut attempts = 0..3;
    loop {
        let made = match fs::create_dir(&leaf) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
            // 0 is whoever writes it (cgroups(7)).
            Ok(()) | Err(_) => fs::write(leaf.join("cgroup.procs"), "0"),
        };
        match made {
            // Another command swept it up in between.
            Err(e) if e.kind() == io::ErrorKind::NotFound && attempts.next().is_some() => {}
            made => return made,
        }
    }
}

/// The first cgroup2 mount in `/proc/self/mountinfo` (proc(5): the type follows a lone hyphen).
fn mount_point(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        (after.split(' ').next() == Some("cgroup2")).then(|| before.split(' ').nth(4))?.map(PathBuf::from)
    })
}

/// The highest ancestor of one's own cgroup that one may change.
fn delegated(mount: &Path, own: &Path) -> Option<PathBuf> {
    let may_write = |path: &&Path| {
        rustix::fs::access(*path, Access::WRITE_OK).is_ok()
            && rustix::fs::access(path.join("cgroup.procs"), Access::WRITE_OK).is_ok()
    };
    own.ancestors().take_while(|path| path.starts_with(mount)).filter(may_write).last().map(Path::to_owned)
}

#[cfg(test)]
mod tests {
    use std::io::BufRead;

    use super::*;

    #[test]
    fn the_cgroup2_mount_is_found_among_others() {
        let mounts = "30 23 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
            31 23 0:27 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(mount_point(mounts), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(mount_point("30 23 0:26 / / rw - ext4 /dev/cgroup2 rw\n"), None);
    }

    #[test]
    fn only_a_writable_ancestor_is_delegated() {
        let mount = tempfile::tempdir().unwrap();
        let scope = mount.path().join("user.slice/scope");
        fs::create_dir_all(&scope).unwrap();
        for path in [&scope, &mount.path().join("user.slice")] {
            fs::write(path.join("cgroup.procs"), "").unwrap();
        }
        let own = own_of(mount.path(), "0::/user.slice/scope\n").unwrap();
        let found = delegated(mount.path(), &own).unwrap();
        assert_eq!(found, mount.path().join("user.slice"), "the mount itself has no cgroup.procs to write");
        assert_eq!(own_of(mount.path(), "1:name=systemd:/x\n"), None);
    }

    /// Directories lock as cgroups do; they have no processes.
    #[test]
    fn what_nobody_has_locked_is_unclaimed_and_nothing_else() {
        let parent = tempfile::tempdir().unwrap();
        let rooms = ["00000000000a", "00000000000b", "not-a-room"].map(|name| parent.path().join(name));
        let alive = super::super::claimed(parent.path(), &rooms[0]).unwrap();
        let killed = super::super::claimed(parent.path(), &rooms[1]).unwrap();
        fs::create_dir(&rooms[2]).unwrap();
        assert!(unclaimed(parent.path()).is_empty());
        drop(killed);
        let found = unclaimed(parent.path());
        assert_eq!(found.iter().map(|(cgroup, _)| cgroup.path()).collect::<Vec<_>>(), [&rooms[1]]);
        assert!(unclaimed(parent.path()).is_empty(), "another command clears it at once");
        drop((found, alive));
        assert_eq!(unclaimed(parent.path()).len(), 2);
    }

    #[test]
    fn what_an_owner_has_processes_in_is_not_orphaned_though_it_is_not_locked() {
        let cgroup = tempfile::tempdir().unwrap();
        let with = |processes: String| {
            fs::write(cgroup.path().join("cgroup.procs"), processes).unwrap();
            orphaned(cgroup.path())
        };
        assert!(with(String::new()) && with(format!("{}\n", u32::MAX)), "empty, or about to be");
        assert!(with(format!("{}\n", std::process::id())), "a test runner is no owner");
        assert!(!with("0\n".into()), "whose owner can't be seen");
        let script = "printf carrel-owner > /proc/self/comm; sleep 60 & echo $!; read -r x; kill $!";
        let mut owner = std::process::Command::new("sh")
            .args(["-c", script])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut vmm = String::new();
        io::BufReader::new(owner.stdout.take().unwrap()).read_line(&mut vmm).unwrap();
        assert!(!with(vmm));
        drop(owner.stdin.take());
        owner.wait().unwrap();
    }
}
