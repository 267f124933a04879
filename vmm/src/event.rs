//! A thin epoll: readiness of descriptors as tokens.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Interest {
    /// Something to read, or the other end has shut down.
    pub readable: bool,
    /// Room to write.
    pub writable: bool,
    /// Told once when it becomes so, not as long as it is so (EPOLLET).
    pub edge: bool,
}

impl Interest {
    /// Reading alone, as long as there is something.
    pub const READ: Self = Self { readable: true, writable: false, edge: false };
    /// Both directions, told once each time.
    pub const EDGES: Self = Self { readable: true, writable: true, edge: true };

    fn bits(self) -> u32 {
        let mut bits = 0;
        if self.readable {
            bits |= libc::EPOLLIN | libc::EPOLLRDHUP;
        }
        if self.writable {
            bits |= libc::EPOLLOUT;
        }
        if self.edge {
            bits |= libc::EPOLLET;
        }
        bits.cast_unsigned()
    }
}

/// What happened on a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// What it was registered with.
    pub token: u64,
    /// It can be read, or its end has come.
    pub readable: bool,
    /// It can be written.
    pub writable: bool,
    /// Both directions are gone (EPOLLHUP, EPOLLERR).
    pub closed: bool,
}

/// An epoll instance.
#[derive(Debug)]
pub struct Epoll(OwnedFd);

impl Epoll {
    /// Makes one.
    pub fn new() -> io::Result<Self> {
        // SAFETY: no pointers are passed.
        let fd = check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        // SAFETY: the descriptor was just made and is owned by nobody else.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Starts to watch a descriptor.
    pub fn add(&self, fd: impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_ADD, fd.as_fd().as_raw_fd(), token, interest)
    }

    /// Stops watching. Closing a descriptor that has no duplicates does it too.
    pub fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_DEL, fd.as_fd().as_raw_fd(), 0, Interest::default())
    }

    /// Waits for events, at most `timeout_ms` (-1: without end), and hands them over; none when interrupted.
    pub fn wait(&self, timeout_ms: i32, events: &mut Vec<Event>) -> io::Result<()> {
        const BATCH: usize = 64;
        let mut raw = [libc::epoll_event { events: 0, u64: 0 }; BATCH];
        events.clear();
        // SAFETY: `raw` has room for as many events as the call is told.
        let n = unsafe { libc::epoll_wait(self.0.as_raw_fd(), raw.as_mut_ptr(), 64, timeout_ms) };
        let n = match check(n) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            other => other?,
        };
        for raw in raw.iter().take(usize::try_from(n).unwrap_or(0)) {
            let has = |bits: i32| raw.events & bits.cast_unsigned() != 0;
            events.push(Event {
                token: raw.u64,
                readable: has(libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR),
                writable: has(libc::EPOLLOUT | libc::EPOLLHUP | libc::EPOLLERR),
                closed: has(libc::EPOLLHUP | libc::EPOLLERR),
            });
        }
        Ok(())
    }

    fn control(&self, operation: i32, fd: RawFd, token: u64, interest: Interest) -> io::Result<()> {
        let mut event = libc::epoll_event { events: interest.bits(), u64: token };
        // SAFETY: `event` is valid for the call; the kernel checks the descriptor.
        check(unsafe { libc::epoll_ctl(self.0.as_raw_fd(), operation, fd, &raw mut event) }).map(drop)
    }
}

/// Turns a system call's -1 into its error.
pub(crate) fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Borrows the descriptor of something that has one, for as long as that lives.
pub(crate) fn borrow(of: &impl AsRawFd) -> std::os::fd::BorrowedFd<'_> {
    // SAFETY: `of` owns the descriptor and is borrowed for the result's lifetime.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(of.as_raw_fd()) }
}
