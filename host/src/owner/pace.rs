//! What a guest may take of its owner's time: the owner runs outside of the room's cgroup, so nobody else holds this down.
//!
//! ```text
//!   heard: so many messages in a while, then its socket is left alone; the guest's next ones wait in its own buffers
//!   told:  a message is taken whole within a time, however slowly the guest reads
//!   dialled: a stream's token is there whole within a time, however slowly the guest writes
//! ```

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Messages of one connection in one [`WINDOW`].
const AT_ONCE: u32 = 50;
const WINDOW: Duration = Duration::from_millis(100);

/// Slows the reader of one connection down to 500 messages a second.
#[derive(Debug, Default)]
pub(super) struct Pace {
    window: Option<Instant>,
    heard: u32,
}

impl Pace {
    /// So many messages more were heard: until when no others are to be, if these were too many.
    pub(super) fn pause(&mut self, messages: u32, now: Instant) -> Option<Instant> {
        let begun = match self.window {
            Some(begun) if now < begun + WINDOW => begun,
            _ => {
                (self.window, self.heard) = (Some(now), 0);
                now
            }
        };
        self.heard = self.heard.saturating_add(messages);
        (self.heard >= AT_ONCE).then(|| begun + WINDOW * self.heard / AT_ONCE)
    }
}

/// What one write is given: the kernel takes it as one buffer, and waits once.
const PART_BYTES: usize = 16 << 10;

/// A socket that takes all that is written, or gives all that is read, in however many parts, before a deadline. A timeout of the socket's own
/// begins anew with every part: a guest that reads or writes a little now and then would stretch ten seconds to minutes.
#[derive(Debug)]
pub(super) struct InTime<'a> {
    socket: &'a UnixStream,
    until: Instant,
}

impl<'a> InTime<'a> {
    pub(super) fn new(socket: &'a UnixStream, time: Duration) -> Self {
        Self { socket, until: Instant::now() + time }
    }
}

impl InTime<'_> {
    fn left(&self, overdue: &'static str) -> io::Result<Duration> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::Error::new(io::ErrorKind::TimedOut, overdue)) } else { Ok(left) }
    }
}

impl Read for InTime<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(Some(self.left("the guest does not write")?))?;
        self.socket.read(bytes)
    }
}

impl Write for InTime<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(Some(self.left("the guest does not read")?))?;
        self.socket.write(bytes.get(..PART_BYTES).unwrap_or(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn a_few_messages_are_heard_at_once_and_many_take_their_time() {
        let begun = Instant::now();
        let mut pace = Pace::default();
        assert!((1..AT_ONCE).all(|_| pace.pause(1, begun).is_none()));
        assert_eq!(pace.pause(1, begun), Some(begun + WINDOW));
        // Many that came in one piece are as many as one by one.
        let later = begun + WINDOW;
        assert_eq!(pace.pause(AT_ONCE * 7, later), Some(later + WINDOW * 7));
        assert_eq!(pace.pause(1, later + WINDOW * 7), None);
    }

    #[test]
    fn a_reader_of_a_byte_now_and_then_does_not_stretch_the_deadline() {
        let (mut slow, ours) = UnixStream::pair().unwrap();
        let reader = thread::spawn(move || {
            let mut byte = [0; 4096];
            while slow.read(&mut byte).is_ok_and(|n| n > 0) {
                thread::sleep(Duration::from_millis(10));
            }
        });
        let begun = Instant::now();
        let error = InTime::new(&ours, Duration::from_millis(300)).write_all(&vec![0; 4 << 20]).unwrap_err();
        assert!(matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        drop(ours);
        reader.join().unwrap();
    }
}
