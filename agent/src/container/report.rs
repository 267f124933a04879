//! What an init or a keeper tells the agent, over a seqpacket socket, one JSON document a packet; the other way come
//! an init's order, once, and signals, one byte each.

use std::fs::File;
use std::io;
use std::io::{IoSlice, IoSliceMut, Read, Seek};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use carrel_protocol::agent::{ExitStatus, Failure, Process, Surroundings};
use rustix::fs::MemfdFlags;
use rustix::io::retry_on_intr;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

use super::root::SetIds;

/// A packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Report {
    /// The container is there, and its init waits for an [`Order`].
    Created,
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

/// What a container's init is to run, and what its process is to find around it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) process: Process,
    pub(crate) surroundings: Surroundings,
    /// Of what happens to set-user-ID bits: see `root::SetIds`.
    pub(crate) set_ids: SetIds,
    pub(crate) hostname: String,
    /// Added to the environment.
    pub(crate) extra: Vec<(String, String)>,
}

/// What goes along with an order.
#[derive(Debug, Default)]
pub(crate) struct Along {
    /// The process's ends of its pipes.
    pub(crate) pipes: [Option<OwnedFd>; 3],
    /// The clone socket's directory, a mount of no place yet (open_tree(2)).
    pub(crate) clone_socket: Option<OwnedFd>,
}

impl Along {
    fn all(&self) -> [Option<&OwnedFd>; 4] {
        let [stdin, stdout, stderr] = &self.pipes;
        [stdin, stdout, stderr, &self.clone_socket].map(Option::as_ref)
    }
}

/// A packet is no larger than this; messages are cut.
const LARGEST: usize = 8 << 10;
const LONGEST_MESSAGE: usize = 4 << 10;
/// An order's packet: for each descriptor that may go along, whether it does.
const PRESENT: usize = 4;

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

    /// Waits for the order that an init gets first of all; `None` if the agent wants none to be carried out, or is gone.
    pub(crate) fn order(&self) -> io::Result<Option<(Order, Along)>> {
        let mut present = [0; PRESENT];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1 + PRESENT))];
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(&mut present)];
        let received = retry_on_intr(|| {
            rustix::net::recvmsg(&self.0, &mut slices, &mut beside, RecvFlags::CMSG_CLOEXEC)
        })?;
        if received.bytes != PRESENT {
            return Ok(None);
        }
        let mut descriptors = Vec::with_capacity(1 + PRESENT);
        for message in beside.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        let mut descriptors = descriptors.into_iter();
        let missing = || io::Error::other("an order came without its text");
        let mut file = File::from(descriptors.next().ok_or_else(missing)?);
        let mut text = Vec::new();
        file.rewind()?;
        file.read_to_end(&mut text)?;
        let [stdin, stdout, stderr, clone_socket] =
            present.map(|present| if present == 0 { None } else { descriptors.next() });
        Ok(Some((serde_json::from_slice(&text)?, Along { pipes: [stdin, stdout, stderr], clone_socket })))
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
        Report::Created | Report::Terminal | Report::Started | Report::Ended(_) => report.clone(),
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

    /// Tells an init that waits for it what to do. Arguments and variables can be longer than any packet, so they go in a file of memory.
    ///
    /// # Errors
    ///
    /// The init is gone, or there is no memory for the file.
    pub(crate) fn order(&self, order: &Order, along: &Along) -> io::Result<()> {
        let text = rustix::fs::memfd_create("order", MemfdFlags::CLOEXEC)?;
        let mut text = File::from(text);
        io::Write::write_all(&mut text, &serde_json::to_vec(order)?)?;
        let all = along.all();
        let present = all.map(|one| u8::from(one.is_some()));
        let descriptors: Vec<BorrowedFd<'_>> =
            [text.as_fd()].into_iter().chain(all.into_iter().flatten().map(AsFd::as_fd)).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1 + PRESENT))];
        let mut beside = SendAncillaryBuffer::new(&mut space);
        beside.push(SendAncillaryMessage::ScmRights(&descriptors));
        let fd = self.0.get_ref();
        rustix::net::sendmsg(fd, &[IoSlice::new(&present)], &mut beside, SendFlags::NOSIGNAL)?;
        Ok(())
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

#[cfg(test)]
mod tests {
    use carrel_protocol::agent::{ProcessId, Stdio};

    use super::*;

    fn order(environment: Vec<String>) -> Order {
        let process = Process {
            id: ProcessId(7),
            arguments: vec!["true".into()],
            environment,
            working_directory: "/".into(),
            user: String::new(),
            stdio: Stdio::default(),
        };
        let extra = vec![("A".to_owned(), "b".to_owned())];
        let surroundings = Surroundings { read_only_root: true, ..Surroundings::default() };
        Order { process, surroundings, set_ids: SetIds::Ignored, hostname: "room".into(), extra }
    }

    #[tokio::test]
    async fn an_order_longer_than_any_packet_comes_whole_and_its_descriptors_to_their_places() {
        let order = order((0..32).map(|number| format!("V{number}={}", "x".repeat(100 << 10))).collect());
        let (reports, reporter) = pair().unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let along = Along { pipes: [None, Some(writer), None], clone_socket: None };
        reports.order(&order, &along).unwrap();
        drop(along);
        // A signal right behind is not taken for a part of it.
        reports.signal(15);
        let (came, along) = reporter.order().unwrap().unwrap();
        assert_eq!(came, order);
        assert!(along.clone_socket.is_none());
        let [None, Some(writer), None] = along.pipes else { panic!("{:?}", along.pipes) };
        rustix::io::write(&writer, b"here").unwrap();
        let mut said = [0; 4];
        rustix::io::read(&reader, &mut said).unwrap();
        assert_eq!(&said, b"here");
        assert_eq!(reporter.signal(), Some(15));
    }

    #[tokio::test]
    async fn who_is_wanted_no_more_gets_no_order() {
        let (reports, reporter) = pair().unwrap();
        drop(reports);
        assert!(reporter.order().unwrap().is_none());
    }
}
