//! Events in a function's room, one after another, and then the room's end.
//!
//! ```text
//!   Started ─▶ Invoke + event ─▶ Connected(response) and Invoked, in either order ─▶ Stop ─▶ Exited ─▶ Drained ─▶ Ended
//!                  ▲                 │  │ the runtime lives, and there is another event
//!                  ├─────────────────┼──┤
//!   Warm ──────────┘                 │  └ or somebody keeps the room: Warm
//!                                    │ the runtime ends first: Exited ─▶ Invoked, or nothing more in time ─▶ Drained ─▶ Ended
//! ```
//!
//! The function's own output is its log; it is read to its end before the last invocation counts as over, so that nothing of it
//! comes after the lines that close it. Between two events nothing says that it was all: a line that is late stands after the first's REPORT, as on Lambda.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use carrel_protocol::agent::Outcome as Ending;

use crate::outcome::Outcome;
use crate::owner::api::{Connected, Drained, Exited, Invoke, Noticed, Refused, StreamKind, ToClient};
use crate::packet::Connection;
use crate::patience::Patience;
use crate::session::{Ended, Pumps, Session, SessionError, Streams, or_heard_next};

/// What a response may have at most, streamed or not: what the agent lets through, and some.
const MOST_BYTES: u64 = (200 << 20) + (8 << 20);
const CHUNK: usize = 128 << 10;

/// An event to be handled.
#[derive(Debug)]
pub struct Call {
    /// The request's id, a UUID.
    pub id: String,
    /// The event, from its beginning; a file, which the owner reads at its own pace.
    pub event: File,
    /// Bytes in it.
    pub event_bytes: u64,
    /// ms.
    pub timeout_ms: u32,
    /// Further `Lambda-Runtime-*` headers, named without that prefix.
    pub headers: BTreeMap<String, String>,
}

/// Who hears of an invocation while it lasts.
pub struct Audience<'a> {
    /// For what the function writes: its log.
    pub log: Streams,
    /// For its responses, or the errors that it answers with.
    pub response: File,
    /// The runtime runs, and gets this event.
    pub started: &'a mut dyn FnMut(&Call),
    /// It answered, and gets another event after this one. Not told of the last one: see [`Called`].
    pub answered: &'a mut dyn FnMut(&Call, &carrel_protocol::agent::Invoked),
    /// Something that the user should know; the room goes on.
    pub notice: &'a mut dyn FnMut(&str),
    /// Asked when the last event was answered by a runtime that lives: whether somebody has taken the room to keep it. If not, or if nobody is to be asked, it ends.
    pub keep: Option<&'a mut dyn FnMut(&Warm) -> bool>,
}

/// A room whose function has handled its events and waits for another: its creator's connection, and the function's log.
#[derive(Debug)]
pub struct Warm {
    session: Session,
    stdout: UnixStream,
    stderr: UnixStream,
}

impl Warm {
    /// What has to be handed over with it: see [`Self::from_descriptors`].
    pub(crate) fn descriptors(&self) -> [BorrowedFd<'_>; 3] {
        [self.session.socket(), self.stdout.as_fd(), self.stderr.as_fd()]
    }

    /// The room that was handed over so.
    pub(crate) fn from_descriptors(descriptors: Vec<OwnedFd>, patience: Patience) -> Option<Self> {
        let [connection, stdout, stderr] = <[OwnedFd; 3]>::try_from(descriptors).ok()?;
        let session = Session::new(Connection::from(connection), patience);
        Some(Self { session, stdout: stdout.into(), stderr: stderr.into() })
    }

    /// As [`Session::invoke`], in a room whose function runs already.
    ///
    /// # Errors
    ///
    /// As there; and [`SessionError::Over`] if the event was not handed over, so that another room can handle it.
    pub fn invoke(
        self,
        first: Call,
        next: &mut dyn FnMut() -> io::Result<Option<Call>>,
        audience: Audience<'_>,
    ) -> Result<Called, SessionError> {
        let Self { session, stdout, stderr } = self;
        let log = [(StreamKind::Stdout, stdout), (StreamKind::Stderr, stderr)];
        session.converse(first, next, audience, Some(log))
    }
}

/// How the last event ended, and with it the room.
#[derive(Debug)]
pub struct Called {
    /// The event. There may be others that were not asked for any more: the room ended before.
    pub call: Call,
    /// What the agent says; `None` if the room ended before there was anything to say.
    pub invoked: Option<carrel_protocol::agent::Invoked>,
    /// The room's end, and its usage; `None` if the room is kept.
    pub room: Option<Ended>,
}

/// What has happened so far.
struct Progress {
    pumps: Pumps,
    response: File,
    /// What moves the response.
    pump: Option<ResponsePump>,
    invoked: Option<carrel_protocol::agent::Invoked>,
    exited: Option<Exited>,
    stopped: bool,
    drained: bool,
    /// What is still missing did not come in time.
    gave_up: bool,
}

/// A thread that moves a response, and what tells that it is done.
struct ResponsePump {
    thread: JoinHandle<u64>,
    socket: UnixStream,
    /// Closed when it is.
    done: Receiver<()>,
}

impl ResponsePump {
    /// Waits for the end of the response, for so long at most; then for what had come by now. Returns how many bytes came.
    fn finish(self, time: Option<Duration>) -> u64 {
        if let Some(time) = time {
            let _ = self.done.recv_timeout(time);
        }
        let _ = self.socket.shutdown(Shutdown::Read);
        self.thread.join().unwrap_or_default()
    }
}

impl Session {
    /// Has the function handle `first` and then, as long as its runtime lives, what `next` gives; then ends its room.
    ///
    /// # Errors
    ///
    /// The owner is gone, or refuses; or `next` fails.
    pub fn invoke(
        self,
        first: Call,
        next: &mut dyn FnMut() -> io::Result<Option<Call>>,
        audience: Audience<'_>,
    ) -> Result<Called, SessionError> {
        self.converse(first, next, audience, None)
    }

    /// `running`: the streams of a function that runs already.
    fn converse(
        self,
        first: Call,
        next: &mut dyn FnMut() -> io::Result<Option<Call>>,
        audience: Audience<'_>,
        running: Option<[(StreamKind, UnixStream); 2]>,
    ) -> Result<Called, SessionError> {
        let Audience { log, response, started, answered, notice, mut keep } = audience;
        let mut call = first;
        let mut so_far = Progress {
            pumps: Pumps::new(log, self.patience),
            response,
            pump: None,
            invoked: None,
            exited: None,
            stopped: false,
            drained: false,
            gave_up: false,
        };
        if let Some(log) = running {
            self.hand_over(&call).map_err(|error| SessionError::Over(error.into()))?;
            started(&call);
            so_far.reconnect(log)?;
        }
        let mut is_last = false;
        loop {
            let message = match self.receive_in_time() {
                Ok(packet) => {
                    let mut descriptors = packet.descriptors.into_iter();
                    if let (ToClient::Connected(Connected { stream }), Some(socket)) =
                        (&packet.message, descriptors.next())
                    {
                        so_far.connect(*stream, socket.into())?;
                    }
                    packet.message
                }
                Err(SessionError::Silent) => {
                    so_far.gave_up = true;
                    so_far.go_on(&self)?;
                    continue;
                }
                Err(error) => {
                    so_far.pumps.end();
                    return Err(error);
                }
            };
            match message {
                ToClient::Started(_) => {
                    started(&call);
                    or_heard_next(self.hand_over(&call))?;
                }
                ToClient::Invoked(invoked) => so_far.invoked = Some(invoked.invoked),
                ToClient::Exited(exited) => so_far.exited = Some(exited),
                ToClient::Refused(Refused { message, .. }) => return Err(SessionError::Refused(message)),
                ToClient::Noticed(Noticed { message }) => notice(&message),
                ToClient::Ended(room) => {
                    let invoked = so_far.finish(&call, &room);
                    return Ok(Called { call, invoked, room: Some(room) });
                }
                ToClient::Connected(_) | ToClient::Used(_) | ToClient::Done(_) => {}
            }
            if !is_last && so_far.may_have_another() {
                if let Some(another) = next().map_err(SessionError::Streams)? {
                    if let Some(invoked) = so_far.conclude(self.patience.identify()) {
                        answered(&call, &invoked);
                    }
                    call = another;
                    started(&call);
                    or_heard_next(self.hand_over(&call))?;
                } else {
                    is_last = true;
                    if let Some(keep) = &mut keep
                        && so_far.kept(&self, keep)?
                    {
                        let invoked = so_far.conclude(self.patience.identify());
                        return Ok(Called { call, invoked, room: None });
                    }
                }
            }
            so_far.go_on(&self)?;
        }
    }

    fn hand_over(&self, call: &Call) -> Result<(), SessionError> {
        let Call { id, event, event_bytes, timeout_ms, headers } = call;
        let invoke = Invoke {
            id: id.clone(),
            event_bytes: *event_bytes,
            timeout_ms: *timeout_ms,
            headers: headers.clone(),
        };
        self.remote().send_with(invoke, event)
    }
}

impl Progress {
    /// The event was answered, in whatever words, by a runtime that lives; and nobody has asked it to end.
    fn may_have_another(&self) -> bool {
        let lives = self.invoked.as_ref().is_some_and(|invoked| match invoked.outcome {
            Ending::Response { .. } | Ending::Error { .. } | Ending::ResponseTooLarge { .. } => true,
            Ending::InitError { .. } | Ending::TimedOut | Ending::InitTimedOut | Ending::Exited { .. } => {
                false
            }
        });
        lives && self.pump.is_some() && self.exited.is_none() && !self.stopped && !self.gave_up
    }

    /// Offers the room to whoever may keep it, with the log read so far as it has come.
    fn kept(&mut self, session: &Session, keep: &mut dyn FnMut(&Warm) -> bool) -> Result<bool, SessionError> {
        let mut log = self.pumps.release();
        // In no order but that of their connections.
        log.sort_by_key(|(stream, _)| *stream != StreamKind::Stdout);
        let warm = match <[_; 2]>::try_from(log) {
            Ok([(StreamKind::Stdout, stdout), (StreamKind::Stderr, stderr)]) => {
                Warm { session: session.another(), stdout, stderr }
            }
            // One of them was never there.
            Ok(log) => return self.reconnect(log).map(|()| false),
            Err(log) => return self.reconnect(log).map(|()| false),
        };
        if keep(&warm) {
            return Ok(true);
        }
        self.reconnect([(StreamKind::Stdout, warm.stdout), (StreamKind::Stderr, warm.stderr)])?;
        Ok(false)
    }

    fn reconnect(
        &mut self,
        log: impl IntoIterator<Item = (StreamKind, UnixStream)>,
    ) -> Result<(), SessionError> {
        log.into_iter().try_for_each(|(stream, socket)| self.pumps.connect(stream, socket))
    }

    /// The last event is over, and there is another, or the room is somebody else's.
    fn conclude(&mut self, time: Duration) -> Option<carrel_protocol::agent::Invoked> {
        let passed_on = self.pump.take().map_or(0, |pump| pump.finish(Some(time)));
        self.invoked.take().map(|invoked| measured(invoked, passed_on))
    }

    fn connect(&mut self, stream: StreamKind, socket: UnixStream) -> Result<(), SessionError> {
        match stream {
            StreamKind::Response if self.pump.is_none() => {
                self.pump = Some(self.pump_response(socket).map_err(SessionError::Streams)?);
                Ok(())
            }
            // Nobody asks for files of a function's room.
            StreamKind::Response | StreamKind::Returned => Ok(()),
            StreamKind::Stdin | StreamKind::Stdout | StreamKind::Stderr => self.pumps.connect(stream, socket),
        }
    }

    fn pump_response(&self, socket: UnixStream) -> io::Result<ResponsePump> {
        socket.set_nonblocking(false)?;
        let (from, to) = (socket.try_clone()?, self.response.try_clone()?);
        let (alive, done) = channel::<()>();
        let thread = thread::Builder::new().name("response".into()).spawn(move || {
            let _alive = alive;
            pass_on(from, to)
        })?;
        Ok(ResponsePump { thread, socket, done })
    }

    /// Takes the next step, if it is due, and sets how long to wait for the one after.
    fn go_on(&mut self, session: &Session) -> Result<(), SessionError> {
        let connected = self.pump.is_some() || self.gave_up;
        let answered = self.invoked.is_some() || self.gave_up;
        if self.exited.is_none() && self.invoked.is_some() && connected && !self.stopped {
            self.stopped = true;
            // The room may be ending by itself.
            let _ = session.remote().stop(Some(0));
        }
        if self.exited.is_some() && answered && connected && !self.drained {
            self.drained = true;
            self.pumps.drain();
            let _ = session.remote().send(Drained {});
        }
        let due = (self.invoked.is_some() || self.exited.is_some()) && !(connected && answered);
        session.limit(due.then(|| session.patience.identify()))
    }

    fn finish(mut self, call: &Call, room: &Ended) -> Option<carrel_protocol::agent::Invoked> {
        self.pumps.end();
        // As of any stream: what had come by the room's end is all there is.
        let passed_on = self.pump.take().map_or(0, |pump| pump.finish(None));
        if let Some(invoked) = self.invoked.take() {
            return Some(measured(invoked, passed_on));
        }
        if let Outcome::Exited { status, out_of_memory } = room.outcome {
            // It ended before it could be given its event.
            let guest = room.usage.as_ref().and_then(|usage| usage.guest.as_ref());
            return Some(carrel_protocol::agent::Invoked {
                id: call.id.clone(),
                outcome: Ending::Exited { status, out_of_memory },
                init_us: guest.map(|guest| guest.wall_us),
                duration_us: 0,
                memory_peak_bytes: guest.map(|guest| guest.memory.peak_bytes).unwrap_or_default(),
                response_bytes: 0,
            });
        }
        None
    }
}

/// The guest's word is a claim; what came is known.
fn measured(mut invoked: carrel_protocol::agent::Invoked, passed_on: u64) -> carrel_protocol::agent::Invoked {
    invoked.response_bytes = passed_on.min(MOST_BYTES);
    if passed_on > MOST_BYTES {
        invoked.outcome = Ending::ResponseTooLarge { bytes: passed_on };
    }
    invoked
}

/// Copies to the end, or to the cap. Returns how many bytes came; more than the cap if there were more.
fn pass_on(mut from: UnixStream, mut to: File) -> u64 {
    let mut buffer = vec![0; CHUNK];
    let mut total = 0_u64;
    loop {
        let read = match from.read(&mut buffer) {
            Ok(0) => return total,
            Ok(read) => read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => return total,
        };
        total = total.saturating_add(u64::try_from(read).unwrap_or(u64::MAX));
        let written = to.write_all(buffer.get(..read).unwrap_or_default());
        if total > MOST_BYTES || written.is_err() {
            let _ = from.shutdown(Shutdown::Both);
            return total;
        }
    }
}
