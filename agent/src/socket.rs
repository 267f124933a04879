//! Connections to the host: dialling a port, and a stream socket as a task reads and writes it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use carrel_protocol::agent::{HOST_CID, Stream};
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, Interest, ReadBuf};

/// How long the host may take to answer a dial. Linux gives up after two seconds, less than a busy host may need to let the VMM run; how long a step of a
/// start may take is for the owner to say.
const PATIENCE: Duration = Duration::from_secs(60);

/// The socket option of that, with a `timeval` of 64-bit parts (linux/vm_sockets.h).
const SO_VM_SOCKETS_CONNECT_TIMEOUT: libc::c_int = 6;

/// How the host is reached.
#[derive(Clone, Debug)]
pub(crate) enum Dialler {
    /// vsock (virtio §5.10).
    Vsock,
    /// Unix sockets `<path>_<port>`, as a VMM shows vsock outside. For tests.
    #[cfg_attr(not(test), expect(dead_code, reason = "tests run the agent as an ordinary process"))]
    Unix(PathBuf),
}

impl Dialler {
    /// Dials a port and waits for the connection.
    ///
    /// # Errors
    ///
    /// What connect(2) says.
    pub(crate) async fn dial(&self, port: u32) -> io::Result<Socket> {
        let fd = self.socket(true)?;
        match connect(self, &fd, port) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
            Err(error) => return Err(error),
        }
        let socket = Socket::new(fd)?;
        // Writable: connected or failed, and then the error is pending.
        let _ready = socket.0.writable().await?;
        rustix::net::sockopt::socket_error(&socket.0)??;
        Ok(socket)
    }

    /// Dials a stream that was agreed on and sends its token.
    ///
    /// # Errors
    ///
    /// What connect(2) or the write says.
    pub(crate) async fn open(&self, stream: &Stream) -> io::Result<Socket> {
        let mut socket = self.dial(stream.port).await?;
        socket.write_all(&stream.token.0).await?;
        Ok(socket)
    }

    /// As [`Dialler::open`], but blocks. For forked processes.
    pub(crate) fn open_blocking(&self, stream: &Stream) -> io::Result<OwnedFd> {
        let fd = self.socket(false)?;
        connect(self, &fd, stream.port)?;
        let mut left = stream.token.0.as_slice();
        while !left.is_empty() {
            let written = rustix::io::write(&fd, left)?;
            left = left.get(written..).unwrap_or_default();
        }
        Ok(fd)
    }

    fn socket(&self, nonblocking: bool) -> io::Result<OwnedFd> {
        let family = match self {
            Self::Vsock => AddressFamily::VSOCK,
            Self::Unix(_) => AddressFamily::UNIX,
        };
        let flags = if nonblocking { SocketFlags::NONBLOCK } else { SocketFlags::empty() };
        let flags = flags | SocketFlags::CLOEXEC;
        let fd = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
        if let Self::Vsock = self {
            be_patient(&fd)?;
        }
        Ok(fd)
    }
}

/// Sets SO_VM_SOCKETS_CONNECT_TIMEOUT (linux/vm_sockets.h).
fn be_patient(fd: &OwnedFd) -> io::Result<()> {
    let time =
        libc::timeval { tv_sec: i64::try_from(PATIENCE.as_secs()).map_err(io::Error::other)?, tv_usec: 0 };
    let length = u32::try_from(size_of_val(&time)).map_err(io::Error::other)?;
    // SAFETY: the value is valid for `length` bytes and the descriptor is open.
    let done = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::AF_VSOCK,
            SO_VM_SOCKETS_CONNECT_TIMEOUT,
            (&raw const time).cast(),
            length,
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn connect(dialler: &Dialler, fd: &OwnedFd, port: u32) -> io::Result<()> {
    match dialler {
        Dialler::Vsock => {
            // SAFETY: all zeros is a valid sockaddr_vm.
            let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
            address.svm_family = u16::try_from(libc::AF_VSOCK).map_err(io::Error::other)?;
            address.svm_cid = HOST_CID;
            address.svm_port = port;
            let length = u32::try_from(size_of::<libc::sockaddr_vm>()).map_err(io::Error::other)?;
            // SAFETY: the address is valid for `length` bytes and the descriptor is open.
            let done = unsafe { libc::connect(fd.as_raw_fd(), (&raw const address).cast(), length) };
            if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
        }
        Dialler::Unix(path) => {
            let mut name = path.clone().into_os_string();
            name.push(format!("_{port}"));
            Ok(rustix::net::connect(fd, &rustix::net::SocketAddrUnix::new(name)?)?)
        }
    }
}

/// Any descriptor that can be waited for: a socket, one end of a pipe, a terminal's master.
#[derive(Debug)]
pub(crate) struct Socket(AsyncFd<OwnedFd>);

impl Socket {
    /// Takes a descriptor over and makes it non-blocking.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        // SAFETY: the AsyncFd owns the descriptor, so it stays open as long as it is registered.
        let fd = unsafe { AsyncFd::register(fd) }?;
        Ok(Self(fd))
    }

    /// No more will be written: the host sees the end.
    pub(crate) fn finish(&self) {
        // A connection that the host closed already is as good.
        let _ = rustix::net::shutdown(&self.0, Shutdown::Write);
    }

    /// Nothing more will be read: the host's writes fail.
    pub(crate) fn refuse(&self) {
        let _ = rustix::net::shutdown(&self.0, Shutdown::Read);
    }

    /// Reads what there is; waits if there is nothing.
    pub(crate) async fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        let mut ready = None;
        loop {
            match rustix::io::read(&self.0, &mut *into) {
                Ok(read) => return Ok(read),
                Err(rustix::io::Errno::AGAIN) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            if let Some(mut guard) = ready.take() {
                let guard: &mut tokio::io::unix::AsyncFdReadyGuard<'_, OwnedFd> = &mut guard;
                guard.clear_ready();
            }
            // A connection that a transport's reset ends is neither readable nor at its end to epoll: an error is all that is told
            // (net/vmw_vsock, `vsock_poll`), and without asking for it nobody would wake.
            ready = Some(self.0.ready(Interest::READABLE | Interest::ERROR).await?);
        }
    }

    /// Reads what there is; `None` if there is nothing.
    pub(crate) fn read_now(&self, into: &mut [u8]) -> io::Result<Option<usize>> {
        at_once(|| rustix::io::read(&self.0, &mut *into))
    }

    /// Writes what can be taken now; `None` if nothing can.
    pub(crate) fn write_now(&self, from: &[u8]) -> io::Result<Option<usize>> {
        at_once(|| rustix::io::write(&self.0, from))
    }

    /// Writes some of it, as soon as any can be taken. Safe to cancel: then nothing was written.
    pub(crate) async fn write_some(&self, from: &[u8]) -> io::Result<usize> {
        if let Some(written) = self.write_now(from)? {
            return Ok(written);
        }
        loop {
            let mut guard = self.0.writable().await?;
            match self.write_now(from)? {
                Some(written) => return Ok(written),
                None => guard.clear_ready(),
            }
        }
    }

    /// Writes all of it.
    pub(crate) async fn write(&self, mut from: &[u8]) -> io::Result<()> {
        while !from.is_empty() {
            let written = self.write_some(from).await?;
            from = from.get(written..).unwrap_or_default();
        }
        Ok(())
    }
}

/// A system call that doesn't block, again if a signal came; `None` if it would have.
fn at_once(mut call: impl FnMut() -> rustix::io::Result<usize>) -> io::Result<Option<usize>> {
    loop {
        match call() {
            Ok(moved) => return Ok(Some(moved)),
            Err(rustix::io::Errno::AGAIN) => return Ok(None),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(context))?;
            let unfilled = into.initialize_unfilled();
            if let Ok(read) = guard.try_io(|fd| Ok(rustix::io::read(fd, unfilled)?)) {
                into.advance(read?);
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(context))?;
            if let Ok(written) = guard.try_io(|fd| Ok(rustix::io::write(fd, from)?)) {
                return Poll::Ready(written);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.finish();
        Poll::Ready(Ok(()))
    }
}
