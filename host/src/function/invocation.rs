//! One event in a function's room, and then the room's end.
//!
//! ```text
//!   Started ─▶ Invoke + event ─▶ Connected(response) and Invoked, in either order ─▶ Stop ─▶ Exited ─▶ Drained ─▶ Ended
//!                                    │ the runtime ends first: Exited ─▶ Invoked, or nothing more in time ─▶ Drained ─▶ Ended
//! ```
//!
//! The function's own output is its log; it is read to its end before the invocation counts as over, so that nothing of it
//! comes after the lines that close it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};

use carrel_protocol::agent::Outcome as Ending;

use crate::outcome::Outcome;
use crate::owner::api::{Connected, Drained, Exited, Invoke, Noticed, Refused, StreamKind, ToClient};
use crate::session::{Ended, Pumps, Session, SessionError, Streams};

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
    /// For its response, or the error that it answers with.
    pub response: File,
    /// The runtime runs, and gets the event.
    pub started: &'a mut dyn FnMut(),
    /// Something that the user should know; the room goes on.
    pub notice: &'a mut dyn FnMut(&str),
}

/// How it ended.
#[derive(Debug)]
pub struct Called {
    /// What the agent says; `None` if the room ended before there was anything to say.
    pub invoked: Option<carrel_protocol::agent::Invoked>,
    /// The room's end, and its usage.
    pub room: Ended,
}

/// What has happened so far.
struct Progress {
    pumps: Pumps,
    response: Option<File>,
    /// What moves the response, and the socket that it comes from.
    pump: Option<(JoinHandle<u64>, UnixStream)>,
    invoked: Option<carrel_protocol::agent::Invoked>,
    exited: Option<Exited>,
    stopped: bool,
    drained: bool,
    /// What is still missing did not come in time.
    gave_up: bool,
}

impl Session {
    /// Has the function handle one event, then ends its room.
    ///
    /// # Errors
    ///
    /// The owner is gone, or refuses.
    pub fn invoke(self, call: &Call, audience: Audience<'_>) -> Result<Called, SessionError> {
        let Audience { log, response, started, notice } = audience;
        let mut so_far = Progress {
            pumps: Pumps::new(log, self.patience),
            response: Some(response),
            pump: None,
            invoked: None,
            exited: None,
            stopped: false,
            drained: false,
            gave_up: false,
        };
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
                    started();
                    let Call { id, event, event_bytes, timeout_ms, headers } = call;
                    let invoke = Invoke {
                        id: id.clone(),
                        event_bytes: *event_bytes,
                        timeout_ms: *timeout_ms,
                        headers: headers.clone(),
                    };
                    self.remote().send_with(invoke, event)?;
                }
                ToClient::Invoked(invoked) => so_far.invoked = Some(invoked.invoked),
                ToClient::Exited(exited) => so_far.exited = Some(exited),
                ToClient::Refused(Refused { message, .. }) => return Err(SessionError::Refused(message)),
                ToClient::Noticed(Noticed { message }) => notice(&message),
                ToClient::Ended(room) => return Ok(so_far.finish(call, room)),
                ToClient::Connected(_) | ToClient::Used(_) | ToClient::Done(_) => {}
            }
            so_far.go_on(&self)?;
        }
    }
}

impl Progress {
    fn connect(&mut self, stream: StreamKind, socket: UnixStream) -> Result<(), SessionError> {
        match (stream, self.response.take_if(|_| stream == StreamKind::Response)) {
            (StreamKind::Response, Some(to)) => {
                socket.set_nonblocking(false).map_err(SessionError::Streams)?;
                let from = socket.try_clone().map_err(SessionError::Streams)?;
                let pump = thread::Builder::new().name("response".into()).spawn(move || pass_on(from, to));
                self.pump = Some((pump.map_err(SessionError::Streams)?, socket));
                Ok(())
            }
            // Nobody asks for files of a function's room.
            (StreamKind::Response, None) | (StreamKind::Returned, _) => Ok(()),
            (StreamKind::Stdin | StreamKind::Stdout | StreamKind::Stderr, _) => {
                self.pumps.connect(stream, socket)
            }
        }
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

    fn finish(mut self, call: &Call, room: Ended) -> Called {
        self.pumps.end();
        let passed_on = self.pump.take().map_or(0, |(pump, socket)| {
            // As of any stream: what had come by the room's end is all there is.
            let _ = socket.shutdown(Shutdown::Read);
            pump.join().unwrap_or_default()
        });
        let mut invoked = self.invoked.take();
        if let Some(invoked) = &mut invoked {
            // The guest's word is a claim; what came is known.
            invoked.response_bytes = passed_on.min(MOST_BYTES);
            if passed_on > MOST_BYTES {
                invoked.outcome = Ending::ResponseTooLarge { bytes: passed_on };
            }
        } else if let Outcome::Exited { status, out_of_memory } = room.outcome {
            // It ended before it could be given its event.
            let guest = room.usage.as_ref().and_then(|usage| usage.guest.as_ref());
            invoked = Some(carrel_protocol::agent::Invoked {
                id: call.id.clone(),
                outcome: Ending::Exited { status, out_of_memory },
                init_us: guest.map(|guest| guest.wall_us),
                duration_us: 0,
                memory_peak_bytes: guest.map(|guest| guest.memory.peak_bytes).unwrap_or_default(),
                response_bytes: 0,
            });
        }
        Called { invoked, room }
    }
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
