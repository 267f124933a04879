//! Forking: a child runs a closure and ends; its end is waited for through a pidfd.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use carrel_protocol::agent::ExitStatus;
use rustix::process::{Signal, WaitId, WaitIdOptions, WaitIdStatus, WaitOptions};
use tokio::io::unix::AsyncFd;

/// What the child gets of its own.
#[derive(Clone, Copy, Default)]
pub(crate) struct Separate<'a> {
    /// `CLONE_NEW…` flags.
    pub(crate) namespaces: i32,
    /// The cgroup directory in which it is born.
    pub(crate) cgroup: Option<BorrowedFd<'a>>,
}

/// A child process that has not been waited for.
#[derive(Debug)]
pub(crate) struct Child {
    pid: i32,
    pidfd: OwnedFd,
}

/// Forks; the child runs `body` and ends with the status that it returns. Nothing of the caller's stack is dropped in the child.
///
/// The child starts with all signals at their defaults and none blocked. It must close what it doesn't need: [`close_all_but`].
///
/// # Errors
///
/// What clone3(2) says.
pub(crate) fn fork(separate: Separate<'_>, body: impl FnOnce() -> u8) -> io::Result<Child> {
    let mut pidfd: RawFd = -1;
    // SAFETY: all zeros is a valid clone_args.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    let mut flags = libc::CLONE_PIDFD;
    if let Some(cgroup) = separate.cgroup {
        // CLONE_INTO_CGROUP doesn't fit an i32.
        arguments.flags = 1 << 33;
        arguments.cgroup = u64::from(cgroup.as_raw_fd().unsigned_abs());
    }
    flags |= separate.namespaces;
    arguments.flags |= u64::from(flags.cast_unsigned());
    arguments.pidfd = std::ptr::from_mut(&mut pidfd) as u64;
    // exit_signal stays 0: the parent hears of the end through the pidfd alone.
    // SAFETY: without CLONE_VM this is fork(2): the child gets a copy of everything. The agent has one thread (see the
    // crate's page), so no lock of the allocator's can be held by a thread that doesn't exist in the child.
    let pid = unsafe {
        libc::syscall(libc::SYS_clone3, std::ptr::from_mut(&mut arguments), size_of::<libc::clone_args>())
    };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            default_signals();
            let status = body();
            // SAFETY: ends this process; nothing of the parent's is flushed or dropped twice.
            unsafe { libc::_exit(i32::from(status)) }
        }
        pid => {
            // SAFETY: the kernel has just made this descriptor for us.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            let pid = i32::try_from(pid).map_err(io::Error::other)?;
            Ok(Child { pid, pidfd })
        }
    }
}

impl Child {
    /// Its number as the parent sees it.
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// A descriptor that names it.
    pub(crate) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// SIGKILL. That it is gone already is no error.
    pub(crate) fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Waits for its end.
    pub(crate) async fn wait(self) -> io::Result<ExitStatus> {
        // SAFETY: the AsyncFd owns the descriptor, so it stays open as long as it is registered.
        let pidfd = unsafe { AsyncFd::register_with_interest(self.pidfd, tokio::io::Interest::READABLE) }?;
        // A pidfd is readable once its process is a zombie.
        let _ready = pidfd.readable().await?;
        let status = rustix::process::waitid(WaitId::PidFd(pidfd.get_ref().as_fd()), any_end())?;
        reap_orphans();
        exit_status(status.as_ref())
    }
}

/// `__WALL`: children without an exit signal too.
const EVERY_CHILD: WaitOptions = WaitOptions::from_bits_retain(libc::__WALL.cast_unsigned());

fn any_end() -> WaitIdOptions {
    WaitIdOptions::EXITED | WaitIdOptions::from_bits_retain(libc::__WALL.cast_unsigned())
}

fn exit_status(status: Option<&WaitIdStatus>) -> io::Result<ExitStatus> {
    let number = |n: Option<i32>| n.and_then(|n| u8::try_from(n).ok());
    let status = status.ok_or_else(|| io::Error::other("waitid gave no status"))?;
    let code = number(status.exit_status()).map(ExitStatus::Code);
    code.or_else(|| number(status.terminating_signal()).map(ExitStatus::Signal))
        .ok_or_else(|| io::Error::other("waitid gave neither a code nor a signal"))
}

/// PID 1 inherits what lost its parent. The kernel gives such a process SIGCHLD as its exit signal, and ours have none
/// (see [`fork`]), so that a plain wait takes orphans only.
fn reap_orphans() {
    if rustix::process::getpid().as_raw_nonzero().get() == 1 {
        while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
    }
}

/// Waits for all children that have ended, for the init of a container, which has only one that it knows: `known`. Returns its
/// status once it is among them.
pub(crate) fn reap_all(known: i32) -> Option<ExitStatus> {
    let mut found = None;
    while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG | EVERY_CHILD) {
        if pid.as_raw_nonzero().get() == known {
            let number = |n: i32| u8::try_from(n).unwrap_or(u8::MAX);
            found = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Some(ExitStatus::Code(number(code))),
                (None, Some(signal)) => Some(ExitStatus::Signal(number(signal))),
                (None, None) => None,
            };
        }
    }
    found
}

/// Closes every descriptor from 3 upwards but these.
pub(crate) fn close_all_but(kept: &[BorrowedFd<'_>]) {
    let mut kept: Vec<u32> = kept.iter().map(|fd| fd.as_raw_fd().unsigned_abs()).collect();
    kept.sort_unstable();
    let mut from = 3;
    for fd in kept.into_iter().chain([u32::MAX]) {
        if fd > from {
            close_range(from, fd - 1, 0);
        }
        from = from.max(fd.saturating_add(1));
    }
}

/// Has every descriptor from 3 upwards closed by the next `execve`.
pub(crate) fn close_all_on_exec() {
    close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
}

fn close_range(first: u32, last: u32, flags: u32) {
    // SAFETY: closes numbers; the callers are children that use none of these again.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) };
}

/// All signals at their defaults, none blocked: Rust's start-up ignores SIGPIPE.
fn default_signals() {
    for signal in 1..=64 {
        // SAFETY: SIG_DFL needs no handler; numbers that can't be set are refused.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    block_signals(&[]);
}

/// Blocks these signals and no others.
pub(crate) fn block_signals(signals: &[i32]) -> libc::sigset_t {
    // SAFETY: all zeros is the empty set of Linux's sigset_t.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    for &signal in signals {
        // SAFETY: `set` is ours.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    // SAFETY: `set` is initialised; the old mask is not asked for.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut()) };
    set
}
