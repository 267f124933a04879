//! The process above a workload: a container's init, or the keeper of an exec. It starts the workload, passes signals on, reaps
//! whatever loses its parent, and tells the agent how the workload ended.
//!
//! ```text
//!  init:    forked ─▶ namespaces, root ─▶ Created ─Order─▶ names, mounts ─┐
//!  keeper:  forked ─▶ joins the container ────────────────────────────────┴▶ terminal ─▶ fork ─▶ waiting for execve ─▶ running ─▶ Ended ─▶ gone
//!              │ fails                       │ agent gone    │ fails           │ fails            │ fails                 │ agent gone
//!              └──────────────▶ Failed ◀─────┼───────────────┴─────────────────┴──────────────────┘                       └─▶ gone, and with an init its whole namespace
//!                                            └─▶ gone
//! ```
//!
//! An init that waits for its order knows nothing yet of what it will run, so it can be part of a template.

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use carrel_protocol::agent::{ExitStatus, Process, TerminalSize};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::process::{DumpableBehavior, Pid, Signal, set_dumpable_behavior};
use rustix::pty::OpenptFlags;
use rustix::thread::{ThreadNameSpaceType, UnshareFlags, move_into_thread_name_spaces, unshare_unsafe};
use seccompiler::BpfProgram;

use super::program::{Program, Streams};
use super::report::{Along, Order, Report, Reporter};
use super::root::{self, Root};
use super::{StartError, seccomp};
use crate::fork::{self, Separate};

/// What a supervisor starts and whom it tells.
#[derive(Debug)]
pub(crate) struct Job<'a> {
    pub(crate) process: &'a Process,
    pub(crate) hostname: &'a str,
    pub(crate) extra: &'a [(String, String)],
    pub(crate) filters: &'a [BpfProgram],
    pub(crate) reporter: &'a Reporter,
    /// The process's ends of its pipes.
    pub(crate) pipes: [Option<OwnedFd>; 3],
}

/// A container's init: makes the surroundings, waits for its order, then supervises. Returns the status with which the process ends.
pub(crate) fn init(reporter: &Reporter, rootfs: &Path) -> u8 {
    fork::close_all_but(&[reporter.as_fd()]);
    conclude(reporter, live_as_init(reporter, rootfs))
}

fn live_as_init(reporter: &Reporter, rootfs: &Path) -> Result<Option<ExitStatus>, StartError> {
    hide()?;
    unshare_cgroup()?;
    let names = root::enter(rootfs)?;
    let filters =
        seccomp::programs().map_err(io::Error::other).map_err(StartError::step("compiling filters"))?;
    if reporter.tell(&Report::Created, None).is_err() {
        return Ok(None);
    }
    let order = reporter.order().map_err(StartError::step("reading what to run"))?;
    let Some((order, Along { pipes, clone_socket })) = order else { return Ok(None) };
    let Order { process, surroundings, set_ids, hostname, extra } = &order;
    let clone_socket = clone_socket.as_ref();
    root::furnish(&Root { surroundings, set_ids: *set_ids, hostname, clone_socket }, names)?;
    supervise(Job { process, hostname, extra, filters: &filters, reporter, pipes }, true)
}

/// The cgroup namespace is made by the child itself: clone3(2) would root it in the parent's cgroup.
fn unshare_cgroup() -> Result<(), StartError> {
    // SAFETY: no table of descriptors is unshared, so no thread can lose one.
    unsafe { unshare_unsafe(UnshareFlags::NEWCGROUP) }.map_err(StartError::step("making a cgroup namespace"))
}

/// An exec's keeper: joins the container of `init`, then supervises. It stays in the agent's PID namespace, unseen; its
/// children are born into the container's.
pub(crate) fn keeper(job: Job<'_>, init: BorrowedFd<'_>) -> u8 {
    let reporter = job.reporter;
    // Of the agent's own: its end of a pipe, held here, would keep that pipe open for ever.
    let pipes = job.pipes.iter().flatten().map(AsFd::as_fd);
    fork::close_all_but(&pipes.chain([reporter.as_fd(), init]).collect::<Vec<_>>());
    let join = || {
        let all = ThreadNameSpaceType::MOUNT
            | ThreadNameSpaceType::PROCESS_ID
            | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
            | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
            | ThreadNameSpaceType::CONTROL_GROUP;
        move_into_thread_name_spaces(init, all).map_err(StartError::step("joining the container"))
    };
    conclude(reporter, hide().and_then(|()| join()).and_then(|()| supervise(job, false)))
}

/// The workload's user may be ours: it shall not look into this process.
fn hide() -> Result<(), StartError> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(StartError::step("hiding the init"))
}

fn conclude(reporter: &Reporter, ended: Result<Option<ExitStatus>, StartError>) -> u8 {
    let report = match ended {
        Ok(Some(status)) => Report::Ended(status),
        Ok(None) => return 1,
        Err(error) => failed(&error),
    };
    u8::from(reporter.tell(&report, None).is_err())
}

fn failed(error: &StartError) -> Report {
    Report::Failed { failure: error.failure(), message: carrel_protocol::chain(error) }
}

/// Starts the workload and waits for its end; `None` if the agent is gone. The first terminal of a container is its console.
fn supervise(job: Job<'_>, first: bool) -> Result<Option<ExitStatus>, StartError> {
    let children = signals_of_children().map_err(StartError::step("waiting for children"))?;
    let streams = match job.process.stdio.terminal {
        Some(size) => {
            let terminal = terminal(size, job.reporter).map_err(StartError::step("making a terminal"))?;
            if first {
                console(&terminal).map_err(StartError::step("making /dev/console"))?;
            }
            Streams::Terminal(terminal)
        }
        None => Streams::Pipes(job.pipes),
    };
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map_err(StartError::step("making a pipe"))?;
    let program =
        Program { process: job.process, hostname: job.hostname, extra: job.extra, filters: job.filters };
    let workload = fork::fork(Separate::default(), || {
        let report = failed(&program.execute(&streams));
        let _ = rustix::io::write(&writer, &serde_json::to_vec(&report).unwrap_or_default());
        127
    })
    .map_err(StartError::step("starting the process"))?;
    // Only the workload's own copies keep its streams open.
    drop((streams, writer));
    let mut refused = Vec::new();
    // Ends when execve closes the other end.
    std::fs::File::from(reader).read_to_end(&mut refused).map_err(StartError::step("waiting for execve"))?;
    let report = if refused.is_empty() {
        Report::Started
    } else {
        serde_json::from_slice(&refused).map_err(StartError::step("starting the process"))?
    };
    if job.reporter.tell(&report, None).is_err() || report != Report::Started {
        return Ok(None);
    }
    watch(workload.pid(), &children, job.reporter).map_err(StartError::step("waiting for children"))
}

/// Passes signals on and reaps until the workload has ended.
fn watch(workload: i32, children: &OwnedFd, reporter: &Reporter) -> io::Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = fork::reap_all(workload) {
            return Ok(Some(status));
        }
        let mut waits =
            [PollFd::new(children, PollFlags::IN), PollFd::from_borrowed_fd(reporter.as_fd(), PollFlags::IN)];
        match poll(&mut waits, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let [ended, told] = waits.map(|wait| !wait.revents().is_empty());
        if ended {
            // What it says is found by waiting.
            let _ = rustix::io::read(children, &mut [0_u8; 1024]);
        }
        if told {
            let Some(signal) = reporter.signal() else { return Ok(None) };
            let target = Pid::from_raw(workload);
            // SAFETY: kill(2) itself checks the number; rustix' type wants one that exists, 1 to 64 do.
            let signal =
                (1..=64).contains(&signal).then(|| unsafe { Signal::from_raw_unchecked(i32::from(signal)) });
            if let (Some(target), Some(signal)) = (target, signal) {
                // It isn't reaped yet, so the number is still its own.
                let _ = rustix::process::kill_process(target, signal);
            }
        }
    }
}

/// A signalfd for SIGCHLD.
fn signals_of_children() -> io::Result<OwnedFd> {
    let set = fork::block_signals(&[libc::SIGCHLD]);
    // SAFETY: the set is initialised; -1 asks for a new descriptor.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: signalfd has just made it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A pseudo-terminal of the container's own devpts: the master goes to the agent, the other end is returned.
fn terminal(size: TerminalSize, reporter: &Reporter) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let master = rustix::fs::open("/dev/pts/ptmx", flags, Mode::empty())?;
    rustix::pty::unlockpt(&master)?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let other = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    resize(master.as_fd(), size)?;
    reporter.tell(&Report::Terminal, Some(master.as_fd()))?;
    debug_assert!(other.as_raw_fd() > 2, "0 to 2 are the agent's own");
    Ok(other)
}

/// Mounts the terminal at `/dev/console`, as runc does (runtime-spec, config-linux.md, *Default Devices*).
fn console(terminal: &OwnedFd) -> io::Result<()> {
    let path = "/dev/console";
    std::fs::File::create(path)?;
    Ok(rustix::mount::mount_bind(format!("/proc/self/fd/{}", terminal.as_raw_fd()), path)?)
}

/// Sets a terminal's size, and has the kernel tell its foreground process.
///
/// # Errors
///
/// The descriptor is no terminal.
pub(crate) fn resize(terminal: BorrowedFd<'_>, size: TerminalSize) -> io::Result<()> {
    let size =
        rustix::termios::Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(rustix::termios::tcsetwinsize(terminal, size)?)
}
