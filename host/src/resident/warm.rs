//! Rooms whose functions have handled an event and wait for another: kept for a while, for whoever asks for one of the kind.
//!
//! ```text
//!   keep ─▶ [ oldest … newest ] ─▶ take: the newest, so that what is not needed gets old
//!              │ too old, or something came from it: it is over, or was meddled with
//!              │ or its promise is needed for another room
//!              ▼
//!            its connection is closed, and the room ends, as with any command that goes away
//! ```
//!
//! A room that waits is its owner's thread as before; what is kept here is its creator's side. Its owner is told that the room may rest.

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use carrel_protocol::chain;
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec};

use crate::owner::api::{FromClient, Rest};
use crate::packet::Connection;

/// What the watcher is told by [`Warm::tell`]; rooms have numbers from 1 on.
const NEWS: u64 = 0;
/// Events that are read at once.
const EVENTS: usize = 64;

/// A room, by the descriptors that it was handed over with: the first is its creator's connection.
#[derive(Debug)]
struct Kept {
    number: u64,
    key: String,
    connection: Connection,
    log: [OwnedFd; 2],
    until: Instant,
}

impl Kept {
    /// Whether nothing came from it since it was kept: a room that waits says nothing.
    fn is_quiet(&self) -> bool {
        let mut sources = [PollFd::new(&self.connection, PollFlags::IN)];
        matches!(rustix::event::poll(&mut sources, Some(&Timespec::default())), Ok(0))
    }
}

/// Where rooms are counted that rest, by their owners' threads.
#[derive(Clone, Debug, Default)]
pub(crate) struct Resting(Arc<AtomicU64>);

/// One of them, until this is dropped.
#[derive(Debug)]
pub(crate) struct Rests(Resting);

impl Resting {
    pub(crate) fn one(&self) -> Rests {
        self.0.fetch_add(1, Ordering::Relaxed);
        Rests(self.clone())
    }

    pub(super) fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Drop for Rests {
    fn drop(&mut self) {
        let Self(Resting(count)) = self;
        count.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Debug, Default)]
struct Rooms {
    /// The oldest first.
    kept: Vec<Kept>,
    last: u64,
    closed: bool,
}

/// The rooms that are kept.
#[derive(Debug)]
pub(super) struct Warm {
    rooms: Mutex<Rooms>,
    /// How long each is kept; none at all without it.
    time: Option<Duration>,
    /// Watches connections without another descriptor of any: one that is closed is closed.
    epoll: OwnedFd,
    news: PipeReader,
    tell: PipeWriter,
}

impl Warm {
    pub(super) fn new(time: Option<Duration>) -> io::Result<Self> {
        let (news, tell) = io::pipe()?;
        rustix::io::ioctl_fionbio(&tell, true)?;
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &news, EventData::new_u64(NEWS), EventFlags::IN)?;
        Ok(Self { rooms: Mutex::default(), time, epoll, news, tell })
    }

    /// Each statement leaves them whole, whoever fell over in between.
    fn lock(&self) -> MutexGuard<'_, Rooms> {
        self.rooms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self) {
        // A pipe that is full has news enough.
        let _ = (&self.tell).write(&[0]);
    }

    /// Keeps a room, by its creator's connection and its function's log, and says whether it does.
    pub(super) fn keep(&self, key: String, descriptors: Vec<OwnedFd>) -> bool {
        let (Some(time), Ok([connection, stdout, stderr])) =
            (self.time, <[OwnedFd; 3]>::try_from(descriptors))
        else {
            return false;
        };
        let (until, connection) = (Instant::now() + time, Connection::from(connection));
        let mut rooms = self.lock();
        let number = rooms.last + 1;
        let kept = Kept { number, key, connection, log: [stdout, stderr], until };
        if rooms.closed || !kept.is_quiet() {
            return false;
        }
        if epoll::add(&self.epoll, &kept.connection, EventData::new_u64(number), EventFlags::IN).is_err() {
            return false;
        }
        // One that doesn't hear it waits without rest.
        if let Err(error) = kept.connection.send(&FromClient::from(Rest {}), &[]) {
            tracing::debug!(error = %chain(&error), "a room is not told to rest");
        }
        rooms.last = number;
        rooms.kept.push(kept);
        drop(rooms);
        self.tell();
        true
    }

    /// The newest room of this kind.
    pub(super) fn take(&self, key: &str) -> Option<Vec<OwnedFd>> {
        let mut rooms = self.lock();
        loop {
            let found = rooms.kept.iter().rposition(|kept| kept.key == key)?;
            let kept = rooms.kept.remove(found);
            let _ = epoll::delete(&self.epoll, &kept.connection);
            if kept.is_quiet() {
                return Some([kept.connection.into_inner()].into_iter().chain(kept.log).collect());
            }
        }
    }

    /// Ends the oldest room, and says whether there was one.
    pub(super) fn end_oldest(&self) -> bool {
        let mut rooms = self.lock();
        let there_is_one = !rooms.kept.is_empty();
        rooms.kept.drain(..usize::from(there_is_one));
        there_is_one
    }

    /// How many there are.
    pub(super) fn count(&self) -> u64 {
        u64::try_from(self.lock().kept.len()).unwrap_or(u64::MAX)
    }

    /// Ends all of them, and keeps no others.
    pub(super) fn close(&self) {
        let mut rooms = self.lock();
        rooms.closed = true;
        rooms.kept.clear();
        drop(rooms);
        self.tell();
    }

    /// Ends rooms that have waited for long enough or are over, until [`Self::close`].
    pub(super) fn watch(&self) {
        let mut events = Vec::with_capacity(EVENTS);
        loop {
            let next = {
                let mut rooms = self.lock();
                if rooms.closed {
                    return;
                }
                let now = Instant::now();
                rooms.kept.retain(|kept| now < kept.until);
                rooms.kept.iter().map(|kept| kept.until - now).min()
            };
            let timeout = next.and_then(|next| Timespec::try_from(next).ok());
            // Interrupted, it looks again.
            let _ = epoll::wait(&self.epoll, spare_capacity(&mut events), timeout.as_ref());
            for event in events.drain(..) {
                match event.data.u64() {
                    NEWS => {
                        let _ = (&self.news).read(&mut [0; EVENTS]);
                    }
                    number => self.lock().kept.retain(|kept| kept.number != number),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::owner::api::{Signal, Started, ToClient};

    /// A room's own end, and what it is handed over by.
    fn room() -> (Connection, Vec<OwnedFd>) {
        let (room, creator) = Connection::pair().unwrap();
        room.limit(Some(Duration::from_secs(5))).unwrap();
        let log = [File::open("/dev/null"), File::open("/dev/null")].map(|file| file.unwrap().into());
        (room, [creator.into_inner()].into_iter().chain(log).collect())
    }

    fn hears(room: &Connection) -> FromClient {
        room.receive().unwrap().message
    }

    /// That it may rest was the last that it was told.
    fn is_over(room: &Connection) -> bool {
        assert_eq!(hears(room), Rest {}.into());
        room.receive::<FromClient>().is_err_and(|error| error.is_closed())
    }

    fn says(room: &Connection) {
        room.send(&ToClient::from(Started {}), &[]).unwrap();
    }

    fn with_a_watcher(time: Duration, body: impl FnOnce(&Warm)) {
        let warm = Warm::new(Some(time)).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| warm.watch());
            body(&warm);
            warm.close();
        });
    }

    const LONG: Duration = Duration::from_secs(1000);

    #[test]
    fn the_newest_of_a_kind_is_taken_once_and_the_oldest_of_all_ended_first() {
        with_a_watcher(LONG, |warm| {
            let (rooms, handed): (Vec<_>, Vec<_>) = (0..3).map(|_| room()).unzip();
            for (key, descriptors) in ["a", "b", "a"].into_iter().zip(handed) {
                assert!(warm.keep(key.into(), descriptors));
            }
            let taken = Connection::from(warm.take("a").unwrap().remove(0));
            let signal = FromClient::from(Signal { signal: 1 });
            taken.send(&signal, &[]).unwrap();
            assert_eq!(hears(&rooms[2]), Rest {}.into());
            assert_eq!(hears(&rooms[2]), signal, "the last that was kept was told something");
            assert!(warm.take("c").is_none());
            assert_eq!(warm.count(), 2);
            assert!(warm.end_oldest());
            assert!(is_over(&rooms[0]));
            assert!(warm.take("a").is_none());
            assert_eq!(warm.take("b").unwrap().len(), 3);
            assert!(!warm.end_oldest());
        });
    }

    #[test]
    fn a_room_is_kept_for_its_time_and_no_longer() {
        with_a_watcher(Duration::from_millis(50), |warm| {
            let (room, descriptors) = room();
            assert!(warm.keep("a".into(), descriptors));
            assert!(is_over(&room));
            assert_eq!((warm.count(), warm.take("a").is_none()), (0, true));
        });
    }

    #[test]
    fn a_room_that_says_something_is_over() {
        with_a_watcher(LONG, |warm| {
            let (room, descriptors) = room();
            assert!(warm.keep("a".into(), descriptors));
            says(&room);
            assert!(is_over(&room));
            assert_eq!(warm.count(), 0);
            // Nor is one kept that has said it before, or nothing at all.
            let (room, descriptors) = self::room();
            says(&room);
            assert!(!warm.keep("a".into(), descriptors) && !warm.keep("a".into(), Vec::new()));
        });
    }

    #[test]
    fn rooms_that_rest_are_counted_as_long_as_they_do() {
        let resting = Resting::default();
        let both = (resting.one(), resting.one());
        assert_eq!(resting.count(), 2);
        drop(both);
        assert_eq!(resting.count(), 0);
    }

    #[test]
    fn none_is_kept_after_the_end_or_where_none_is_wanted() {
        let warm = Warm::new(Some(LONG)).unwrap();
        let (room, descriptors) = room();
        assert!(warm.keep("a".into(), descriptors));
        warm.close();
        warm.watch();
        assert!(is_over(&room));
        assert!(!warm.keep("a".into(), self::room().1));
        assert!(!Warm::new(None).unwrap().keep("a".into(), self::room().1));
    }
}
