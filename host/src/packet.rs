//! Packets: one frame each, with descriptors beside it, over `SOCK_SEQPACKET` (unix(7), SCM_RIGHTS).
//!
//! The owner speaks so with its VMM ([`carrel_protocol::vmm`]) and with the commands ([`crate::owner::api`]).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use carrel_protocol::vmm::{MAX_DESCRIPTORS, MAX_PACKET_BYTES};
use carrel_protocol::{FrameError, Message};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::sockopt::Timeout;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use thiserror::Error;

/// A packet connection failed.
#[derive(Debug, Error)]
pub enum PacketError {
    /// The socket failed.
    #[error("the connection failed")]
    Io(#[from] io::Error),
    /// What came is no message.
    #[error(
        "the peer sent something that is not a message of this version; install all of carrel from one build"
    )]
    Frame(#[from] FrameError),
    /// The packet, or its descriptors, were cut short.
    #[error("the peer sent a packet that is too large")]
    Truncated,
    /// The peer closed the connection.
    #[error("the peer closed the connection")]
    Closed,
}

impl PacketError {
    /// The peer doesn't read as fast as it is told, or has said nothing in time.
    pub(crate) fn would_block(&self) -> bool {
        matches!(self, Self::Io(e) if e.kind() == io::ErrorKind::WouldBlock)
    }

    /// The peer closed the connection, with or without having read all that it was told. What it said before may wait to be heard.
    pub(crate) fn is_closed(&self) -> bool {
        use io::ErrorKind::{BrokenPipe, ConnectionReset};
        matches!(self, Self::Closed)
            || matches!(self, Self::Io(e) if matches!(e.kind(), BrokenPipe | ConnectionReset))
    }
}

/// What one packet brought.
#[derive(Debug)]
pub(crate) struct Packet<M> {
    pub(crate) message: M,
    pub(crate) descriptors: Vec<OwnedFd>,
}

/// A connected socket.
#[derive(Debug)]
pub(crate) struct Connection(OwnedFd);

impl From<OwnedFd> for Connection {
    fn from(socket: OwnedFd) -> Self {
        Self(socket)
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Connection {
    /// Two connected ends, closed on exec.
    pub(crate) fn pair() -> io::Result<(Self, Self)> {
        let (a, b) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Self(a), Self(b)))
    }

    /// The socket itself.
    pub(crate) fn into_inner(self) -> OwnedFd {
        self.0
    }

    /// How long [`Connection::receive`] waits, `None` for ever: then it fails with `WouldBlock`.
    pub(crate) fn limit(&self, time: Option<Duration>) -> io::Result<()> {
        Ok(rustix::net::sockopt::set_socket_timeout(&self.0, Timeout::Recv, time)?)
    }

    /// Whether the other end is closed, whatever it said before.
    pub(crate) fn has_hung_up(&self) -> io::Result<bool> {
        let mut ends = [PollFd::new(&self.0, PollFlags::empty())];
        rustix::event::poll(&mut ends, Some(&Timespec::default()))?;
        Ok(ends.iter().any(|end| end.revents().intersects(PollFlags::HUP)))
    }

    /// Waits for a packet.
    pub(crate) fn receive<M: Message>(&self) -> Result<Packet<M>, PacketError> {
        self.receive_with(RecvFlags::empty())
    }

    /// The packet that is there, if one is.
    pub(crate) fn try_receive<M: Message>(&self) -> Result<Option<Packet<M>>, PacketError> {
        match self.receive_with(RecvFlags::DONTWAIT) {
            Err(error) if error.would_block() => Ok(None),
            other => other.map(Some),
        }
    }

    fn receive_with<M: Message>(&self, flags: RecvFlags) -> Result<Packet<M>, PacketError> {
        let mut bytes = vec![0; MAX_PACKET_BYTES];
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut reset = false;
        let received = loop {
            let parts = &mut [IoSliceMut::new(&mut bytes)];
            match rustix::net::recvmsg(&self.0, parts, &mut control, flags | RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => {}
                // The peer closed with something of ours unread. The kernel says that first, and once; the peer's last words come after.
                Err(rustix::io::Errno::CONNRESET) if !std::mem::replace(&mut reset, true) => {}
                other => break other.map_err(io::Error::from)?,
            }
        };
        let mut descriptors = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(PacketError::Truncated);
        }
        if received.bytes == 0 {
            return Err(PacketError::Closed);
        }
        let message = M::decode(bytes.get(..received.bytes).unwrap_or_default())?;
        Ok(Packet { message, descriptors })
    }

    /// Sends a packet; fails with `WouldBlock` when the peer doesn't read.
    pub(crate) fn send(
        &self,
        message: &impl Message,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), PacketError> {
        self.send_with(message, descriptors, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
    }

    /// Sends a packet, and waits until the peer takes it.
    pub(crate) fn send_blocking(
        &self,
        message: &impl Message,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), PacketError> {
        self.send_with(message, descriptors, SendFlags::NOSIGNAL)
    }

    fn send_with(
        &self,
        message: &impl Message,
        descriptors: &[BorrowedFd<'_>],
        flags: SendFlags,
    ) -> Result<(), PacketError> {
        let bytes = message.encode()?;
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        // The buffer may have room for one more by its alignment; the peer has not.
        if descriptors.len() > MAX_DESCRIPTORS {
            return Err(PacketError::Truncated);
        }
        if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(PacketError::Truncated);
        }
        loop {
            match rustix::net::sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut control, flags) {
                Err(rustix::io::Errno::INTR) => {}
                other => return Ok(other.map(drop).map_err(io::Error::from)?),
            }
        }
    }

    /// Ends both directions: a reader blocked on either end wakes up.
    pub(crate) fn shut_down(&self) {
        let _ = rustix::net::shutdown(&self.0, rustix::net::Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use carrel_protocol::vmm::{Dialled, Done, FromVmm};

    use super::*;

    #[test]
    fn a_packet_arrives_with_its_descriptors() {
        let (a, b) = Connection::pair().unwrap();
        let files: Vec<File> = (0..MAX_DESCRIPTORS).map(|_| File::open("/dev/null").unwrap()).collect();
        let borrowed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        a.send(&FromVmm::from(Dialled { port: 5 }), &borrowed).unwrap();
        let packet = b.receive::<FromVmm>().unwrap();
        assert_eq!(packet.message, Dialled { port: 5 }.into());
        assert_eq!(packet.descriptors.len(), MAX_DESCRIPTORS);
    }

    #[test]
    fn a_peer_that_does_not_read_is_noticed_and_one_that_left_too() {
        let (a, b) = Connection::pair().unwrap();
        let full = (0..100_000).find_map(|_| a.send(&FromVmm::from(Done {}), &[]).err());
        assert!(full.is_some_and(|e| e.would_block()));
        assert!(!b.has_hung_up().unwrap());
        drop(a);
        assert!(b.has_hung_up().unwrap(), "though there is something to read");
        while let Ok(packet) = b.receive::<FromVmm>() {
            assert_eq!(packet.message, Done {}.into());
        }
        assert!(matches!(b.receive::<FromVmm>(), Err(PacketError::Closed)));
    }

    #[test]
    fn last_words_arrive_though_the_peer_left_something_unread() {
        let (a, b) = Connection::pair().unwrap();
        a.send(&FromVmm::from(Done {}), &[]).unwrap();
        b.send(&FromVmm::from(Dialled { port: 5 }), &[]).unwrap();
        drop(a);
        assert_eq!(b.receive::<FromVmm>().unwrap().message, Done {}.into());
        assert!(matches!(b.receive::<FromVmm>(), Err(PacketError::Closed)));
    }

    #[test]
    fn too_many_descriptors_are_refused() {
        let (a, _b) = Connection::pair().unwrap();
        let file = File::open("/dev/null").unwrap();
        let borrowed = vec![file.as_fd(); MAX_DESCRIPTORS + 1];
        assert!(matches!(a.send(&FromVmm::from(Done {}), &borrowed), Err(PacketError::Truncated)));
    }
}
