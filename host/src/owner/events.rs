//! The threads that wait, one for each thing that may happen, and the channel on which they say so.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use carrel_protocol::Message;
use carrel_protocol::agent::FromAgent;
use carrel_protocol::vmm::FromVmm;
use rustix::net::SocketFlags;

use super::api::{FromClient, StreamKind};
use super::pace::Pace;
use crate::launch::{Child, ChildEnd};
use crate::packet::{Connection, Packet};
use carrel_protocol::chain;

/// So many events may wait: a flooding guest waits with them.
const WAITING: usize = 64;
/// From a command that could not be accepted to the next attempt.
const AGAIN: Duration = Duration::from_millis(500);

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

/// Where threads say what happened. A room that ended hears no more, which ends them.
#[derive(Clone, Debug)]
pub(crate) struct Teller(SyncSender<Event>);

pub(crate) fn channel() -> (Teller, Receiver<Event>) {
    let (sender, receiver) = sync_channel(WAITING);
    (Teller(sender), receiver)
}

impl Teller {
    /// Tells, and says whether anybody listens still.
    pub(crate) fn tell(&self, event: Event) -> bool {
        self.0.send(event).is_ok()
    }

    /// A thread that waits for something.
    pub(crate) fn spawn(&self, name: &str, body: impl FnOnce(&Self) + Send + 'static) -> io::Result<()> {
        let teller = self.clone();
        thread::Builder::new().name(name.into()).stack_size(256 << 10).spawn(move || body(&teller)).map(drop)
    }

    pub(crate) fn watch_vmm(&self, connection: &Arc<Connection>, child: &Child) -> io::Result<()> {
        let connection = Arc::clone(connection);
        self.spawn("vmm", move |teller| {
            let mut pace = Pace::default();
            loop {
                pace.wait();
                let event = match connection.receive() {
                    Ok(packet) => Event::Vmm(packet),
                    Err(error) => {
                        tracing::debug!(error = %chain(&error), "the VMM's connection is over");
                        teller.tell(Event::VmmClosed);
                        return;
                    }
                };
                if !teller.tell(event) {
                    return;
                }
            }
        })?;
        let process = child.descriptor()?;
        self.spawn("vmm-end", move |teller| {
            let end = crate::launch::wait_until_ended(process.as_fd()).unwrap_or_else(|error| {
                tracing::error!(%error, "the VMM can't be waited for");
                ChildEnd::Signal(0)
            });
            teller.tell(Event::VmmEnded(end));
        })
    }

    pub(crate) fn watch_agent(&self, mut control: UnixStream) -> io::Result<()> {
        self.spawn("agent", move |teller| {
            let mut pace = Pace::default();
            loop {
                pace.wait();
                let event = match FromAgent::read_from(&mut control) {
                    Ok(message) => Event::Agent(message),
                    Err(error) => {
                        teller.tell(Event::AgentClosed(chain(&error)));
                        return;
                    }
                };
                if !teller.tell(event) {
                    return;
                }
            }
        })
    }

    pub(crate) fn watch_client(&self, id: ClientId, connection: &Arc<Connection>) -> io::Result<()> {
        let connection = Arc::clone(connection);
        self.spawn("client", move |teller| {
            while let Ok(packet) = connection.receive() {
                if !teller.tell(Event::Client(id, packet)) {
                    return;
                }
            }
            teller.tell(Event::ClientClosed(id));
        })
    }

    /// Accepts commands: those of root and of the owner's own user.
    pub(crate) fn accept_clients(&self, listener: OwnedFd) -> io::Result<()> {
        self.spawn("accept", move |teller| {
            loop {
                let socket = match rustix::net::accept_with(&listener, SocketFlags::CLOEXEC) {
                    Ok(socket) => socket,
                    Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => continue,
                    // Too many descriptors, here or on the whole host, or no memory: that passes, and the command waits meanwhile.
                    Err(
                        error @ (rustix::io::Errno::MFILE
                        | rustix::io::Errno::NFILE
                        | rustix::io::Errno::NOBUFS
                        | rustix::io::Errno::NOMEM),
                    ) => {
                        tracing::warn!(%error, "a command can't be accepted yet");
                        thread::sleep(AGAIN);
                        continue;
                    }
                    Err(error) => {
                        tracing::error!(%error, "no more commands can be accepted");
                        return;
                    }
                };
                if !may_command(&socket) {
                    continue;
                }
                if !teller.tell(Event::NewClient(socket.into())) {
                    return;
                }
            }
        })
    }
}

/// Whether who connected may say what becomes of rooms: root, and this process's own user (unix(7), SO_PEERCRED).
pub(crate) fn may_command(socket: &OwnedFd) -> bool {
    let peer = rustix::net::sockopt::socket_peercred(socket);
    peer.is_ok_and(|peer| peer.uid.is_root() || peer.uid == rustix::process::geteuid())
}
