//! The connection to whoever owns this VM: one frame a packet, descriptors beside it.
//!
//! Receiving and sending never block: the socket is watched by the event loop, and an owner that doesn't read loses its
//! notices rather than stopping the guest. Only the first packet, [`Connection::receive_first`], is waited for.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use carrel_protocol::vmm::{MAX_DESCRIPTORS, MAX_PACKET_BYTES};
use carrel_protocol::{FrameError, Message};
use thiserror::Error;

use crate::event::check;

/// Room for a control message with [`MAX_DESCRIPTORS`] descriptors, aligned as the kernel wants it.
const CONTROL_WORDS: usize = 64;

/// The owner's connection failed.
#[derive(Debug, Error)]
pub enum OwnerError {
    /// The socket failed.
    #[error("the connection to the VM's owner failed")]
    Io(#[from] io::Error),
    /// What came is no message.
    #[error("the VM's owner sent something that is not a message of this version")]
    Frame(#[from] FrameError),
    /// The packet, or its descriptors, were cut short.
    #[error("the VM's owner sent a packet that is too large")]
    Truncated,
    /// The owner closed the connection.
    #[error("the VM's owner closed the connection")]
    Closed,
}

/// A `SOCK_SEQPACKET` socket with an owner at the other end (or, in the standalone launcher, the VMM).
#[derive(Debug)]
pub struct Connection(OwnedFd);

/// What one packet brought.
#[derive(Debug)]
pub struct Packet<M> {
    /// The message.
    pub message: M,
    /// The descriptors beside it.
    pub descriptors: Vec<OwnedFd>,
}

impl Connection {
    /// Takes over a connected socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Two connected ends.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = socketpair(libc::SOCK_SEQPACKET)?;
        Ok((Self(a), Self(b)))
    }

    /// Waits for a packet.
    pub fn receive_first<M: Message>(&self) -> Result<Packet<M>, OwnerError> {
        self.receive_with(0)
    }

    /// The next packet, or `None` when there is none yet.
    pub fn receive<M: Message>(&self) -> Result<Option<Packet<M>>, OwnerError> {
        match self.receive_with(libc::MSG_DONTWAIT) {
            Err(OwnerError::Io(e)) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            other => other.map(Some),
        }
    }

    fn receive_with<M: Message>(&self, flags: i32) -> Result<Packet<M>, OwnerError> {
        let mut bytes = vec![0u8; MAX_PACKET_BYTES];
        let mut control = [0u64; CONTROL_WORDS];
        let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        let mut header = empty_header();
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = size_of::<[u64; CONTROL_WORDS]>();
        let length = loop {
            // SAFETY: the header points to buffers of the lengths it states, all alive during the call.
            let n =
                unsafe { libc::recvmsg(self.0.as_raw_fd(), &raw mut header, flags | libc::MSG_CMSG_CLOEXEC) };
            match usize::try_from(n) {
                Ok(n) => break n,
                Err(_) => match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => {}
                    e => return Err(e.into()),
                },
            }
        };
        // Taken first, so that they are closed on every way out.
        let descriptors = received_descriptors(&header);
        if header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
            return Err(OwnerError::Truncated);
        }
        if length == 0 {
            return Err(OwnerError::Closed);
        }
        let message = M::decode(bytes.get(..length).unwrap_or_default())?;
        Ok(Packet { message, descriptors })
    }

    /// Sends a packet; fails with `WouldBlock` when the owner doesn't read.
    pub fn send<M: Message>(&self, message: &M, descriptors: &[BorrowedFd<'_>]) -> Result<(), OwnerError> {
        let bytes = message.encode()?;
        let mut control = [0u64; CONTROL_WORDS];
        let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let mut header = empty_header();
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        if !descriptors.is_empty() {
            if descriptors.len() > MAX_DESCRIPTORS {
                return Err(OwnerError::Truncated);
            }
            header.msg_control = control.as_mut_ptr().cast();
            header.msg_controllen = put_descriptors(&mut control, descriptors);
        }
        // SAFETY: the header points to buffers of the lengths it states, all alive during the call.
        let sent = unsafe {
            libc::sendmsg(self.0.as_raw_fd(), &raw const header, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
        };
        if sent < 0 { Err(io::Error::last_os_error().into()) } else { Ok(()) }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A connected pair of Unix sockets, non-blocking unless it is for packets, closed on exec.
pub fn socketpair(kind: i32) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds: [RawFd; 2] = [-1; 2];
    let flags = libc::SOCK_CLOEXEC | if kind == libc::SOCK_STREAM { libc::SOCK_NONBLOCK } else { 0 };
    // SAFETY: `fds` has room for two descriptors.
    check(unsafe { libc::socketpair(libc::AF_UNIX, kind | flags, 0, fds.as_mut_ptr()) })?;
    // SAFETY: the descriptor was just made and is owned by nobody else.
    let first = unsafe { OwnedFd::from_raw_fd(fds[0]) };
    // SAFETY: as above.
    let second = unsafe { OwnedFd::from_raw_fd(fds[1]) };
    Ok((first, second))
}

fn empty_header() -> libc::msghdr {
    // SAFETY: a msghdr is plain data; all zeros means no name, no buffers, no control.
    unsafe { std::mem::zeroed() }
}

/// Writes one SCM_RIGHTS message into `control` and returns its length.
fn put_descriptors(control: &mut [u64; CONTROL_WORDS], descriptors: &[BorrowedFd<'_>]) -> usize {
    let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let payload = u32::try_from(raw.len() * size_of::<RawFd>()).unwrap_or(0);
    // SAFETY: CMSG_LEN and CMSG_SPACE are arithmetic.
    let (length, space) = unsafe { (libc::CMSG_LEN(payload), libc::CMSG_SPACE(payload)) };
    let header = libc::cmsghdr {
        cmsg_len: length as usize,
        cmsg_level: libc::SOL_SOCKET,
        cmsg_type: libc::SCM_RIGHTS,
    };
    let start = control.as_mut_ptr().cast::<u8>();
    // SAFETY: `control` is 512 bytes, aligned for a cmsghdr, and MAX_DESCRIPTORS of four bytes behind its header fit.
    unsafe {
        start.cast::<libc::cmsghdr>().write(header);
        start
            .add(size_of::<libc::cmsghdr>())
            .cast::<RawFd>()
            .copy_from_nonoverlapping(raw.as_ptr(), raw.len());
    }
    space as usize
}

/// Every descriptor that the kernel installed for a received message.
fn received_descriptors(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut descriptors = Vec::new();
    // SAFETY: the kernel filled the header; the macros walk just what it wrote.
    let mut message = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !message.is_null() {
        // SAFETY: a non-null pointer from the macros is a control message within the buffer.
        let (kind, length, from) = unsafe {
            (((*message).cmsg_level, (*message).cmsg_type), (*message).cmsg_len, libc::CMSG_DATA(message))
        };
        if kind == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            let count = length.saturating_sub(size_of::<libc::cmsghdr>()) / size_of::<RawFd>();
            for i in 0..count {
                // SAFETY: the message holds `count` descriptors, each freshly installed for this process.
                descriptors
                    .push(unsafe { OwnedFd::from_raw_fd(from.cast::<RawFd>().add(i).read_unaligned()) });
            }
        }
        // SAFETY: as above.
        message = unsafe { libc::CMSG_NXTHDR(header, message) };
    }
    descriptors
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use carrel_protocol::vmm::{Dialled, Done, FromOwner, FromVmm, Pause};

    use super::*;

    #[test]
    fn a_packet_arrives_with_its_descriptors() {
        let (vmm, owner) = Connection::pair().unwrap();
        let files: Vec<File> = (0..MAX_DESCRIPTORS).map(|_| File::open("/dev/null").unwrap()).collect();
        let borrowed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        vmm.send(&FromVmm::from(Dialled { port: 5 }), &borrowed).unwrap();
        let packet = owner.receive_first::<FromVmm>().unwrap();
        assert_eq!(packet.message, Dialled { port: 5 }.into());
        assert_eq!(packet.descriptors.len(), MAX_DESCRIPTORS);
        assert!(owner.receive::<FromVmm>().unwrap().is_none());
    }

    #[test]
    fn the_other_end_gone_is_said() {
        let (vmm, owner) = Connection::pair().unwrap();
        drop(owner);
        assert!(matches!(vmm.receive::<FromOwner>(), Err(OwnerError::Closed)));
        assert!(vmm.send(&FromVmm::from(Done {}), &[]).is_err());
    }

    #[test]
    fn an_owner_that_does_not_read_never_blocks_the_vmm() {
        let (vmm, _owner) = Connection::pair().unwrap();
        let blocked = (0..100_000).find_map(|_| vmm.send(&FromVmm::from(Done {}), &[]).err());
        assert!(matches!(blocked, Some(OwnerError::Io(e)) if e.kind() == io::ErrorKind::WouldBlock));
    }

    #[test]
    fn garbage_is_an_error_and_its_descriptors_are_closed() {
        let (vmm, owner) = Connection::pair().unwrap();
        File::from(vmm.0.try_clone().unwrap()).write_all(b"garbage that is long enough").unwrap();
        assert!(matches!(owner.receive::<FromOwner>(), Err(OwnerError::Frame(_))));
        owner.send(&FromOwner::from(Pause {}), &[]).unwrap();
        assert!(vmm.receive::<FromOwner>().unwrap().is_some());
    }
}
