//! The confinement that the VMM puts itself under, before it hears a word from anybody.
//!
//! Whoever launches it (the host, or the standalone launcher) makes the process in a cgroup and in new user, mount, PID, network, IPC and UTS
//! namespaces, where its user 0 is one unprivileged user outside. [`enter`] does the rest, in this order:
//!
//! 1. standard streams to `/dev/null`
//! 2. an empty, read-only root; the old one detached
//! 3. resource limits: no core, no locked memory, so many descriptors
//! 4. no capabilities: bounding, ambient, permitted, effective, inheritable
//! 5. `no_new_privs`, not dumpable, no memory that becomes executable
//! 6. every descriptor closed but the owner's socket and this process's own pagemap
//!
//! then seccomp follows ([`crate::seccomp`]). A part that can't be had is an error that names it.

use std::io;
use std::os::fd::RawFd;
use std::ptr;
use std::str::FromStr;

use carrel_protocol::confinement::Part;
use thiserror::Error;

use crate::event::check;

/// Descriptors that one VMM may hold: devices, vCPUs, and a vsock device's connections.
const MAX_OPEN: u64 = 4096;
/// Above every capability that Linux has or will soon have.
const LAST_CAPABILITY: i32 = 63;
const PR_SET_MDWE: i32 = 65;
const PR_MDWE_REFUSE_EXEC_GAIN: u64 = 1;
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

/// Parts to do without.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Without(Vec<Part>);

impl Without {
    /// Nothing is left out.
    pub const NOTHING: Self = Self(Vec::new());

    /// Everything is left out.
    pub fn everything() -> Self {
        Self(Part::ALL.to_vec())
    }

    /// Whether a part is left out.
    pub fn leaves_out(&self, part: Part) -> bool {
        self.0.contains(&part)
    }

    /// Leaves these out too.
    pub fn add(&mut self, other: &Self) {
        self.0.extend(&other.0);
    }

    /// The parts, in order.
    pub fn parts(&self) -> &[Part] {
        &self.0
    }
}

impl FromStr for Without {
    type Err = String;

    fn from_str(list: &str) -> Result<Self, String> {
        list.split(',')
            .map(|name| {
                name.parse().map_err(|_| {
                    format!(
                        "{name:?} is no part of the confinement; they are cgroup, namespaces, capabilities, seccomp"
                    )
                })
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

/// A part can't be had.
#[derive(Debug, Error)]
#[error("the host can't give this part of the confinement: {part}")]
pub struct JailError {
    part: &'static str,
    #[source]
    source: io::Error,
}

fn missing(part: &'static str) -> impl FnOnce(io::Error) -> JailError {
    move |source| JailError { part, source }
}

/// Confines this process, which has one thread. Of its descriptors those in `keep` stay open, in ascending order.
pub fn enter(keep: &[RawFd], without: &Without) -> Result<(), JailError> {
    silence_standard_streams().map_err(missing("standard streams to /dev/null"))?;
    if !without.leaves_out(Part::Namespaces) {
        empty_root().map_err(missing("an empty root (needs user and mount namespaces)"))?;
    }
    limit_resources().map_err(missing("resource limits"))?;
    if !without.leaves_out(Part::Capabilities) {
        drop_capabilities().map_err(missing("no capabilities"))?;
        forbid_new_privileges().map_err(missing("no_new_privs"))?;
    }
    close_all_but(keep).map_err(missing("closed descriptors (close_range, Linux 5.9)"))
}

fn silence_standard_streams() -> io::Result<()> {
    // SAFETY: the path is a C string.
    let null = check(unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) })?;
    for stream in 0..3 {
        if null != stream {
            // SAFETY: no pointers; the standard streams are nobody's OwnedFd.
            check(unsafe { libc::dup2(null, stream) })?;
        }
    }
    if null > 2 {
        // SAFETY: the descriptor was opened here.
        unsafe { libc::close(null) };
    }
    Ok(())
}

/// pivot_root(2), *NOTES*: `pivot_root(".", ".")` stacks the old root on the new one, where it is detached.
fn empty_root() -> io::Result<()> {
    let root = c"/".as_ptr();
    let here = c".".as_ptr();
    // Any directory that every Linux has serves as the place; what was mounted there is covered in this namespace alone.
    let place = c"/proc".as_ptr();
    let tmpfs = c"tmpfs".as_ptr();
    let options = c"size=0,nr_inodes=1,mode=0555".as_ptr();
    let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    // SAFETY: every pointer is a C string or null where the call allows it.
    check(unsafe {
        libc::mount(ptr::null(), root, ptr::null(), libc::MS_REC | libc::MS_PRIVATE, ptr::null())
    })?;
    // SAFETY: as above.
    check(unsafe { libc::mount(tmpfs, place, tmpfs, flags | libc::MS_RDONLY, options.cast()) })?;
    // SAFETY: as above.
    check(unsafe { libc::chdir(place) })?;
    // SAFETY: as above.
    let pivoted = unsafe { libc::syscall(libc::SYS_pivot_root, here, here) };
    check(i32::try_from(pivoted).unwrap_or(-1))?;
    // SAFETY: as above.
    check(unsafe { libc::umount2(here, libc::MNT_DETACH) })?;
    // SAFETY: as above.
    check(unsafe { libc::chdir(root) }).map(drop)
}

fn limit_resources() -> io::Result<()> {
    for (resource, limit) in
        [(libc::RLIMIT_CORE, 0), (libc::RLIMIT_MEMLOCK, 0), (libc::RLIMIT_NOFILE, MAX_OPEN)]
    {
        let mut now = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: `now` is valid for the write.
        check(unsafe { libc::getrlimit(resource, &raw mut now) })?;
        let limit = limit.min(now.rlim_max);
        let new = libc::rlimit { rlim_cur: limit, rlim_max: limit };
        // SAFETY: `new` is valid for the read.
        check(unsafe { libc::setrlimit(resource, &raw const new) })?;
    }
    Ok(())
}

fn drop_capabilities() -> io::Result<()> {
    for capability in 0..=LAST_CAPABILITY {
        // SAFETY: no pointers are passed.
        let dropped = check(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) });
        match dropped {
            // Beyond the last one that this kernel knows.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) && capability > 36 => break,
            // Without CAP_SETPCAP the bounding set can't shrink; no_new_privs makes it moot.
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => break,
            other => other.map(drop)?,
        }
    }
    // SAFETY: no pointers are passed.
    check(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) })?;
    let header = [CAPABILITY_VERSION_3, 0];
    let none = [0u32; 6];
    // SAFETY: the header and the two sets have the layout that version 3 asks for.
    let set = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
    check(i32::try_from(set).unwrap_or(-1))?;
    let mut now = [u32::MAX; 6];
    // SAFETY: as above; `now` has room for both sets.
    let got = unsafe { libc::syscall(libc::SYS_capget, header.as_ptr(), now.as_mut_ptr()) };
    check(i32::try_from(got).unwrap_or(-1))?;
    if now == none { Ok(()) } else { Err(io::Error::other("capabilities remain after capset")) }
}

fn forbid_new_privileges() -> io::Result<()> {
    // SAFETY: no pointers are passed, here and below.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
    // SAFETY: see above.
    check(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) })?;
    // Linux 6.3; before, seccomp's refusal of PROT_EXEC is all there is.
    // SAFETY: see above.
    unsafe { libc::prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) };
    Ok(())
}

fn close_all_but(keep: &[RawFd]) -> io::Result<()> {
    let range = |first: u32, last: u32| {
        if first > last {
            return Ok(());
        }
        // SAFETY: nobody in this process owns a descriptor in these ranges any more.
        let closed = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        check(i32::try_from(closed).unwrap_or(-1)).map(drop)
    };
    let mut first = 3;
    for kept in keep.iter().map(|kept| kept.unsigned_abs()) {
        range(first, kept.saturating_sub(1))?;
        first = kept + 1;
    }
    range(first, u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_named_and_unknown_ones_refused() {
        let without: Without = "cgroup,seccomp".parse().unwrap();
        assert!(without.leaves_out(Part::Seccomp) && !without.leaves_out(Part::Namespaces));
        assert!("cgroup,all".parse::<Without>().unwrap_err().contains("\"all\" is no part"));
    }
}
