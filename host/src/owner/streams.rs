//! Streams that the guest may dial: agreed on beforehand, each with a port and a token of its own, each taken once.
//!
//! ```text
//!   agree(purpose) ─▶ port, token ─▶ told to the agent ─▶ the guest dials ─▶ expects 16 bytes ─┬─ the token: taken, its purpose served
//!                                                                                              └─ else: dropped; the stream still waits
//! ```

use std::collections::HashMap;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use carrel_protocol::agent::{FIRST_STREAM_PORT, ProcessId, Stream, Token};

use super::api::StreamKind;
use super::events::{ClientId, Event, Teller};
use super::pace::InTime;
use crate::home::random;
use crate::patience::Patience;

/// Dialled connections at once whose token has not been read yet.
const MOST_UNIDENTIFIED: usize = 32;

/// What a stream is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// The n-th blob of the payload.
    Blob(usize),
    /// A process's standard stream.
    Process(ProcessId, StreamKind),
    /// A function's event.
    Event,
    /// A function's response, for this client.
    Response(ClientId),
    /// Files of the container's, for this client.
    Returned(ClientId),
}

/// All streams of a room that were agreed on and not dialled yet.
#[derive(Debug)]
pub(crate) struct Streams {
    next_port: u32,
    expected: HashMap<u32, (Token, Purpose)>,
    unidentified: Arc<AtomicUsize>,
    patience: Patience,
}

impl Streams {
    pub(crate) fn new(patience: Patience) -> Self {
        Self {
            next_port: FIRST_STREAM_PORT,
            expected: HashMap::new(),
            unidentified: Arc::default(),
            patience,
        }
    }

    /// A new stream, for the agent to dial.
    pub(crate) fn agree(&mut self, purpose: Purpose) -> io::Result<Stream> {
        let mut bytes = [0; 16];
        random(&mut bytes)?;
        let (port, token) = (self.next_port, Token(bytes));
        self.next_port = port.checked_add(1).ok_or_else(|| io::Error::other("all ports are used"))?;
        self.expected.insert(port, (token.clone(), purpose));
        Ok(Stream { port, token })
    }

    /// Forgets the streams of a process that did not start.
    pub(crate) fn forget(&mut self, process: ProcessId) {
        self.expected.retain(|_, (_, purpose)| !matches!(purpose, Purpose::Process(of, _) if *of == process));
    }

    /// The guest dialled. Its token is read on a thread of its own, within a time, by so many at once; all else is refused by dropping it.
    pub(crate) fn dialled(&self, port: u32, socket: OwnedFd, teller: &Teller) {
        let Some((token, _)) = self.expected.get(&port) else {
            tracing::debug!(port, "the guest dialled a port that was not agreed on");
            return;
        };
        if self.unidentified.fetch_add(1, Ordering::Relaxed) >= MOST_UNIDENTIFIED {
            self.unidentified.fetch_sub(1, Ordering::Relaxed);
            tracing::debug!(port, "the guest dials too much at once");
            return;
        }
        let (token, waiting, time) = (token.clone(), Arc::clone(&self.unidentified), self.patience.token());
        let spawned = teller.spawn("token", move |teller| {
            let socket = UnixStream::from(socket);
            let identified = identify(&socket, &token, time);
            waiting.fetch_sub(1, Ordering::Relaxed);
            match identified {
                Ok(true) => {
                    teller.tell(Event::Identified { port, socket });
                }
                Ok(false) => tracing::debug!(port, "the guest dialled with a wrong token"),
                Err(error) => tracing::debug!(port, %error, "the guest dialled and said no token"),
            }
        });
        if let Err(error) = spawned {
            self.unidentified.fetch_sub(1, Ordering::Relaxed);
            tracing::warn!(%error, "no thread for a stream of the guest's");
        }
    }

    /// What an identified stream is for; `None` for one that was taken before.
    pub(crate) fn take(&mut self, port: u32) -> Option<Purpose> {
        self.expected.remove(&port).map(|(_, purpose)| purpose)
    }
}

fn identify(socket: &UnixStream, token: &Token, time: Duration) -> io::Result<bool> {
    socket.set_nonblocking(false)?;
    let mut said = [0; 16];
    InTime::new(socket, time).read_exact(&mut said)?;
    socket.set_read_timeout(None)?;
    // No early exit: how long this takes tells nothing about the token.
    Ok(said.iter().zip(token.0).fold(0, |differs, (a, b)| differs | (a ^ b)) == 0)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::time::Instant;

    use super::super::events::Events;
    use super::*;

    fn dial(streams: &Streams, port: u32, teller: &Teller) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        streams.dialled(port, theirs.into(), teller);
        ours
    }

    #[test]
    fn a_wrong_token_is_dropped_and_the_right_one_still_taken() {
        let (teller, mut events) = Events::new().unwrap();
        let mut streams = Streams::new(Patience::default());
        let agreed = streams.agree(Purpose::Blob(3)).unwrap();
        let mut wrong = dial(&streams, agreed.port, &teller);
        wrong.write_all(&[0; 16]).unwrap();
        assert_eq!(wrong.read(&mut [0]).unwrap(), 0, "it was dropped");
        let mut right = dial(&streams, agreed.port, &teller);
        right.write_all(&agreed.token.0).unwrap();
        let Event::Identified { port, .. } =
            events.next(Some(Instant::now() + Duration::from_secs(10))).unwrap()
        else {
            panic!("another event");
        };
        assert_eq!(streams.take(port), Some(Purpose::Blob(3)));
        assert_eq!(streams.take(port), None, "a stream is taken once");
    }

    #[test]
    fn a_port_that_was_not_agreed_on_is_refused_at_once() {
        let (teller, _events) = Events::new().unwrap();
        let streams = Streams::new(Patience::default());
        let mut dialled = dial(&streams, 5000, &teller);
        assert_eq!(dialled.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_token_of_a_byte_now_and_then_is_not_waited_for() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let dribbling = std::thread::spawn(move || {
            let more = |_: &u8| (&ours).write_all(&[7]).is_ok();
            (0..16).take_while(more).for_each(|_| std::thread::sleep(Duration::from_millis(200)));
        });
        let begun = Instant::now();
        let error = identify(&theirs, &Token([7; 16]), Duration::from_millis(300)).unwrap_err();
        assert!(matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
        drop(theirs);
        dribbling.join().unwrap();
    }

    #[test]
    fn so_many_may_be_silent_at_once() {
        let (teller, _events) = Events::new().unwrap();
        let mut streams = Streams::new(Patience::default());
        let agreed = streams.agree(Purpose::Event).unwrap();
        let silent: Vec<_> = (0..MOST_UNIDENTIFIED).map(|_| dial(&streams, agreed.port, &teller)).collect();
        let mut one_more = dial(&streams, agreed.port, &teller);
        assert_eq!(one_more.read(&mut [0]).unwrap(), 0, "it was refused");
        drop(silent);
    }
}
