//! A confined program's process, the VMM's above all: clone3(2), and what the child does before it is another program.
//!
//! This is unsafe code. The child shares no memory with its parent (no CLONE_VM), but is a copy of a process that may
//! have other threads, so until `execveat` it makes bare system calls on what was prepared for it and neither allocates nor locks.

use std::ffi::{CString, c_char, c_int, c_long};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::ptr;

use rustix::process::{Signal, WaitId, WaitIdOptions};

use super::LaunchError;

/// Where the VMM finds its owner's socket.
pub(crate) const OWNER_FD: RawFd = 3;
/// Linux 5.7; libc has it in a type that is too small.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
const NAMESPACES: c_int = libc::CLONE_NEWUSER
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS;
/// The child's status when it can't become the VMM; nobody sees it, since the error comes over a pipe.
const FAILED: c_int = 127;

/// The socket that a program which was started by [`spawn`] finds at its place; to be called once.
pub(crate) fn owner_socket() -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD on a number, without pointers.
    if unsafe { libc::fcntl(OWNER_FD, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and nobody in this process owns it: it was there before the program began.
    let socket = unsafe { OwnedFd::from_raw_fd(OWNER_FD) };
    rustix::net::sockopt::socket_type(&socket)?;
    Ok(socket)
}

/// What is to be started.
pub(crate) struct Plan<'a> {
    pub(crate) program: BorrowedFd<'a>,
    pub(crate) path: &'a Path,
    pub(crate) arguments: Vec<String>,
    pub(crate) socket: BorrowedFd<'a>,
    pub(crate) cgroup: Option<File>,
    /// The user and group outside that its own user 0 is, in namespaces of its own; without it, it has none.
    pub(crate) user: Option<u32>,
}

/// A VMM's process. Killed and waited for when dropped before [`Child::wait`].
#[derive(Debug)]
pub(crate) struct Child {
    pid: u32,
    descriptor: OwnedFd,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ChildEnd {
    Status(u8),
    Signal(u8),
}

impl Child {
    /// Its number here.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Kills it.
    pub(crate) fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.descriptor, Signal::KILL);
    }

    /// Another descriptor of the same process, for a thread that waits for its end.
    pub(crate) fn descriptor(&self) -> io::Result<OwnedFd> {
        self.descriptor.try_clone()
    }

    /// Waits for its end, and buries it.
    pub(crate) fn wait(&self) -> io::Result<ChildEnd> {
        wait_for(self.descriptor.as_fd(), WaitIdOptions::EXITED)
    }
}

/// Waits until a process has ended and leaves it a zombie, whose counters can still be read.
pub(crate) fn wait_until_ended(process: BorrowedFd<'_>) -> io::Result<ChildEnd> {
    wait_for(process, WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)
}

fn wait_for(process: BorrowedFd<'_>, how: WaitIdOptions) -> io::Result<ChildEnd> {
    loop {
        match rustix::process::waitid(WaitId::PidFd(process), how) {
            Ok(Some(status)) => {
                let number = |n: i32| u8::try_from(n).unwrap_or(u8::MAX);
                return Ok(match status.exit_status() {
                    Some(code) => ChildEnd::Status(number(code)),
                    None => ChildEnd::Signal(number(status.terminating_signal().unwrap_or(0))),
                });
            }
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // After a wait both fail, harmlessly: the descriptor never means another process.
        self.kill();
        let _ = self.wait();
    }
}

/// What the child needs, all of it made before the clone.
struct Prepared {
    program: RawFd,
    socket: RawFd,
    /// Read until its end: then the parent has mapped the user.
    mapped: RawFd,
    /// Where a failure goes: the step's number, then errno.
    failure: RawFd,
    /// These four, in order.
    kept: [RawFd; 4],
    arguments: Vec<*const c_char>,
    environment: [*const c_char; 1],
    becomes_user: bool,
    parent: c_int,
}

/// What the child fails at.
const STEPS: [&str; 4] =
    ["a user of its own in a user namespace", "an end with its owner", "closed descriptors", "execution"];

/// Starts the process and returns when it has become the VMM.
pub(crate) fn spawn(plan: &Plan<'_>) -> Result<Child, LaunchError> {
    let (mapped_read, mapped_write) = io::pipe()?;
    let (mut failure_read, failure_write) = io::pipe()?;
    // The child puts the socket at OWNER_FD: what it still needs after that must lie elsewhere.
    let above =
        |fd: BorrowedFd<'_>| rustix::io::fcntl_dupfd_cloexec(fd, OWNER_FD + 1).map_err(io::Error::from);
    let (program, failure) = (above(plan.program)?, above(failure_write.as_fd())?);
    let words: Vec<CString> = plan
        .arguments
        .iter()
        .map(|word| CString::new(word.as_str()).map_err(io::Error::other))
        .collect::<Result<_, _>>()?;
    let mut kept =
        [program.as_raw_fd(), plan.socket.as_raw_fd(), mapped_read.as_raw_fd(), failure.as_raw_fd()];
    kept.sort_unstable();
    let prepared = Prepared {
        program: program.as_raw_fd(),
        socket: plan.socket.as_raw_fd(),
        mapped: mapped_read.as_raw_fd(),
        failure: failure.as_raw_fd(),
        kept,
        arguments: words.iter().map(|word| word.as_ptr()).chain([ptr::null()]).collect(),
        environment: [ptr::null()],
        becomes_user: plan.user.is_some(),
        parent: c_int::try_from(std::process::id()).unwrap_or(0),
    };
    let child = clone(plan, &prepared)?;
    drop((failure_write, failure));
    if let Some(user) = plan.user {
        map_user(child.pid, user)
            .map_err(|source| LaunchError::Part { part: "a user of its own in a user namespace", source })?;
    }
    drop(mapped_write);
    let mut failure = [0; 8];
    match failure_read.read_exact(&mut failure) {
        // The pipe was closed by execveat: the child is the VMM.
        Err(_) => Ok(child),
        Ok(()) => {
            let [step @ .., _, _, _, _] = failure;
            let [_, _, _, _, errno @ ..] = failure;
            let source = io::Error::from_raw_os_error(i32::from_ne_bytes(errno));
            let step = usize::try_from(u32::from_ne_bytes(step)).unwrap_or(STEPS.len());
            Err(match STEPS.get(step) {
                Some(part) if step + 1 < STEPS.len() => LaunchError::Part { part, source },
                Some(_) | None => LaunchError::Execute { path: plan.path.to_owned(), source },
            })
        }
    }
}

fn clone(plan: &Plan<'_>, prepared: &Prepared) -> Result<Child, LaunchError> {
    let mut descriptor: c_int = -1;
    // SAFETY: clone_args is plain data; zeros mean nothing asked for.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = u64::from(libc::CLONE_PIDFD.unsigned_abs());
    arguments.pidfd = (&raw mut descriptor).expose_provenance() as u64;
    arguments.exit_signal = u64::from(libc::SIGCHLD.unsigned_abs());
    if plan.user.is_some() {
        arguments.flags |= u64::from(NAMESPACES.unsigned_abs());
    }
    if let Some(cgroup) = &plan.cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = u64::from(cgroup.as_raw_fd().unsigned_abs());
    }
    // SAFETY: no CLONE_VM: the child has its own copy of everything. `arguments` and `descriptor` outlive the call.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>()) };
    if pid == 0 {
        // SAFETY: this is the child of a clone without CLONE_VM, and `prepared` is its copy.
        unsafe { become_vmm(prepared) }
    }
    let part = match (plan.cgroup.is_some(), plan.user.is_some()) {
        (true, true) => "birth in its cgroup and in new namespaces (user, mount, pid, net, ipc, uts)",
        (true, false) => "birth in its cgroup",
        (false, true) => "birth in new namespaces (user, mount, pid, net, ipc, uts)",
        (false, false) => "a process of its own",
    };
    let pid =
        u32::try_from(pid).map_err(|_| LaunchError::Part { part, source: io::Error::last_os_error() })?;
    // SAFETY: CLONE_PIDFD put a descriptor there that nobody else owns.
    Ok(Child { pid, descriptor: unsafe { OwnedFd::from_raw_fd(descriptor) } })
}

/// User 0 inside is `user` outside, and nobody else exists there.
fn map_user(pid: u32, user: u32) -> io::Result<()> {
    let group = if rustix::process::geteuid().is_root() {
        user
    } else {
        // An ordinary user may map itself only without the power to drop groups (user_namespaces(7)).
        fs::write(format!("/proc/{pid}/setgroups"), "deny")?;
        rustix::process::getegid().as_raw()
    };
    fs::write(format!("/proc/{pid}/uid_map"), format!("0 {user} 1"))?;
    fs::write(format!("/proc/{pid}/gid_map"), format!("0 {group} 1"))
}

/// The child's life until it is another program. Never returns.
///
/// # Safety
///
/// Only in the child of a clone without CLONE_VM.
unsafe fn become_vmm(prepared: &Prepared) -> ! {
    let step = |number: u32, done: c_long| {
        if done < 0 {
            fail(prepared, number);
        }
    };
    step(2, let_others_go(prepared));
    if prepared.becomes_user {
        step(0, become_user(prepared));
    }
    step(1, die_with_owner(prepared));
    step(2, keep_only_the_socket(prepared));
    step(3, execute(prepared));
    fail(prepared, 3)
}

/// Closes what is not this child's. Among it may be the ends of pipes of children that other threads are starting: two that waited for the ends of each
/// other's would wait for ever.
fn let_others_go(prepared: &Prepared) -> c_long {
    let mut from = 0;
    for fd in prepared.kept {
        if fd > from {
            // SAFETY: a bare system call; descriptors of this process's own table, which nobody owns in it any more.
            let closed = unsafe { libc::syscall(libc::SYS_close_range, from, fd - 1, 0) };
            if closed < 0 {
                return closed;
            }
        }
        from = fd + 1;
    }
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_close_range, from, u32::MAX, 0) }
}

/// Waits to be mapped, and becomes user 0 of the namespace: until then it is its parent's user.
fn become_user(prepared: &Prepared) -> c_long {
    let mut nothing = 0_u8;
    // SAFETY: bare system calls on descriptors that are this process's copies, and one byte on its stack.
    unsafe {
        libc::syscall(libc::SYS_read, prepared.mapped, &raw mut nothing, 1);
        // Fails where the map forbids it: then there are no groups to drop but one's own. An empty list needs no pointer.
        libc::syscall(libc::SYS_setgroups, 0, ptr::null::<libc::gid_t>());
        let group = libc::syscall(libc::SYS_setresgid, 0, 0, 0);
        if group < 0 { group } else { libc::syscall(libc::SYS_setresuid, 0, 0, 0) }
    }
}

/// Asks for SIGKILL at the owner's death. The VMM also ends when its owner's socket closes; this holds for one that hangs.
fn die_with_owner(prepared: &Prepared) -> c_long {
    // SAFETY: bare system calls without pointers.
    unsafe {
        let asked = libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
        // The owner may have died before; inside a PID namespace of its own the parent reads as 0.
        let parent = libc::syscall(libc::SYS_getppid);
        if parent != 0 && parent != c_long::from(prepared.parent) {
            libc::syscall(libc::SYS_exit_group, FAILED);
        }
        asked
    }
}

/// The socket at its place, the failure pipe until execveat, nothing else after it.
fn keep_only_the_socket(prepared: &Prepared) -> c_long {
    // SAFETY: bare system calls; descriptors of this process's own table, which nobody owns in it any more.
    unsafe {
        // All that is left is close-on-exec already; this makes sure.
        let marked = libc::syscall(libc::SYS_close_range, 0, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
        if marked < 0 {
            return marked;
        }
        if prepared.socket == OWNER_FD {
            return libc::syscall(libc::SYS_fcntl, OWNER_FD, libc::F_SETFD, 0);
        }
        libc::syscall(libc::SYS_dup3, prepared.socket, OWNER_FD, 0)
    }
}

fn execute(prepared: &Prepared) -> c_long {
    // SAFETY: the path is a C string; the arrays end with null and their strings outlive the call.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            prepared.program,
            c"".as_ptr(),
            prepared.arguments.as_ptr(),
            prepared.environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    }
}

/// Tells the parent and ends.
fn fail(prepared: &Prepared, step: u32) -> ! {
    // SAFETY: errno is this thread's own; a bare write of eight bytes on the stack; then the end of the process.
    unsafe {
        let mut message = [0_u8; 8];
        let (first, last) = message.split_at_mut(4);
        first.copy_from_slice(&step.to_ne_bytes());
        last.copy_from_slice(&(*libc::__errno_location()).to_ne_bytes());
        libc::syscall(libc::SYS_write, prepared.failure, message.as_ptr(), message.len());
        libc::syscall(libc::SYS_exit_group, FAILED);
        libc::_exit(FAILED)
    }
}
