//! The threads that move a process's bytes between the guest's sockets and the caller's files.
//!
//! ```text
//!   connect ─▶ reading ⇄ writing ─▶ done        the guest closed its end, or nobody reads the file any more
//!   drain:        │ reading, and nothing came for a while: the guest holds its end open for nothing
//!   end:          │ the room is over: what is in the socket is all there is
//!                 ├── shut for reading ─▶ what is in the socket is still written ─▶ done
//!   release:      └── what is in the socket is still written ─▶ done; the socket stays open for whoever goes on with it
//! ```

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use carrel_protocol::vmm::Mark;
use rustix::event::{PollFd, PollFlags};

use super::{SessionError, StreamKind, Streams};
use crate::patience::Patience;
use crate::timestamp::now_us;

/// Bytes that a pump moves at once.
const PUMP_BYTES: usize = 128 << 10;

/// All pumps of one process.
#[derive(Debug)]
pub(crate) struct Pumps {
    stdin: Option<File>,
    stdout: Option<File>,
    stderr: Option<File>,
    outputs: Vec<Output>,
    /// CLOCK_MONOTONIC of the first byte of any output, µs; 0 before it.
    first: Arc<AtomicU64>,
    patience: Patience,
}

impl Pumps {
    pub(crate) fn new(streams: Streams, patience: Patience) -> Self {
        let Streams { stdin, stdout, stderr } = streams;
        let first = Arc::default();
        Self { stdin, stdout: Some(stdout), stderr: Some(stderr), outputs: Vec::new(), first, patience }
    }

    pub(crate) fn connect(&mut self, stream: StreamKind, socket: UnixStream) -> Result<(), SessionError> {
        socket.set_nonblocking(false).map_err(SessionError::Streams)?;
        let output = match stream {
            StreamKind::Stdin => {
                if let Some(stdin) = self.stdin.take() {
                    // Not joined: it may wait for a terminal when all else is over, and ends with this process.
                    spawn("stdin", move || to_guest(stdin, socket))?;
                }
                return Ok(());
            }
            StreamKind::Stdout => self.stdout.take(),
            StreamKind::Stderr => self.stderr.take(),
            StreamKind::Response | StreamKind::Returned => None,
        };
        if let Some(output) = output {
            self.outputs.push(Output::begin(stream, socket, output, &self.first)?);
        }
        Ok(())
    }

    /// The process goes on, and its streams elsewhere. Waits until what had come by now was written; here they may be connected once more.
    pub(crate) fn release(&mut self) -> Vec<(StreamKind, UnixStream)> {
        let outputs = std::mem::take(&mut self.outputs);
        outputs.into_iter().map(|output| output.release(self)).collect()
    }

    /// The file of an output whose pump has ended.
    fn put_back(&mut self, stream: StreamKind, file: File) {
        match stream {
            StreamKind::Stdout => self.stdout = Some(file),
            StreamKind::Stderr => self.stderr = Some(file),
            StreamKind::Stdin | StreamKind::Response | StreamKind::Returned => {}
        }
    }

    /// When the first output came, if any has.
    pub(crate) fn first_output(&self) -> Option<Mark> {
        let at_us = self.first.load(Ordering::Relaxed);
        (at_us > 0).then(|| Mark { done: "first output".into(), at_us })
    }

    /// The process ended. Waits until all of its output was written, or nobody reads it, or the guest has been silent for too long.
    pub(crate) fn drain(&mut self) {
        let silence = self.patience.identify();
        self.outputs.drain(..).for_each(|output| output.drain(silence));
    }

    /// The room ended. Waits until what had come by now was written, or nobody reads it.
    pub(crate) fn end(&mut self) {
        for output in &self.outputs {
            output.cut();
        }
        self.outputs.drain(..).for_each(Output::join);
    }
}

/// A thread that moves a stream's bytes out of the guest.
#[derive(Debug)]
struct Output {
    stream: StreamKind,
    /// Gives the file back.
    thread: JoinHandle<File>,
    socket: UnixStream,
    /// Closed to have the pump end where nothing more has come.
    release: PipeWriter,
    /// Counts every end of a read and of a write: even while the pump waits for the guest.
    turns: Arc<AtomicU64>,
    /// Closed when the pump is done.
    done: Receiver<()>,
}

impl Output {
    fn begin(
        stream: StreamKind,
        socket: UnixStream,
        to: File,
        first: &Arc<AtomicU64>,
    ) -> Result<Self, SessionError> {
        let first = Arc::clone(first);
        let (turns, (alive, done)) = (Arc::<AtomicU64>::default(), channel());
        let from = socket.try_clone().map_err(SessionError::Streams)?;
        let (released, release) = io::pipe().map_err(SessionError::Streams)?;
        let from = Source { socket: from, released };
        let counted = Arc::clone(&turns);
        let thread = spawn("output", move || from_guest(from, to, &counted, &first, alive))?;
        Ok(Self { stream, thread, socket, release, turns, done })
    }

    fn drain(self, silence: Duration) {
        loop {
            let before = self.turns.load(Ordering::Relaxed);
            match self.done.recv_timeout(silence) {
                Err(RecvTimeoutError::Timeout) => {
                    if before.is_multiple_of(2) && before == self.turns.load(Ordering::Relaxed) {
                        tracing::debug!("the guest holds a stream open that has nothing more to say");
                        self.cut();
                    }
                }
                Ok(()) | Err(RecvTimeoutError::Disconnected) => return self.join(),
            }
        }
    }

    /// What is in the socket can still be read (unix(7)); then comes its end, whoever holds the other one open.
    fn cut(&self) {
        let _ = self.socket.shutdown(Shutdown::Read);
    }

    fn join(self) {
        let _ = self.thread.join();
    }

    fn release(self, pumps: &mut Pumps) -> (StreamKind, UnixStream) {
        drop(self.release);
        if let Ok(file) = self.thread.join() {
            pumps.put_back(self.stream, file);
        }
        (self.stream, self.socket)
    }
}

fn spawn<T: Send + 'static>(
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>, SessionError> {
    thread::Builder::new().name(name.into()).spawn(body).map_err(SessionError::Streams)
}

fn to_guest(mut from: File, mut to: UnixStream) {
    let mut buffer = vec![0; PUMP_BYTES];
    while let Some(bytes) = read(&mut from, &mut buffer) {
        if to.write_all(bytes).is_err() {
            return;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

/// What a guest writes, until it is released.
struct Source {
    socket: UnixStream,
    released: PipeReader,
}

impl Source {
    /// The next bytes; `None` at the end, or when it is released and nothing more has come.
    fn next<'a>(&mut self, buffer: &'a mut [u8]) -> Option<&'a [u8]> {
        loop {
            let mut sources =
                [PollFd::new(&self.socket, PollFlags::IN), PollFd::new(&self.released, PollFlags::IN)];
            match rustix::event::poll(&mut sources, None) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(_) => return None,
            }
            let [came, released] = sources.map(|source| !source.revents().is_empty());
            if came {
                return read(&mut self.socket, buffer);
            }
            if released {
                return None;
            }
        }
    }
}

/// `_alive` is dropped at its end, whatever that is.
fn from_guest(
    mut from: Source,
    mut to: File,
    turns: &AtomicU64,
    first: &AtomicU64,
    _alive: Sender<()>,
) -> File {
    let mut buffer = vec![0; PUMP_BYTES];
    while let Some(bytes) = from.next(&mut buffer) {
        if turns.fetch_add(1, Ordering::Relaxed) == 0 {
            let _ = first.compare_exchange(0, now_us(), Ordering::Relaxed, Ordering::Relaxed);
        }
        if to.write_all(bytes).is_err() {
            // Nobody reads any more: the guest's writer gets EPIPE.
            let _ = from.socket.shutdown(Shutdown::Both);
            return to;
        }
        turns.fetch_add(1, Ordering::Relaxed);
    }
    to
}

/// The next bytes; `None` at the end or after an error, which to a stream is the same.
fn read<'a>(from: &mut impl Read, buffer: &'a mut [u8]) -> Option<&'a [u8]> {
    loop {
        match from.read(buffer) {
            Ok(0) => return None,
            Ok(n) => return buffer.get(..n),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;

    fn output() -> (UnixStream, Output, std::io::PipeReader) {
        let (guest, ours) = UnixStream::pair().unwrap();
        let (read, write) = std::io::pipe().unwrap();
        let to = OwnedFd::from(write).into();
        (guest, Output::begin(StreamKind::Stdout, ours, to, &Arc::default()).unwrap(), read)
    }

    #[test]
    fn an_end_that_the_guest_holds_open_is_not_waited_for() {
        let (mut guest, output, mut read) = output();
        guest.write_all(b"said").unwrap();
        output.drain(Duration::from_millis(50));
        let mut said = String::new();
        read.read_to_string(&mut said).unwrap();
        assert_eq!(said, "said");
        assert!(guest.write_all(b"more").is_err(), "nobody listens to it any more");
    }

    #[test]
    fn a_slow_reader_is_waited_for_and_loses_nothing() {
        let (mut guest, output, mut read) = output();
        const MANY: usize = 1 << 20;
        let writer = thread::spawn(move || guest.write_all(&vec![b'x'; MANY]).unwrap());
        let reader = thread::spawn(move || {
            thread::sleep(Duration::from_millis(2500));
            let mut all = Vec::new();
            read.read_to_end(&mut all).unwrap();
            all.len()
        });
        // Time enough for the writer to be let run, on whatever machine.
        output.drain(Duration::from_secs(1));
        writer.join().unwrap();
        assert_eq!(reader.join().unwrap(), MANY);
    }

    #[test]
    fn streams_that_are_released_lose_nothing_and_can_be_gone_on_with() {
        let (mut guest, ours) = UnixStream::pair().unwrap();
        let (mut read, write) = std::io::pipe().unwrap();
        let (nowhere, _) = std::io::pipe().unwrap();
        let [stdout, stderr] = [OwnedFd::from(write), OwnedFd::from(nowhere)].map(File::from);
        let mut pumps = Pumps::new(Streams { stdin: None, stdout, stderr }, Patience::default());
        pumps.connect(StreamKind::Stdout, ours).unwrap();
        for said in ["first", "second"] {
            guest.write_all(said.as_bytes()).unwrap();
            let mut released = pumps.release();
            let mut came = vec![0; said.len()];
            read.read_exact(&mut came).unwrap();
            assert_eq!(came, said.as_bytes());
            let (stream, socket) = released.pop().unwrap();
            assert_eq!((stream, released.len()), (StreamKind::Stdout, 0));
            pumps.connect(stream, socket).unwrap();
        }
        drop(guest);
        pumps.drain();
        assert_eq!(read.read_to_end(&mut Vec::new()).unwrap(), 0);
    }

    #[test]
    fn what_is_in_the_socket_at_the_rooms_end_is_written() {
        let (mut guest, output, mut read) = output();
        // More than the pipe holds, so that some of it is in the socket still.
        guest.write_all(&vec![b'x'; 100 << 10]).unwrap();
        output.cut();
        let reader = thread::spawn(move || {
            let mut all = Vec::new();
            read.read_to_end(&mut all).unwrap();
            all.len()
        });
        output.join();
        assert_eq!(reader.join().unwrap(), 100 << 10);
        drop(guest);
    }
}
