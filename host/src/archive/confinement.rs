//! What an archive's reader puts itself under. Whoever starts it makes it in new user, mount, PID, network, IPC and UTS namespaces, as one
//! unprivileged user outside, with no descriptor but its socket. [`enter`] does the rest, in this order:
//!
//! 1. an empty, read-only root; the old one detached
//! 2. resource limits: CPU time, address space, descriptors, processes; no file may grow, no core
//! 3. no capabilities: bounding, ambient, permitted, effective, inheritable
//! 4. `no_new_privs`, not dumpable
//!
//! then seccomp follows ([`super::filter`]). A part that can't be had is an error that names it. There is no cgroup: what it may use
//! is little enough for limits.

use std::io;

use carrel_protocol::confinement::Part;
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{DumpableBehavior, Resource, Rlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};
use thiserror::Error;

/// Seconds of CPU: a hundred times what the largest archive takes natively, and enough where the CPU is emulated.
const CPU_SECONDS: u64 = 20;
/// Bytes: the program itself, and 16,384 entries with 4 MiB of names several times.
const ADDRESS_SPACE: u64 = 256 << 20;
/// Descriptors: `/dev/null` three times, which the standard library opens, the socket, the archive.
const DESCRIPTORS: u64 = 5;
/// Above every capability that Linux has or will soon have.
const LAST_CAPABILITY: u32 = 63;
/// Linux's first 37 capabilities are in every kernel since 3.16.
const ALWAYS_THERE: u32 = 36;

/// A part can't be had.
#[derive(Debug, Error)]
#[error("{part}")]
pub(super) struct Missing {
    part: &'static str,
    #[source]
    source: io::Error,
}

impl Missing {
    pub(super) fn new(part: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self { part, source }
    }
}

/// Confines this process, which has one thread.
pub(super) fn enter(without: &[Part]) -> Result<(), Missing> {
    if !without.contains(&Part::Namespaces) {
        empty_root().map_err(Missing::new("an empty root (needs user and mount namespaces)"))?;
    }
    limit_resources().map_err(Missing::new("resource limits"))?;
    if !without.contains(&Part::Capabilities) {
        drop_capabilities().map_err(Missing::new("no capabilities"))?;
        forbid_new_privileges().map_err(Missing::new("no_new_privs"))?;
    }
    Ok(())
}

/// pivot_root(2), *NOTES*: `pivot_root(".", ".")` stacks the old root on the new one, where it is detached.
fn empty_root() -> io::Result<()> {
    // Any directory that every Linux has serves as the place; what was mounted there is covered in this namespace alone.
    const PLACE: &str = "/proc";
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY;
    rustix::mount::mount("tmpfs", PLACE, "tmpfs", flags, c"size=0,nr_inodes=1,mode=0555")?;
    rustix::process::chdir(PLACE)?;
    rustix::process::pivot_root(".", ".")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    Ok(rustix::process::chdir("/")?)
}

fn limit_resources() -> io::Result<()> {
    for (resource, soft, hard) in [
        (Resource::Core, 0, 0),
        (Resource::Fsize, 0, 0),
        (Resource::Memlock, 0, 0),
        (Resource::Nproc, 0, 0),
        (Resource::Nofile, DESCRIPTORS, DESCRIPTORS),
        (Resource::As, ADDRESS_SPACE, ADDRESS_SPACE),
        // At the soft limit it gets SIGXCPU, which says why it died; at the hard one SIGKILL.
        (Resource::Cpu, CPU_SECONDS, CPU_SECONDS + 1),
    ] {
        let most = rustix::process::getrlimit(resource).maximum;
        let limit = |limit| Some(most.map_or(limit, |most| most.min(limit)));
        rustix::process::setrlimit(resource, Rlimit { current: limit(soft), maximum: limit(hard) })?;
    }
    Ok(())
}

fn drop_capabilities() -> io::Result<()> {
    for number in 0..=LAST_CAPABILITY {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // Beyond the last one that this kernel knows.
            Err(Errno::INVAL) if number > ALWAYS_THERE => break,
            // Without CAP_SETPCAP the bounding set can't shrink; no_new_privs makes it moot.
            Err(Errno::PERM) => break,
            Err(error) => return Err(error.into()),
        }
    }
    rustix::thread::clear_ambient_capability_set()?;
    let none = CapabilitySet::empty();
    let none = CapabilitySets { effective: none, permitted: none, inheritable: none };
    rustix::thread::set_capabilities(None, none)?;
    match rustix::thread::capabilities(None)? == none {
        true => Ok(()),
        false => Err(io::Error::other("capabilities remain after capset")),
    }
}

fn forbid_new_privileges() -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    Ok(rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}
