//! What a container's processes find around them: first what every container has (its root, `/proc`, `/sys`, `/dev`), which a template's clones
//! share; then what one is asked for with (names, kernel settings, volumes, tmpfs mounts, the root's flags). Runs in the init, in its own
//! namespaces; the order of the steps is the order in which they depend on each other.
//!
//! All paths of the image are resolved after the root has been changed, so that its symbolic links lead nowhere else; where every container has a file
//! system of its own, the image may have no link, and no mount may come to lie on the root.

use std::ffi::CStr;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use carrel_protocol::agent::{CLONE_SOCKET, Surroundings};
use rustix::fs::CWD;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_bind,
    mount_bind_recursive, mount_change, mount_remount, move_mount, open_tree, unmount,
};
use serde::{Deserialize, Serialize};

use super::{StartError, devices, tmpfs};

/// One mount that every container has.
struct Row {
    kind: &'static str,
    at: &'static str,
    flags: MountFlags,
    options: &'static CStr,
}

const QUIET: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC).union(MountFlags::NODEV);

/// As runc mounts them (runtime-spec, config-linux.md, *Default Filesystems*).
const MOUNTS: [Row; 7] = [
    Row { kind: "proc", at: "/proc", flags: QUIET, options: c"" },
    Row {
        kind: "tmpfs",
        at: "/dev",
        flags: MountFlags::NOSUID.union(MountFlags::STRICTATIME),
        options: c"mode=755,size=65536k",
    },
    Row {
        kind: "devpts",
        at: "/dev/pts",
        flags: MountFlags::NOSUID.union(MountFlags::NOEXEC),
        options: c"newinstance,ptmxmode=0666,mode=0620,gid=5",
    },
    Row { kind: "tmpfs", at: "/dev/shm", flags: QUIET, options: c"mode=1777,size=65536k" },
    Row { kind: "mqueue", at: "/dev/mqueue", flags: QUIET, options: c"" },
    Row { kind: "sysfs", at: "/sys", flags: QUIET.union(MountFlags::RDONLY), options: c"" },
    Row { kind: "cgroup2", at: "/sys/fs/cgroup", flags: QUIET.union(MountFlags::RDONLY), options: c"" },
];

/// Covered, because they show or change the room rather than the container (runc's default).
const MASKED: [&str; 8] = [
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];
/// Read-only, likewise.
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", SETTINGS, "/proc/sysrq-trigger"];
const SETTINGS: &str = "/proc/sys";
const HOSTNAME: &str = "/etc/hostname";
const HOSTS: &str = "/etc/hosts";

/// What files with set-user-ID bits or capabilities do when they are executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum SetIds {
    /// As anywhere.
    Honoured,
    /// They are plain files (`nosuid`).
    Ignored,
}

/// A container's root, as it is to be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Root<'a> {
    pub(crate) surroundings: &'a Surroundings,
    pub(crate) set_ids: SetIds,
    pub(crate) hostname: &'a str,
    /// The directory with the socket that is [`CLONE_SOCKET`] inside, from [`take_along`].
    pub(crate) clone_socket: Option<&'a OwnedFd>,
}

/// A directory of the agent's that a container is to see: its own root will be out of reach from there. Who may not write to it may still connect to a
/// socket in it.
///
/// # Errors
///
/// open_tree(2)'s and mount_setattr(2)'s.
pub(crate) fn take_along(folder: &Path) -> io::Result<OwnedFd> {
    let tree = open_tree(CWD, folder, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    // While it has no place: a path could lead to another mount by then.
    let flags =
        libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    let attributes = libc::mount_attr { attr_set: flags, attr_clr: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: the path is a C string, and the structure is as large as is said.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if done == 0 { Ok(tree) } else { Err(io::Error::last_os_error()) }
}

/// Puts the calling process into a container's root, whose files are in `rootfs`, with the mounts that every container has.
///
/// # Errors
///
/// Which step failed, in words.
pub(crate) fn enter(rootfs: &Path) -> Result<Names, StartError> {
    pivot(rootfs).map_err(StartError::step("changing to the container's root"))?;
    for row in &MOUNTS {
        ground(Path::new(row.at))?;
        mount(row.kind, row.at, row.kind, row.flags, row.options)
            .map_err(StartError::step(format!("mounting {} at {}", row.kind, row.at)))?;
        if row.at == "/dev" {
            devices::fill().map_err(StartError::step("making the devices"))?;
        }
    }
    cover()?;
    names()
}

/// Makes the root what it was asked to be.
///
/// # Errors
///
/// Which step failed, in words.
pub(crate) fn furnish(root: &Root<'_>, names: Names) -> Result<(), StartError> {
    let Root { surroundings, set_ids, hostname, clone_socket } = *root;
    let options = surroundings
        .tmpfs
        .iter()
        .map(|one| Ok((absolute(&one.path, "tmpfs")?, Some(tmpfs::parse(&one.options)?))))
        .collect::<Result<Vec<_>, StartError>>()?;
    let volumes = surroundings
        .volumes
        .iter()
        .map(|path| Ok((absolute(path, "volume")?, None)))
        .collect::<Result<Vec<_>, StartError>>()?;
    let flags = match set_ids {
        SetIds::Honoured => MountFlags::BIND,
        SetIds::Ignored => MountFlags::BIND | MountFlags::NOSUID,
    };
    if flags != MountFlags::BIND {
        // Before volumes, which take it over.
        restrict(flags)?;
    }
    names.tell(hostname)?;
    settings(surroundings)?;
    // Outer ones first, so that none hides another.
    let mut extra: Vec<_> = volumes.into_iter().chain(options).collect();
    extra.sort_by_key(|(path, _)| path.components().count());
    let uncovers = !extra.is_empty();
    for (path, options) in extra {
        let step = format!("mounting a volume or tmpfs at {}", path.display());
        let made = directory(&path).and_then(|()| below_root(&path));
        // A tmpfs is the user's wish, a volume the image's own.
        if let Err(StartError::InTheWay { path, .. }) = &made
            && options.is_some()
        {
            return Err(StartError::Request(format!(
                "no tmpfs can be mounted at {path}, where the image has something else than a directory"
            )));
        }
        made?;
        place(&path, options).map_err(StartError::step(step))?;
    }
    if uncovers && !Path::new("/dev/null").exists() {
        let message = "a tmpfs can't lie on /dev, where a container's devices are";
        return Err(StartError::Request(message.into()));
    }
    if uncovers {
        // A volume that is /proc, or a link to it, shows it without what is mounted in it.
        cover()?;
    }
    if let Some(folder) = clone_socket {
        let at = Path::new(CLONE_SOCKET).parent().unwrap_or(Path::new("/"));
        directory(at)?;
        below_root(at)?;
        show(folder, at).map_err(StartError::step("mounting the clone socket"))?;
    }
    if surroundings.read_only_root {
        restrict(flags | MountFlags::RDONLY)?;
    }
    Ok(())
}

/// Mounts the root with these flags.
fn restrict(flags: MountFlags) -> Result<(), StartError> {
    mount_remount("/", flags, c"").map_err(StartError::step("restricting the root"))
}

fn absolute(path: &str, what: &str) -> Result<PathBuf, StartError> {
    let parsed = Path::new(path);
    let plain = parsed.components().skip(1).all(|part| matches!(part, std::path::Component::Normal(_)));
    if parsed.is_absolute() && plain && parsed != Path::new("/") {
        Ok(parsed.to_owned())
    } else {
        Err(StartError::Request(format!(
            "'{path}' is no place for a {what}; expected an absolute path below /"
        )))
    }
}

/// Makes `rootfs` the root, and leaves nothing of the old one.
fn pivot(rootfs: &Path) -> io::Result<()> {
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    mount_bind_recursive(rootfs, rootfs)?;
    std::env::set_current_dir(rootfs)?;
    // Both roots at one place (pivot_root(2), *pivot_root(".", ".")*); the old one lies on top.
    rustix::process::pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    std::env::set_current_dir("/")
}

/// Makes a directory and those above it. Symbolic links are followed, within the new root.
fn directory(path: &Path) -> Result<(), StartError> {
    if path.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(path).map_err(StartError::at(path, "a directory"))
}

/// A directory that every container has, made if the image has none. A link in its place would lead the mount, and what covers parts of it, somewhere else.
fn ground(path: &Path) -> Result<(), StartError> {
    let made = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => Ok(()),
        Ok(_) => Err(io::Error::from(ErrorKind::NotADirectory)),
        Err(error) if error.kind() == ErrorKind::NotFound => fs::create_dir(path),
        Err(error) => Err(error),
    };
    made.map_err(StartError::at(path, "a directory"))
}

/// That a path doesn't lead to the root itself. What is mounted there lies above what the root is restricted to, and `/..` leads to it.
fn below_root(path: &Path) -> Result<(), StartError> {
    let which = |path: &Path| fs::metadata(path).map(|found| (found.dev(), found.ino()));
    let differ = which(path).and_then(|there| match there == which(Path::new("/"))? {
        true => Err(io::Error::from(ErrorKind::ResourceBusy)),
        false => Ok(()),
    });
    differ.map_err(StartError::at(path, "a directory that is not the root"))
}

/// The files that tell a container's hostname, empty as yet.
#[derive(Debug)]
pub(crate) struct Names([fs::File; 2]);

/// `/etc/hostname` and `/etc/hosts` belong to the container alone, so they are files of its own rather than mounted: programs that
/// replace them by renaming can.
fn names() -> Result<Names, StartError> {
    directory(Path::new("/etc"))?;
    let file = |path: &str| {
        // Not through a link, and not into a file that has other names.
        let removed = match fs::remove_file(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            other => other,
        };
        let made = removed.and_then(|()| fs::File::create_new(path));
        made.map_err(StartError::at(Path::new(path), "a file"))
    };
    Ok(Names([file(HOSTNAME)?, file(HOSTS)?]))
}

impl Names {
    /// Closes them, too: a root whose files are open to write can't be made read-only.
    fn tell(self, hostname: &str) -> Result<(), StartError> {
        rustix::system::sethostname(hostname.as_bytes()).map_err(StartError::step("setting the hostname"))?;
        for (file, (path, content)) in self.0.iter().zip(name_files(hostname)) {
            file.write_all_at(content.as_bytes(), 0).map_err(StartError::step(format!("writing {path}")))?;
        }
        Ok(())
    }
}

/// The files that tell a hostname.
fn name_files(hostname: &str) -> [(&'static str, String); 2] {
    let hosts = format!(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n127.0.1.1\t{hostname}\n"
    );
    [(HOSTNAME, format!("{hostname}\n")), (HOSTS, hosts)]
}

/// Gives a running container another hostname: that of the UTS namespace that the calling process is in, and in the files below `rootfs`, which
/// becomes its root. Seen from there even a read-only root can be written. A file that the workload has made its own is left alone.
///
/// # Errors
///
/// sethostname(2)'s and chroot(2)'s, and of the files.
pub(crate) fn rename(rootfs: &Path, from: &str, to: &str) -> io::Result<()> {
    rustix::system::sethostname(to.as_bytes())?;
    rustix::process::chroot(rootfs)?;
    std::env::set_current_dir("/")?;
    for ((path, before), (_, after)) in name_files(from).into_iter().zip(name_files(to)) {
        if untouched(path, &before)? {
            fs::remove_file(path)?;
            fs::write(path, after)?;
        }
    }
    Ok(())
}

/// Whether a regular file, and no link to one, has just this content.
fn untouched(path: &str, content: &str) -> io::Result<bool> {
    let length = u64::try_from(content.len()).unwrap_or(u64::MAX);
    match fs::symlink_metadata(path) {
        Ok(file) => Ok(file.is_file() && file.len() == length && fs::read(path)? == content.as_bytes()),
        // Not where it was.
        Err(_) => Ok(false),
    }
}

/// Kernel settings that belong to a namespace of the container's, or, for `net.`, of the room's.
fn settings(surroundings: &Surroundings) -> Result<(), StartError> {
    for name in surroundings.sysctls.keys() {
        let own = ["kernel.shm", "kernel.msg", "fs.mqueue.", "net."].iter().any(|own| name.starts_with(own))
            || name == "kernel.sem"
            || name == "kernel.domainname";
        let plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
        if !own || !plain || name.contains("..") {
            return Err(StartError::Request(format!(
                "the kernel setting '{name}' is not a container's; there are kernel.shm*, kernel.msg*, kernel.sem, kernel.domainname, fs.mqueue.* and net.*"
            )));
        }
    }
    if surroundings.sysctls.is_empty() {
        return Ok(());
    }
    // Nothing of the container's runs yet.
    let flags = MountFlags::BIND | QUIET;
    mount_remount(SETTINGS, flags, c"").map_err(StartError::step("uncovering the kernel's settings"))?;
    for (name, value) in &surroundings.sysctls {
        fs::write(Path::new(SETTINGS).join(name.replace('.', "/")), value)
            .map_err(StartError::step(format!("setting {name} to '{value}'")))?;
    }
    mount_remount(SETTINGS, flags | MountFlags::RDONLY, c"")
        .map_err(StartError::step("covering the kernel's settings"))
}

/// A tmpfs, or a volume: a directory of the image mounted onto itself, which stays writable when the root doesn't.
fn place(path: &Path, options: Option<tmpfs::Options>) -> io::Result<()> {
    match options {
        Some(options) => Ok(mount("tmpfs", path, "tmpfs", options.flags, options.text.as_c_str())?),
        None => Ok(mount_bind(path, path)?),
    }
}

/// Mounts a directory that was taken along.
fn show(taken: &OwnedFd, at: &Path) -> io::Result<()> {
    Ok(move_mount(taken, "", CWD, at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

fn cover() -> Result<(), StartError> {
    let cover = || -> io::Result<()> {
        for path in READ_ONLY.map(Path::new) {
            if path.exists() {
                mount_bind_recursive(path, path)?;
                mount_remount(path, MountFlags::BIND | MountFlags::RDONLY | QUIET, c"")?;
            }
        }
        for path in MASKED.map(Path::new) {
            if path.is_dir() {
                mount("tmpfs", path, "tmpfs", QUIET | MountFlags::RDONLY, c"size=0k")?;
            } else if path.exists() {
                mount_bind("/dev/null", path)?;
            }
        }
        Ok(())
    };
    cover().map_err(StartError::step("covering parts of /proc and /sys"))
}

#[cfg(test)]
mod tests;
