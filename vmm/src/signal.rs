//! SIGTERM and SIGINT as a descriptor.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use crate::event::check;

/// Blocks both signals in this thread, so in all that it starts, and returns a descriptor that is readable when one came.
pub fn watch() -> io::Result<OwnedFd> {
    // SAFETY: a sigset_t is plain data, made valid by sigemptyset.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is valid for each of these calls.
    let raw = unsafe {
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        libc::sigaddset(&raw mut set, libc::SIGINT);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    };
    let raw = check(raw)?;
    // SAFETY: the descriptor was just made and is owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Waits until `other` is readable or a signal came; consumes the signal and says so.
pub fn came_before_readable(signals: &OwnedFd, other: impl AsFd) -> io::Result<bool> {
    let poll = |fd: i32| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut fds = [poll(signals.as_raw_fd()), poll(other.as_fd().as_raw_fd())];
    loop {
        // SAFETY: two valid pollfds are passed.
        match check(unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) }) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
            Ok(_) => break,
        }
    }
    let came = fds[0].revents != 0;
    if came {
        // SAFETY: a signalfd_siginfo is plain data.
        let mut info: libc::signalfd_siginfo = unsafe { std::mem::zeroed() };
        // SAFETY: `info` has room for one record. What is read does not matter.
        unsafe { libc::read(signals.as_raw_fd(), (&raw mut info).cast(), size_of_val(&info)) };
    }
    Ok(came)
}
