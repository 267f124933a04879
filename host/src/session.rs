//! A command's side of a conversation with a room's owner.
//!
//! ```text
//!   Home::create ─▶ Session ── run(streams) ─────────▶ Ended      the workload, attached
//!                      ├────── run_and_take ─────────▶ Ended      … and its files
//!                      └────── wait_started ─────────▶ running    … detached
//!   Room::connect ─▶ Session ─ exec(process, streams) ▶ Ended     one more process
//!                      ├────── remote().signal/stop/resize
//!                      ├────── usage
//!                      └────── wait, wait_stopped ───▶ Ended
//! ```
//!
//! The owner hands over a socket for each standard stream; bytes go between it and the caller's own files on a thread each and never
//! pass through the owner. The guest's agent closes its end of them before it says that the process ended: a guest that doesn't is waited for while
//! it has something to say, and no longer. After the room's end there is nothing more to come than what is in the sockets already.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use carrel_protocol::FrameError;
use carrel_protocol::agent::TerminalSize;
use rustix::fs::{Mode, OFlags};
use rustix::net::sockopt::Timeout;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use thiserror::Error;

pub use crate::owner::api::{Ended, StreamKind};

use crate::outcome::Outcome;
use crate::owner::api::{
    Connected, Drained, Exec, Exited, FromClient, Noticed, ReadUsage, Refused, Resize, Return, Signal, Stop,
    ToClient, Used, Wait,
};
use crate::packet::{Connection, Packet, PacketError};
use crate::patience::Patience;
use crate::spec::ProcessSpec;
use crate::usage::UsageReport;

mod pump;

pub(crate) use pump::Pumps;

/// The conversation failed.
#[derive(Debug, Error)]
pub enum SessionError {
    /// No owner answers.
    #[error("the room's owner can't be reached; if the room should run, see `carrel ps`")]
    Unreachable(#[source] io::Error),
    /// The connection broke before the room's end was told.
    #[error("the room's owner ended unexpectedly; the next command sweeps up the room")]
    OwnerGone(#[source] PacketError),
    /// The owner said something that can't be at this point.
    #[error("the room's owner is of another version than this command; install all of carrel from one build")]
    Unexpected,
    /// The request is longer than the owner, or the guest's agent, takes.
    #[error(
        "command and variables are {bytes} bytes long as they are sent, and {most} is the most; put some of them into a file of the image's"
    )]
    TooLong {
        /// Encoded, bytes.
        bytes: u32,
        /// By the protocol, bytes.
        most: u32,
    },
    /// The owner does not answer in time.
    #[error("the room's owner does not answer; see `carrel ps`")]
    Silent,
    /// The same, of an owner that is known by its process: it was stopped, or its host is out of breath.
    #[error(
        "the room's owner, process {owner}, does not answer; `kill -CONT {owner}` wakes one that was stopped, `kill -KILL {owner}` ends it and its room"
    )]
    SilentOwner {
        /// Its process.
        owner: i32,
    },
    /// The owner answers, and the room goes on.
    #[error("the room has not ended within {seconds} s; see `carrel ps`, and `carrel rm --force` once more")]
    NotEnded {
        /// What was waited for, s.
        seconds: u64,
    },
    /// A room that waited for an event ended before it was handed this one.
    #[error("the room that waited for an event ended before it came")]
    Over(#[source] Box<SessionError>),
    /// The request was refused.
    #[error("{0}")]
    Refused(String),
    /// A thread or a descriptor can't be had.
    #[error("the room's streams can't be served")]
    Streams(#[source] io::Error),
}

impl SessionError {
    /// Of a message that did not go out.
    pub(crate) fn unsent(error: PacketError) -> Self {
        match error {
            PacketError::Frame(FrameError::TooLong { length, limit, .. }) => {
                Self::TooLong { bytes: length, most: limit }
            }
            error @ (PacketError::Io(_)
            | PacketError::Frame(_)
            | PacketError::Truncated
            | PacketError::Closed) => Self::OwnerGone(error),
        }
    }
}

/// The caller's files for a process's standard streams.
#[derive(Debug)]
pub struct Streams {
    /// What the process reads; asked for only where its specification is interactive.
    pub stdin: Option<File>,
    /// What the process writes.
    pub stdout: File,
    /// What the process writes; nothing with a terminal.
    pub stderr: File,
}

impl Streams {
    /// This process's own.
    pub fn standard() -> io::Result<Self> {
        Ok(Self {
            stdin: Some(io::stdin().as_fd().try_clone_to_owned()?.into()),
            stdout: io::stdout().as_fd().try_clone_to_owned()?.into(),
            stderr: io::stderr().as_fd().try_clone_to_owned()?.into(),
        })
    }
}

/// Files that are taken out of a room when its workload has ended.
pub struct Taking<'a> {
    /// Absolute paths in the room.
    pub paths: &'a [String],
    /// Is handed the stream on which they come ([`crate::program::returned`]), or why none comes. Not called if the room ends otherwise.
    pub take: Box<dyn FnOnce(Result<UnixStream, String>) + 'a>,
}

/// Whether a detached workload came up.
#[derive(Debug)]
pub enum Beginning {
    /// It runs.
    Started,
    /// It never did, or is over already.
    Ended(Box<Ended>),
}

/// A conversation.
#[derive(Debug)]
pub struct Session {
    connection: Arc<Connection>,
    pub(crate) patience: Patience,
}

/// The part of a session that other threads use meanwhile, such as one that receives signals.
#[derive(Clone, Debug)]
pub struct Remote(Arc<Connection>);

impl Remote {
    /// Sends a signal to the session's process: the workload, or what [`Session::exec`] started.
    pub fn signal(&self, signal: u8) -> Result<(), SessionError> {
        self.send(Signal { signal })
    }

    /// Tells the process's terminal its size.
    pub fn resize(&self, size: TerminalSize) -> Result<(), SessionError> {
        self.send(Resize { size })
    }

    /// Ends the workload: its stop signal, then, after `timeout_ms` or the room's own time, SIGKILL. Doesn't wait.
    pub fn stop(&self, timeout_ms: Option<u64>) -> Result<(), SessionError> {
        self.send(Stop { timeout_ms })
    }

    pub(crate) fn send(&self, message: impl Into<FromClient>) -> Result<(), SessionError> {
        self.0.send_blocking(&message.into(), &[]).map_err(SessionError::unsent)
    }

    pub(crate) fn send_with(&self, message: impl Into<FromClient>, file: &File) -> Result<(), SessionError> {
        self.0.send_blocking(&message.into(), &[file.as_fd()]).map_err(SessionError::unsent)
    }
}

/// What can't be sent to an owner that is gone is no error yet: its last words wait to be heard, or that there are none is heard then.
pub(crate) fn or_heard_next(sent: Result<(), SessionError>) -> Result<(), SessionError> {
    match sent {
        Err(SessionError::OwnerGone(error)) if error.is_closed() => Ok(()),
        sent => sent,
    }
}

impl Session {
    pub(crate) fn new(connection: Connection, patience: Patience) -> Self {
        Self { connection: Arc::new(connection), patience }
    }

    /// Connects to the socket in a room's directory.
    pub(crate) fn connect(directory: &Path, patience: Patience) -> Result<Self, SessionError> {
        let silent = |error: &io::Error| error.kind() == io::ErrorKind::WouldBlock;
        let connection =
            connected(directory, "owner.sock", patience).map_err(|error| match silent(&error) {
                true => SessionError::Silent,
                false => SessionError::Unreachable(error),
            })?;
        Ok(Self::new(connection, patience))
    }

    /// The same conversation, for whoever goes on with it.
    pub(crate) fn another(&self) -> Self {
        Self { connection: Arc::clone(&self.connection), patience: self.patience }
    }

    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }

    /// The part for other threads.
    pub fn remote(&self) -> Remote {
        Remote(Arc::clone(&self.connection))
    }

    /// Sends what is answered.
    fn ask(&self, message: impl Into<FromClient>) -> Result<(), SessionError> {
        or_heard_next(self.remote().send(message))
    }

    pub(crate) fn receive(&self) -> Result<Packet<ToClient>, SessionError> {
        self.connection.receive().map_err(SessionError::OwnerGone)
    }

    /// Serves the workload's streams until the room has ended. `notice` is told what the user should know meanwhile.
    pub fn run(self, streams: Streams, notice: &mut dyn FnMut(&str)) -> Result<Ended, SessionError> {
        self.serve(streams, true, None, notice)
    }

    /// As [`Self::run`]; when the workload has ended, whatever its status, and before the room does, its files are taken.
    pub fn run_and_take(
        self,
        streams: Streams,
        taking: Taking<'_>,
        notice: &mut dyn FnMut(&str),
    ) -> Result<Ended, SessionError> {
        self.serve(streams, true, Some(taking), notice)
    }

    /// Starts one more process in the room and serves it to its end. Its environment is put after the workload's; an empty working directory or
    /// user is the workload's. The outcome is the process's, or the room's if that ended first.
    pub fn exec(
        self,
        process: &ProcessSpec,
        streams: Streams,
        notice: &mut dyn FnMut(&str),
    ) -> Result<Ended, SessionError> {
        self.ask(Exec { process: process.clone() })?;
        self.serve(streams, false, None, notice)
    }

    /// Waits until the workload of a room that was just made runs, or is over.
    pub fn wait_started(&self) -> Result<Beginning, SessionError> {
        loop {
            match self.receive()?.message {
                ToClient::Started(_) => return Ok(Beginning::Started),
                ToClient::Ended(ended) => return Ok(Beginning::Ended(Box::new(ended))),
                ToClient::Connected(_)
                | ToClient::Exited(_)
                | ToClient::Refused(_)
                | ToClient::Used(_)
                | ToClient::Noticed(_)
                | ToClient::Invoked(_)
                | ToClient::Done(_) => {}
            }
        }
    }

    /// What the room uses now.
    pub fn usage(&self) -> Result<UsageReport, SessionError> {
        self.ask_usage()?;
        self.hear_usage(Instant::now())
    }

    /// Asks what the room uses, and doesn't wait: of many rooms, all are asked before any is heard.
    pub fn ask_usage(&self) -> Result<(), SessionError> {
        self.ask(ReadUsage {})
    }

    /// What a room uses that was asked for it at this moment.
    pub fn hear_usage(&self, asked: Instant) -> Result<UsageReport, SessionError> {
        let until = asked + self.patience.usage() + self.patience.identify();
        loop {
            match self.receive_until(until)?.message {
                ToClient::Used(Used { report }) => return Ok(report),
                ToClient::Ended(Ended { usage: Some(report), .. }) => return Ok(report),
                ToClient::Ended(Ended { outcome, usage: None, .. }) => {
                    return Err(SessionError::Refused(outcome.sentence().unwrap_or_default()));
                }
                ToClient::Refused(Refused { message, .. }) => return Err(SessionError::Refused(message)),
                ToClient::Connected(_)
                | ToClient::Started(_)
                | ToClient::Exited(_)
                | ToClient::Noticed(_)
                | ToClient::Invoked(_)
                | ToClient::Done(_) => {}
            }
        }
    }

    /// Waits until the room has ended and nothing of it runs any more.
    pub fn wait(&self) -> Result<Ended, SessionError> {
        self.ask(Wait {})?;
        loop {
            if let ToClient::Ended(ended) = self.receive()?.message {
                return Ok(ended);
            }
        }
    }

    /// Waits until a room has ended that was asked to at this moment, its workload having so long before SIGKILL. An owner that doesn't even
    /// answer is not waited for that long.
    pub fn wait_stopped(&self, asked: Instant, timeout: Duration) -> Result<Ended, SessionError> {
        self.ask(Wait {})?;
        let end = asked + timeout + self.patience.ending();
        let mut until = end.min(asked + self.patience.answer());
        loop {
            match self.receive_until(until) {
                Ok(Packet { message: ToClient::Ended(ended), .. }) => return Ok(ended),
                // Done, or anything else: there is somebody.
                Ok(_) => until = end,
                Err(SessionError::SilentOwner { .. }) if until == end => {
                    return Err(SessionError::NotEnded { seconds: (end - asked).as_secs() });
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The next packet, if it comes before this moment.
    fn receive_until(&self, until: Instant) -> Result<Packet<ToClient>, SessionError> {
        // No time at all would mean for ever.
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        self.limit(Some(left))?;
        self.receive_in_time().map_err(|error| match (error, self.owner()) {
            (SessionError::Silent, Some(owner)) => SessionError::SilentOwner { owner },
            (error, _) => error,
        })
    }

    /// The owner's process: who listened at the socket (unix(7), SO_PEERCRED).
    fn owner(&self) -> Option<i32> {
        let peer = rustix::net::sockopt::socket_peercred(self.connection.as_fd()).ok()?;
        Some(peer.pid.as_raw_pid())
    }

    pub(crate) fn limit(&self, timeout: Option<Duration>) -> Result<(), SessionError> {
        self.connection.limit(timeout).map_err(SessionError::Streams)
    }

    pub(crate) fn receive_in_time(&self) -> Result<Packet<ToClient>, SessionError> {
        self.connection
            .receive()
            .map_err(|e| if e.would_block() { SessionError::Silent } else { SessionError::OwnerGone(e) })
    }

    fn serve(
        self,
        streams: Streams,
        to_the_rooms_end: bool,
        mut taking: Option<Taking<'_>>,
        notice: &mut dyn FnMut(&str),
    ) -> Result<Ended, SessionError> {
        let mut pumps = Pumps::new(streams, self.patience);
        loop {
            let Packet { message, descriptors } = match self.receive() {
                Ok(packet) => packet,
                Err(error) => {
                    pumps.end();
                    return Err(error);
                }
            };
            match message {
                ToClient::Connected(Connected { stream: StreamKind::Returned }) => {
                    if let (Some(taking), Some(socket)) = (taking.take(), descriptors.into_iter().next()) {
                        (taking.take)(Ok(socket.into()));
                    }
                    let _ = self.remote().send(Drained {});
                }
                ToClient::Connected(Connected { stream }) => {
                    for socket in descriptors {
                        pumps.connect(stream, socket.into())?;
                    }
                }
                ToClient::Exited(Exited { status, out_of_memory }) => {
                    pumps.drain();
                    if !to_the_rooms_end {
                        let outcome = Outcome::Exited { status, out_of_memory };
                        return Ok(Ended { outcome, usage: None, started: true, timeline: Vec::new() });
                    }
                    // The owner may have ended the room meanwhile; its last word is waiting then.
                    let asked = taking
                        .as_ref()
                        .map(|taking| self.remote().send(Return { paths: taking.paths.to_vec() }));
                    if let Some(Err(error)) = &asked
                        && let Some(taking) = taking.take()
                    {
                        (taking.take)(Err(error.to_string()));
                    }
                    if !matches!(asked, Some(Ok(()))) {
                        let _ = self.remote().send(Drained {});
                    }
                }
                ToClient::Refused(Refused { message, .. }) if taking.is_some() => {
                    if let Some(taking) = taking.take() {
                        (taking.take)(Err(message));
                    }
                    let _ = self.remote().send(Drained {});
                }
                ToClient::Refused(Refused { failure, message }) if !to_the_rooms_end => {
                    let outcome = Outcome::Refused { failure, message };
                    return Ok(Ended { outcome, usage: None, started: false, timeline: Vec::new() });
                }
                ToClient::Noticed(Noticed { message }) => notice(&message),
                ToClient::Ended(mut ended) => {
                    ended.timeline.extend(pumps.first_output());
                    pumps.end();
                    return Ok(ended);
                }
                ToClient::Refused(_)
                | ToClient::Started(_)
                | ToClient::Used(_)
                | ToClient::Invoked(_)
                | ToClient::Done(_) => {}
            }
        }
    }
}

/// A connection to the socket of this name in a directory, through a descriptor: its path may be longer than a socket's address. `WouldBlock` if nobody accepts it in time.
pub(crate) fn connected(directory: &Path, name: &str, patience: Patience) -> io::Result<Connection> {
    let folder = rustix::fs::open(directory, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    // An owner that accepts nobody has a queue that is full at some time: connect(2) then waits for as long as a send would.
    let limit = |time| rustix::net::sockopt::set_socket_timeout(&socket, Timeout::Send, time);
    limit(Some(patience.answer()))?;
    rustix::net::connect(&socket, &socket_address(&folder, name)?)?;
    limit(None)?;
    Ok(Connection::from(socket))
}

/// An owner's socket below an open directory.
pub(crate) fn socket_address(folder: &OwnedFd, name: &str) -> io::Result<SocketAddrUnix> {
    use std::os::fd::AsRawFd;
    Ok(SocketAddrUnix::new(format!("/proc/self/fd/{}/{name}", folder.as_raw_fd()))?)
}
