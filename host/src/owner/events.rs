//! What happens to a room: heard by its own thread, which waits for all of it at once, and told by threads that copy.
//!
//! ```text
//!   VMM's socket ─┐
//!   VMM's process ┤           so many messages of a guest's in a while, then its socket is left out (Pace)
//!   agent ────────┼─ poll(2) ──▶ Events::next(until) ──▶ Room::handle
//!   commands ─────┤
//!   the door ─────┘ eventfd + channel ◀── Teller: blobs, tokens, logs
//! ```
//!
//! An idle room is one thread, whoever it waits for.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use carrel_protocol::agent::FromAgent;
use carrel_protocol::vmm::FromVmm;
use carrel_protocol::{Decoder, chain};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SocketFlags};

use super::api::{FromClient, StreamKind};
use super::pace::Pace;
use crate::launch::{Child, ChildEnd};
use crate::packet::{Connection, Packet};

/// So many of the threads' events may wait.
const WAITING: usize = 64;
/// From what could not be done, for want of a descriptor or of memory, to the next attempt.
const AGAIN: Duration = Duration::from_millis(500);
/// Bytes of the agent's that are read at once: some dozens of small messages, or a part of a large one.
const AGENT_BYTES: usize = 1024;
/// A thread that copies has no deep calls.
const STACK_BYTES: usize = 256 << 10;

/// A command's connection, in this owner's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ClientId(pub(crate) u64);

/// What may happen to a room.
#[derive(Debug)]
pub(crate) enum Event {
    Vmm(Packet<FromVmm>),
    /// The VMM's socket closed.
    VmmClosed,
    /// The VMM's process ended; it is a zombie.
    VmmEnded(ChildEnd),
    Agent(FromAgent),
    /// The control connection closed, or what came over it was no message.
    AgentClosed(String),
    /// A dialled stream said the right token.
    Identified {
        port: u32,
        socket: UnixStream,
    },
    NewClient(Connection),
    Client(ClientId, Packet<FromClient>),
    ClientClosed(ClientId),
    /// A log has all that came over this stream.
    Logged(StreamKind),
}

/// Where threads say what happened. Nobody hears them once their room has ended, which ends them.
#[derive(Clone, Debug)]
pub(crate) struct Teller {
    events: SyncSender<Event>,
    /// An eventfd: counts what was told.
    wake: Arc<OwnedFd>,
}

impl Teller {
    /// Tells, and waits while too much has been told that nobody heard yet.
    pub(crate) fn tell(&self, event: Event) {
        if self.events.send(event).is_ok() {
            // A counter that is full has been written to: whoever reads it wakes.
            let _ = rustix::io::write(&*self.wake, &1_u64.to_ne_bytes());
        }
    }

    /// A thread that copies, or waits for a guest.
    pub(crate) fn spawn(&self, name: &str, body: impl FnOnce(&Self) + Send + 'static) -> io::Result<()> {
        let teller = self.clone();
        thread::Builder::new()
            .name(name.into())
            .stack_size(STACK_BYTES)
            .spawn(move || body(&teller))
            .map(drop)
    }
}

/// What is listened to.
#[derive(Debug)]
enum Source {
    Vmm(Arc<Connection>),
    VmmEnd(OwnedFd),
    Agent {
        socket: UnixStream,
        decoder: Decoder,
    },
    Client(ClientId, Arc<Connection>),
    /// Where commands connect.
    Door(OwnedFd),
}

impl AsFd for Source {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Vmm(connection) | Self::Client(_, connection) => connection.as_fd(),
            Self::Agent { socket, .. } => socket.as_fd(),
            Self::VmmEnd(descriptor) | Self::Door(descriptor) => descriptor.as_fd(),
        }
    }
}

/// One source, and how it goes on.
#[derive(Debug)]
struct Watched {
    source: Source,
    pace: Pace,
    /// Until then it is left out.
    paused: Option<Instant>,
    /// It says no more.
    over: bool,
}

impl Watched {
    /// Hears what is there, without waiting for more; spurious readiness is nothing.
    fn hear(&mut self, heard: &mut VecDeque<Event>, now: Instant) {
        let before = heard.len();
        match &mut self.source {
            Source::Vmm(connection) => match connection.try_receive() {
                Ok(Some(packet)) => heard.push_back(Event::Vmm(packet)),
                Ok(None) => {}
                Err(error) => {
                    tracing::debug!(error = %chain(&error), "the VMM's connection is over");
                    heard.push_back(Event::VmmClosed);
                    self.over = true;
                }
            },
            Source::VmmEnd(process) => {
                let end = crate::launch::wait_until_ended(process.as_fd()).unwrap_or_else(|error| {
                    tracing::error!(%error, "the VMM can't be waited for");
                    ChildEnd::Signal(0)
                });
                heard.push_back(Event::VmmEnded(end));
                self.over = true;
            }
            Source::Agent { socket, decoder } => {
                if let Err(why) = hear_agent(socket, decoder, heard) {
                    heard.push_back(Event::AgentClosed(why));
                    self.over = true;
                }
            }
            Source::Client(id, connection) => match connection.try_receive() {
                Ok(Some(packet)) => heard.push_back(Event::Client(*id, packet)),
                Ok(None) => {}
                Err(_) => {
                    heard.push_back(Event::ClientClosed(*id));
                    self.over = true;
                }
            },
            Source::Door(listener) => match accept(listener) {
                Ok(Some(socket)) => heard.push_back(Event::NewClient(socket.into())),
                Ok(None) => {}
                // Too many descriptors, here or on the whole host, or no memory: that passes, and the command waits meanwhile.
                Err(error @ (Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)) => {
                    tracing::warn!(%error, "a command can't be accepted yet");
                    self.paused = Some(now + AGAIN);
                }
                Err(error) => {
                    tracing::error!(%error, "no more commands can be accepted");
                    self.over = true;
                }
            },
        }
        if matches!(self.source, Source::Vmm(_) | Source::Agent { .. }) {
            let messages = u32::try_from(heard.len() - before).unwrap_or(u32::MAX);
            self.paused = self.pace.pause(messages, now);
        }
    }
}

/// Reads once. What the agent says when it closes, or what it said wrong, is the error.
fn hear_agent(socket: &UnixStream, decoder: &mut Decoder, heard: &mut VecDeque<Event>) -> Result<(), String> {
    let mut bytes = [0; AGENT_BYTES];
    let mut read = match rustix::net::recv(socket, &mut bytes, RecvFlags::DONTWAIT) {
        Ok((0, _)) => return Err("it closed its connection".into()),
        Ok((count, _)) => bytes.get(..count).unwrap_or_default(),
        Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
        Err(error) => return Err(chain(&io::Error::from(error))),
    };
    while !read.is_empty() {
        let message: Option<FromAgent> = decoder.push(&mut read).map_err(|error| chain(&error))?;
        heard.extend(message.map(Event::Agent));
    }
    Ok(())
}

/// A command that waits at the door, if there is one that may command.
pub(crate) fn accept(listener: &OwnedFd) -> Result<Option<OwnedFd>, Errno> {
    match rustix::net::accept_with(listener, SocketFlags::CLOEXEC) {
        Ok(socket) => Ok(Some(socket).filter(may_command)),
        // It has gone again.
        Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Where a room hears what happens.
#[derive(Debug)]
pub(crate) struct Events {
    watched: Vec<Watched>,
    told: Receiver<Event>,
    wake: Arc<OwnedFd>,
    /// Heard and not yet handed over.
    heard: VecDeque<Event>,
}

impl Events {
    /// A room's ears, and what its threads tell it by.
    pub(crate) fn new() -> io::Result<(Teller, Self)> {
        let (sender, told) = sync_channel(WAITING);
        let wake = Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let teller = Teller { events: sender, wake: Arc::clone(&wake) };
        Ok((teller, Self { watched: Vec::new(), told, wake, heard: VecDeque::new() }))
    }

    /// A VMM: what it says, and its process's end.
    pub(crate) fn watch_vmm(&mut self, connection: &Arc<Connection>, child: &Child) -> io::Result<()> {
        self.watch(Source::VmmEnd(child.descriptor()?));
        self.watch(Source::Vmm(Arc::clone(connection)));
        Ok(())
    }

    /// The agent's control connection.
    pub(crate) fn watch_agent(&mut self, socket: UnixStream) {
        self.watch(Source::Agent { socket, decoder: Decoder::default() });
    }

    /// A command.
    pub(crate) fn watch_client(&mut self, id: ClientId, connection: &Arc<Connection>) {
        self.watch(Source::Client(id, Arc::clone(connection)));
    }

    /// Accepts commands: those of root and of the owner's own user.
    pub(crate) fn accept_clients(&mut self, listener: OwnedFd) -> io::Result<()> {
        // One that waited may have gone by the time that it is accepted.
        rustix::io::ioctl_fionbio(&listener, true)?;
        self.watch(Source::Door(listener));
        Ok(())
    }

    fn watch(&mut self, source: Source) {
        self.watched.push(Watched { source, pace: Pace::default(), paused: None, over: false });
    }

    /// Waits for the next event, `None` when there was none until then. What came before a moment that has passed is heard all the same.
    pub(crate) fn next(&mut self, until: Option<Instant>) -> Option<Event> {
        let mut last = false;
        loop {
            if let Some(event) = self.heard.pop_front() {
                return Some(event);
            }
            if last {
                return None;
            }
            let now = Instant::now();
            last = until.is_some_and(|until| until <= now);
            self.wait(until, now);
        }
    }

    /// Hears whatever is ready; waits for it, but no longer than until then, or until a source goes on.
    fn wait(&mut self, until: Option<Instant>, now: Instant) {
        for watched in &mut self.watched {
            watched.paused = watched.paused.filter(|until| *until > now);
        }
        let until = self.watched.iter().filter_map(|watched| watched.paused).chain(until).min();
        let timeout: Option<Timespec> =
            until.and_then(|until| until.saturating_duration_since(now).try_into().ok());
        let listening = || self.watched.iter().filter(|watched| watched.paused.is_none());
        let mut ready: Vec<PollFd<'_>> = listening()
            .map(|watched| PollFd::new(&watched.source, PollFlags::IN))
            .chain([PollFd::new(&self.wake, PollFlags::IN)])
            .collect();
        match rustix::event::poll(&mut ready, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "a room can't wait for what happens");
                thread::sleep(AGAIN);
            }
        }
        let ready: Vec<bool> = ready.iter().map(|source| !source.revents().is_empty()).collect();
        let now = Instant::now();
        let listening = self.watched.iter_mut().filter(|watched| watched.paused.is_none());
        for (watched, ready) in listening.zip(&ready) {
            if *ready {
                watched.hear(&mut self.heard, now);
            }
        }
        self.watched.retain(|watched| !watched.over);
        if ready.last() == Some(&true) {
            let _ = rustix::io::read(&*self.wake, &mut [0; 8]);
            self.heard.extend(self.told.try_iter());
        }
    }
}

/// Whether who connected may say what becomes of rooms: root, and this process's own user (unix(7), SO_PEERCRED).
fn may_command(socket: &OwnedFd) -> bool {
    let peer = rustix::net::sockopt::socket_peercred(socket);
    peer.is_ok_and(|peer| peer.uid.is_root() || peer.uid == rustix::process::geteuid())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use carrel_protocol::Message;
    use carrel_protocol::agent::{ProcessId, Ready};

    use super::super::api::{FromClient, Signal};
    use super::*;

    fn soon() -> Option<Instant> {
        Some(Instant::now() + Duration::from_secs(10))
    }

    fn now() -> Option<Instant> {
        Some(Instant::now())
    }

    fn frame() -> Vec<u8> {
        FromAgent::from(Ready { process: ProcessId(1) }).encode().unwrap()
    }

    #[test]
    fn a_message_in_pieces_is_one_and_the_end_is_told_once() {
        let (_, mut events) = Events::new().unwrap();
        let (ours, mut agents) = UnixStream::pair().unwrap();
        events.watch_agent(ours);
        let frame = frame();
        for byte in &frame {
            assert!(events.next(now()).is_none());
            agents.write_all(&[*byte]).unwrap();
        }
        assert!(matches!(events.next(soon()), Some(Event::Agent(FromAgent::Ready(_)))));
        // One and a half: what was whole is heard, then that it ended.
        agents.write_all(&[&frame[..], &frame[..1]].concat()).unwrap();
        drop(agents);
        assert!(matches!(events.next(soon()), Some(Event::Agent(_))));
        assert!(matches!(events.next(soon()), Some(Event::AgentClosed(_))));
        assert!(events.next(now()).is_none());
    }

    #[test]
    fn a_guest_that_floods_is_left_alone_for_a_while_and_a_command_is_heard_meanwhile() {
        let (_, mut events) = Events::new().unwrap();
        let (ours, mut agents) = UnixStream::pair().unwrap();
        let (client, commands) = Connection::pair().unwrap();
        let client = Arc::new(client);
        events.watch_agent(ours);
        events.watch_client(ClientId(1), &client);
        let frame = frame();
        let length = frame.len();
        let flood = thread::spawn(move || while agents.write_all(&frame).is_ok() {});
        let begun = Instant::now();
        let mut heard = 0;
        // Of all that it writes, at most one read more than 500 a second.
        while begun.elapsed() < Duration::from_secs(1) {
            heard += u32::from(events.next(Some(begun + Duration::from_secs(1))).is_some());
        }
        let most = 500 + AGENT_BYTES / length + 50;
        assert!((50..=most).contains(&usize::try_from(heard).unwrap()), "{heard} of {most}");
        commands.send(&FromClient::from(Signal { signal: 15 }), &[]).unwrap();
        let asked = Instant::now();
        while !matches!(events.next(soon()), Some(Event::Client(ClientId(1), _))) {}
        assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
        drop(events);
        flood.join().unwrap();
    }

    #[test]
    fn what_threads_tell_wakes_and_is_heard_though_the_time_is_over() {
        let (teller, mut events) = Events::new().unwrap();
        assert!(events.next(now()).is_none());
        teller
            .spawn("test", |teller| {
                (0..WAITING * 2).for_each(|_| teller.tell(Event::Logged(StreamKind::Stdout)));
            })
            .unwrap();
        for _ in 0..WAITING * 2 {
            assert!(matches!(events.next(soon()), Some(Event::Logged(StreamKind::Stdout))));
        }
        teller.tell(Event::Logged(StreamKind::Stderr));
        assert!(matches!(events.next(now()), Some(Event::Logged(StreamKind::Stderr))));
        drop(events);
        // Nobody hears it, and nobody waits for that.
        teller.tell(Event::Logged(StreamKind::Stdout));
    }
}
