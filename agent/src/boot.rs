//! From the kernel's first call to the control loop, and the end: the file systems from a table, loopback, the disk,
//! the handshake, and at last a restart, which ends the VMM.
//!
//! ```text
//!  main ─▶ mounts, own root ─▶ loopback ─▶ dial, Hello ─▶ disk ─▶ Welcome ─▶ room ──Shutdown──▶ restart
//!             │ fails                        │ refused, broken                │ connection lost
//!             └──────────────────────────────┴────────────────────────────────┴─────────────────▶ restart
//! ```

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change, mount_move};
use rustix::net::{AddressFamily, SocketType};
use rustix::system::RebootCommand;
use thiserror::Error;

use crate::control::Control;
use crate::identity::Kernel;
use crate::room::{Host, Room};
use crate::socket::Dialler;
use crate::{container::cgroup, disk, fork};

/// Why a guest can't begin.
#[derive(Debug, Error)]
pub(crate) enum BootError {
    /// A row of the table.
    #[error(
        "{0} can't be mounted: the guest kernel lacks an option that rootfs/kernel/guest.config asks for"
    )]
    Mount(&'static str, #[source] rustix::io::Errno),
    /// The new root.
    #[error("the agent can't move to a root of its own")]
    Root(#[source] io::Error),
}

/// One row of the mount table.
struct Row {
    kind: &'static str,
    at: &'static str,
    flags: MountFlags,
    options: &'static std::ffi::CStr,
}

const QUIET: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC).union(MountFlags::NODEV);

/// In order. `/` below [`ROOT`] is what the agent moves to.
const MOUNTS: [Row; 7] = [
    Row { kind: "tmpfs", at: "", flags: MountFlags::NOSUID, options: c"mode=755,size=16m" },
    Row { kind: "proc", at: "proc", flags: QUIET, options: c"" },
    Row { kind: "sysfs", at: "sys", flags: QUIET, options: c"" },
    Row { kind: "devtmpfs", at: "dev", flags: MountFlags::NOSUID, options: c"mode=755" },
    Row {
        kind: "devpts",
        at: "dev/pts",
        flags: MountFlags::NOSUID.union(MountFlags::NOEXEC),
        options: c"mode=600,ptmxmode=600",
    },
    Row { kind: "tmpfs", at: "run", flags: QUIET, options: c"mode=755" },
    // Of the whole hierarchy, so also of a mount that a workload makes: what lies at the root of its cgroup namespace refuses
    // its writes (cgroup-v2.rst, *Delegation*). Anybody is root in a user namespace of their own, and may mount it there.
    Row { kind: "cgroup2", at: "sys/fs/cgroup", flags: QUIET, options: c"nsdelegate" },
];

/// Where the agent's own root is put together. The initial root is a rootfs, which nobody can pivot away from, so the
/// agent covers it with a tmpfs; containers then pivot from that.
const ROOT: &str = "/proc";

/// The agent's `main`: never returns in a guest.
pub fn run() {
    let booted_us = monotonic_us();
    if rustix::process::getpid().as_raw_nonzero().get() != 1 {
        complain("carrel-agent is the init of a carrel microVM: it does nothing elsewhere");
        std::process::exit(2);
    }
    if let Err(error) = live(booted_us) {
        complain(&carrel_protocol::chain(error.as_ref()));
    }
    restart();
}

fn live(booted_us: u64) -> Result<(), Box<dyn std::error::Error>> {
    mount_all()?;
    // Without loopback a function has no Runtime API, but a room is still a room.
    if let Err(error) = loopback_up() {
        complain(&format!("loopback stays down: {error}"));
    }
    protect_from_out_of_memory();
    compact_memory_on_demand_alone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let tasks = tokio::task::LocalSet::new();
    tasks.block_on(&runtime, async {
        let dialler = Dialler::Vsock;
        let mut control = Control::dial(&dialler).await?;
        control.hello(booted_us, false).await?;
        // While the host reads that.
        let disk = disk::mount_at(Path::new("/dev/vda"), Path::new("/room"));
        let disk = match disk {
            Ok(disk) => disk,
            Err(error) => {
                control.broken(&carrel_protocol::chain(&error)).await;
                return Err(error.into());
            }
        };
        let identity = control.welcome().await?;
        let guest = Rc::new(Kernel);
        crate::identity::adopt(&*guest, &identity)?;
        let host = Host {
            dialler,
            booted_us,
            containers: "/room/containers".into(),
            hooks: "/run/clone".into(),
            cgroups: cgroup::Tree::new(Path::new("/sys/fs/cgroup"))?,
            guest,
            id: identity.id,
            hostname: identity.hostname,
            disk: Some(disk),
        };
        Room::live(host, control).await;
        Ok(())
    })
}

fn mount_all() -> Result<(), BootError> {
    for row in &MOUNTS {
        let at = Path::new(ROOT).join(row.at);
        if !at.is_dir() {
            fs::create_dir_all(&at).map_err(BootError::Root)?;
        }
        mount(row.kind, &at, row.kind, row.flags, row.options)
            .map_err(|error| BootError::Mount(row.kind, error))?;
    }
    let moved = || -> io::Result<()> {
        std::env::set_current_dir(ROOT)?;
        mount_move(".", "/")?;
        rustix::process::chroot(".")?;
        std::env::set_current_dir("/")?;
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        Ok(())
    };
    moved().map_err(BootError::Root)
}

/// Sets `IFF_UP` on `lo` (netdevice(7)); the kernel gives it its addresses.
pub(crate) fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    // SAFETY: all zeros is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l'.cast_signed();
    request.ifr_name[1] = b'o'.cast_signed();
    request.ifr_ifru.ifru_flags =
        i16::try_from(libc::IFF_UP | libc::IFF_RUNNING).map_err(io::Error::other)?;
    let fd = std::os::fd::AsRawFd::as_raw_fd(&socket.as_fd());
    // SAFETY: the request is an ifreq, as SIOCSIFFLAGS asks.
    let done = unsafe { libc::ioctl(fd, libc::SIOCSIFFLAGS, &raw mut request) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The kernel panics if its init is killed for want of memory, so it never picks the agent; its children reset this.
fn protect_from_out_of_memory() {
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
}

/// The kernel looks twice a second whether to compact memory ahead of any need (`compaction_proactiveness`, admin-guide/sysctl/vm.rst): most of what wakes an idle guest. A
/// host's memory is its own to arrange; on demand the guest's is compacted as ever.
fn compact_memory_on_demand_alone() {
    let _ = fs::write("/proc/sys/vm/compaction_proactiveness", "0");
}

/// CLOCK_MONOTONIC, µs.
pub(crate) fn monotonic_us() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    seconds * 1_000_000 + u64::try_from(now.tv_nsec).unwrap_or_default() / 1000
}

/// To the console, for whoever looks at the serial port; there may be none.
fn complain(message: &str) {
    use io::Write;
    let _ = writeln!(io::stderr(), "carrel-agent: {message}");
}

/// Ends the guest: the command line's `reboot=t` makes this a triple fault, which ends the VMM.
fn restart() -> ! {
    fork::close_all_but(&[]);
    rustix::fs::sync();
    loop {
        // Errors can't be told to anyone; PID 1 must not return.
        let _ = rustix::system::reboot(RebootCommand::Restart);
        std::thread::sleep(Duration::from_secs(1));
    }
}
