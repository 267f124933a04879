//! What an init or a keeper tells the agent, over a seqpacket socket, one JSON document a packet; the other way come
//! signals, one byte each.

use std::io;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use carrel_protocol::agent::{ExitStatus, Failure};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

/// A packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Report {
    /// The terminal's master comes beside this.
    Terminal,
    /// `execve` succeeded.
    Started,
    /// It didn't come to that.
    Failed {
        /// Class.
        failure: Failure,
        /// One sentence.
        message: String,
    },
    /// The process ended.
    Ended(ExitStatus),
}

/// A packet is no larger than this; messages are cut.
const LARGEST: usize = 8 << 10;
const LONGEST_MESSAGE: usize = 4 << 10;

/// The supervisor's end. Blocks.
#[derive(Debug)]
pub(crate) struct Reporter(OwnedFd);

/// The agent's end.
#[derive(Debug)]
pub(crate) struct Reports(AsyncFd<OwnedFd>);

/// Both ends.
///
/// # Errors
///
/// socketpair(2)'s.
pub(crate) fn pair() -> io::Result<(Reports, Reporter)> {
    let flags = SocketFlags::CLOEXEC;
    let (ours, theirs) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    // SAFETY: the AsyncFd owns the descriptor, so it stays open as long as it is registered.
    let ours = unsafe { AsyncFd::register(ours) }?;
    Ok((Reports(ours), Reporter(theirs)))
}

impl Reporter {
    /// Tells the agent; `terminal` goes along.
    ///
    /// # Errors
    ///
    /// The agent is gone.
    pub(crate) fn tell(&self, report: &Report, terminal: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut body = serde_json::to_vec(report)?;
        if body.len() > LARGEST {
            body = serde_json::to_vec(&shortened(report))?;
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut beside = SendAncillaryBuffer::new(&mut space);
        let descriptors = terminal.map(|fd| [fd]);
        if let Some(descriptors) = &descriptors {
            beside.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        rustix::net::sendmsg(&self.0, &[IoSlice::new(&body)], &mut beside, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// A signal that the agent passes on; `None` once the agent is gone. Call when readable.
    pub(crate) fn signal(&self) -> Option<u8> {
        let mut byte = [0];
        let (read, _) = rustix::net::recv(&self.0, &mut byte, RecvFlags::DONTWAIT).ok()?;
        byte.first().copied().filter(|_| read == 1)
    }
}

impl AsFd for Reporter {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn shortened(report: &Report) -> Report {
    match report {
        Report::Failed { failure, message } => {
            let message = message.chars().take(LONGEST_MESSAGE / 8).collect();
            Report::Failed { failure: *failure, message }
        }
        Report::Terminal | Report::Started | Report::Ended(_) => report.clone(),
    }
}

impl Reports {
    /// The next report; `None` if the supervisor is gone without another.
    pub(crate) async fn next(&self) -> Option<(Report, Option<OwnedFd>)> {
        loop {
            let mut ready = self.0.readable().await.ok()?;
            match ready.try_io(|fd| receive(fd.as_fd())) {
                Ok(received) => return received.ok().flatten(),
                Err(_would_block) => {}
            }
        }
    }

    /// Passes a signal on. That the supervisor is gone is no error: so is its process.
    pub(crate) fn signal(&self, signal: u8) {
        let _ = rustix::net::send(&self.0, &[signal], SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
    }
}

fn receive(from: BorrowedFd<'_>) -> io::Result<Option<(Report, Option<OwnedFd>)>> {
    let mut body = vec![0; LARGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let received =
        rustix::net::recvmsg(from, &mut [IoSliceMut::new(&mut body)], &mut beside, RecvFlags::CMSG_CLOEXEC)?;
    if received.bytes == 0 || received.flags.contains(ReturnFlags::TRUNC) {
        return Ok(None);
    }
    let mut descriptor = None;
    for message in beside.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            descriptor = descriptors.last();
        }
    }
    let report = serde_json::from_slice(body.get(..received.bytes).unwrap_or_default())?;
    Ok(Some((report, descriptor)))
}
