//! Standard streams: what stands between a process's pipes or terminal and its vsock connections. Bytes are copied without
//! being looked at.
//!
//! ```text
//!  host ══ stdin ══▶ input  ──▶ pipe ──▶ process        end of connection ⇒ end of file
//!                                                        the process closes it ⇒ the host's writes fail
//!  host ◀═ stdout ══ output ◀── pipe ◀── process        end of file ⇒ half-close
//!                                                        the host closes it ⇒ EPIPE
//! ```
//!
//! Connections don't outlive a snapshot, pipes do. So each stream can be parted from its connection, the process being frozen, and
//! joined with another one later. What is in the pipe then waits there; what was taken from the connection and didn't fit waits here.
//!
//! ```text
//!  joined ─Still─▶ still: an output's pipe is empty, all of it sent ─Part─▶ parted ─Join─▶ joined
//!    ▲                                 │ GoOn
//!    └─────────────────────────────────┘
//! ```

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use carrel_protocol::agent::{Stdio, Stream, TerminalSize};
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, spawn_local};

use crate::container::supervise;
use crate::socket::{Dialler, Socket};

/// Copied at once, and what a pipe holds.
const CHUNK: usize = 256 << 10;
/// How long a process that ended may keep its output open in the hands of others, once nothing more comes.
const GRACE: Duration = Duration::from_millis(250);

/// The connections of a process's streams.
#[derive(Debug, Default)]
pub(crate) struct Connections([Option<Socket>; 3]);

/// The agent's ends of a process's pipes.
#[derive(Debug, Default)]
pub(crate) struct Pipes([Option<OwnedFd>; 3]);

/// A process's streams at work.
#[derive(Debug)]
pub(crate) struct Pumps {
    /// Standard input, output and error, those that there are.
    pumps: [Option<Pump>; 3],
    ended: watch::Sender<bool>,
    terminal: Option<Rc<Socket>>,
    /// Connections were parted from, and no others joined yet.
    parted: Cell<bool>,
}

/// One stream's task.
#[derive(Debug)]
struct Pump {
    task: RefCell<Option<JoinHandle<()>>>,
    orders: mpsc::UnboundedSender<Order>,
}

/// What a stream's task is told.
#[derive(Debug)]
enum Order {
    /// Move nothing any more, once what was written so far has been sent; say so.
    Still(oneshot::Sender<()>),
    /// As before `Still`.
    GoOn,
    /// Close the connection; say so.
    Part(oneshot::Sender<()>),
    /// Go on with another connection; without one with nothing.
    Join(Option<Socket>),
}

impl Pipes {
    /// One for each stream that the request names, and the process's ends of them. None for a terminal.
    ///
    /// # Errors
    ///
    /// No more descriptors.
    pub(crate) fn new(stdio: &Stdio) -> io::Result<(Self, [Option<OwnedFd>; 3])> {
        let (mut ours, mut theirs) = ([None, None, None], [None, None, None]);
        if stdio.terminal.is_some() {
            return Ok((Self(ours), theirs));
        }
        if stdio.stdin.is_some() {
            let (reader, writer) = pipe()?;
            (ours[0], theirs[0]) = (Some(writer), Some(reader));
        }
        for (number, stream) in [(1, &stdio.stdout), (2, &stdio.stderr)] {
            if let (Some(_), Some(ours), Some(theirs)) =
                (stream, ours.get_mut(number), theirs.get_mut(number))
            {
                let (reader, writer) = pipe()?;
                (*ours, *theirs) = (Some(reader), Some(writer));
            }
        }
        Ok((Self(ours), theirs))
    }
}

impl Connections {
    /// Dials what the request names.
    ///
    /// # Errors
    ///
    /// The host doesn't answer.
    pub(crate) async fn dial(dialler: &Dialler, stdio: &Stdio) -> io::Result<Self> {
        let open = async |stream: &Option<Stream>| match stream {
            Some(stream) => dialler.open(stream).await.map(Some),
            None => Ok(None),
        };
        // At once: a connection is a round trip to the host.
        let (stdin, stdout, stderr) =
            tokio::try_join!(open(&stdio.stdin), open(&stdio.stdout), open(&stdio.stderr))?;
        Ok(Self([stdin, stdout, stderr]))
    }

    /// Joins each with its pipe.
    ///
    /// # Errors
    ///
    /// A pipe can't be waited for.
    pub(crate) fn through_pipes(self, pipes: Pipes) -> io::Result<Pumps> {
        let Self([stdin, stdout, stderr]) = self;
        let Pipes([input, output, errors]) = pipes;
        let mut pumps = Pumps::new(None);
        if let (Some(host), Some(writer)) = (stdin, input) {
            pumps.add_input(host, Rc::new(Socket::new(writer)?));
        }
        for (number, host, reader) in [(1, stdout, output), (2, stderr, errors)] {
            if let (Some(host), Some(reader)) = (host, reader) {
                pumps.add_output(number, host, Rc::new(Socket::new(reader)?));
            }
        }
        Ok(pumps)
    }

    /// Joins standard input and output with a terminal's master.
    ///
    /// # Errors
    ///
    /// The descriptor can't be waited for.
    pub(crate) fn through_terminal(self, master: OwnedFd) -> io::Result<Pumps> {
        let Self([stdin, stdout, _]) = self;
        let master = Rc::new(Socket::new(master)?);
        let mut pumps = Pumps::new(Some(Rc::clone(&master)));
        if let Some(host) = stdin {
            pumps.add_input(host, Rc::clone(&master));
        }
        if let Some(host) = stdout {
            pumps.add_output(1, host, master);
        }
        Ok(pumps)
    }
}

impl Pumps {
    fn new(terminal: Option<Rc<Socket>>) -> Self {
        Self { pumps: [None, None, None], ended: watch::channel(false).0, terminal, parted: false.into() }
    }

    fn add_input(&mut self, host: Socket, process: Rc<Socket>) {
        let (orders, told) = mpsc::unbounded_channel();
        let task = RefCell::new(Some(spawn_local(input(host, process, told))));
        self.pumps[0] = Some(Pump { task, orders });
    }

    fn add_output(&mut self, number: usize, host: Socket, process: Rc<Socket>) {
        let (orders, told) = mpsc::unbounded_channel();
        let task = spawn_local(output(process, host, told, self.ended.subscribe()));
        if let Some(pump) = self.pumps.get_mut(number) {
            *pump = Some(Pump { task: Some(task).into(), orders });
        }
    }

    /// Sets the terminal's size. Without a terminal nothing happens.
    pub(crate) fn resize(&self, size: TerminalSize) {
        if let Some(terminal) = &self.terminal {
            // It may have ended by now.
            let _ = supervise::resize(terminal.as_fd(), size);
        }
    }

    pub(crate) fn has_terminal(&self) -> bool {
        self.terminal.is_some()
    }

    /// The process is frozen: returns once all that it wrote has been sent, and nothing moves any more. Dropped before, or followed by
    /// [`Pumps::go_on`], it changes nothing.
    pub(crate) async fn still(&self) {
        self.have_done(Order::Still).await;
    }

    /// After [`Pumps::still`]: as before.
    pub(crate) fn go_on(&self) {
        for pump in self.pumps.iter().flatten() {
            let _ = pump.orders.send(Order::GoOn);
        }
    }

    /// After [`Pumps::still`]: closes the connections. Returns once they are.
    pub(crate) async fn part(&self) {
        self.have_done(Order::Part).await;
        self.parted.set(true);
    }

    async fn have_done(&self, order: impl Fn(oneshot::Sender<()>) -> Order) {
        for pump in self.pumps.iter().flatten() {
            let (done, waiting) = oneshot::channel();
            // A stream that is over has nothing to do; its end of the channel is gone.
            if pump.orders.send(order(done)).is_ok() {
                let _ = waiting.await;
            }
        }
    }

    /// Whether it waits for [`Pumps::join`].
    pub(crate) fn is_parted(&self) -> bool {
        self.parted.get()
    }

    /// After [`Pumps::part`]: goes on with these connections. One for a stream that there isn't, or that is over, is closed.
    pub(crate) fn join(&self, connections: Connections) {
        self.parted.set(false);
        for (pump, connection) in self.pumps.iter().zip(connections.0) {
            if let Some(pump) = pump {
                let _ = pump.orders.send(Order::Join(connection));
            }
        }
    }

    /// The process is gone: stops its input, waits until all of its output has been sent.
    pub(crate) async fn finish(&self) {
        let [input, outputs @ ..] = &self.pumps;
        if let Some(input) = input.as_ref().and_then(|input| input.task.take()) {
            input.abort();
        }
        self.ended.send_replace(true);
        for output in outputs.iter().flatten() {
            let task = output.task.take();
            if let Some(task) = task {
                let _ = task.await;
            }
        }
    }
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    // A smaller one works as well.
    let _ = fcntl_setpipe_size(&writer, CHUNK);
    Ok((reader, writer))
}

/// What follows standing still.
enum After {
    /// As before.
    GoOn,
    /// With this connection, or with nothing.
    Joined(Option<Socket>),
    /// Nobody is there any more to say so.
    Over,
}

/// Stands still. `part` closes the connection.
async fn still(orders: &mut mpsc::UnboundedReceiver<Order>, mut part: impl FnMut()) -> After {
    let mut parted = false;
    while let Some(order) = orders.recv().await {
        match order {
            Order::GoOn if !parted => return After::GoOn,
            Order::Join(host) if parted => return After::Joined(host),
            Order::Part(done) => {
                part();
                parted = true;
                let _ = done.send(());
            }
            // Frozen again before anybody asked for the streams.
            Order::Still(done) => drop(done.send(())),
            Order::GoOn | Order::Join(_) => {}
        }
    }
    After::Over
}

/// What moved last.
enum Moved {
    /// From the host, or its end.
    In(io::Result<usize>),
    /// To the process.
    Out(io::Result<usize>),
    Told(Order),
}

async fn input(host: Socket, process: Rc<Socket>, mut orders: mpsc::UnboundedReceiver<Order>) {
    let mut host = Some(host);
    let mut chunk = vec![0; CHUNK];
    // What of the chunk the process hasn't got yet.
    let mut left = 0..0;
    loop {
        let moving = async {
            match chunk.get(left.clone()) {
                Some(rest @ [_, ..]) => Moved::Out(process.write_some(rest).await),
                Some([]) | None => Moved::In(receive(host.as_ref(), &mut chunk).await),
            }
        };
        let moved = tokio::select! {
            biased;
            Some(order) = orders.recv() => Moved::Told(order),
            moved = moving => moved,
        };
        match moved {
            Moved::In(Ok(read @ 1..)) => left = 0..read,
            Moved::In(Ok(_) | Err(_)) => return,
            Moved::Out(Ok(written)) => left.start += written,
            Moved::Out(Err(_)) => {
                // It doesn't read any more: neither do we.
                if let Some(host) = &host {
                    host.refuse();
                }
                return;
            }
            Moved::Told(Order::Still(done)) => {
                if done.send(()).is_ok() {
                    match still(&mut orders, || drop(host.take())).await {
                        After::GoOn => {}
                        After::Joined(joined) => host = joined,
                        After::Over => return,
                    }
                }
            }
            // Of a freezing that was given up.
            Moved::Told(Order::GoOn | Order::Part(_) | Order::Join(_)) => {}
        }
        tokio::task::consume_budget().await;
    }
}

/// Without a connection there is nothing more.
async fn receive(host: Option<&Socket>, into: &mut [u8]) -> io::Result<usize> {
    match host {
        Some(host) => host.read(into).await,
        None => Ok(0),
    }
}

async fn output(
    process: Rc<Socket>,
    host: Socket,
    mut orders: mpsc::UnboundedReceiver<Order>,
    mut ended: watch::Receiver<bool>,
) {
    let mut host = Some(host);
    let mut chunk = vec![0; CHUNK];
    let mut stop: Option<oneshot::Sender<()>> = None;
    loop {
        let over = *ended.borrow_and_update();
        let read = if stop.is_some() {
            process.read_now(&mut chunk)
        } else if over {
            tokio::time::timeout(GRACE, process.read(&mut chunk)).await.unwrap_or(Ok(0)).map(Some)
        } else {
            tokio::select! {
                biased;
                Some(order) = orders.recv() => {
                    if let Order::Still(done) = order {
                        stop = Some(done);
                    }
                    continue;
                }
                read = process.read(&mut chunk) => read.map(Some),
                _ = ended.changed() => continue,
            }
        };
        let read = match read {
            Ok(Some(read @ 1..)) => read,
            // A terminal that nobody has open any more gives EIO.
            Ok(Some(_)) | Err(_) => break,
            Ok(None) => {
                // Nobody waits for it any more: it was given up.
                if stop.take().is_none_or(|done| done.send(()).is_err()) {
                    continue;
                }
                let part = || {
                    if let Some(host) = host.take() {
                        host.finish();
                    }
                };
                match still(&mut orders, part).await {
                    After::GoOn => {}
                    After::Joined(joined) => host = joined,
                    After::Over => return,
                }
                continue;
            }
        };
        if let Some(host) = &host
            && host.write(chunk.get(..read).unwrap_or_default()).await.is_err()
        {
            break;
        }
        tokio::task::consume_budget().await;
    }
    if let Some(host) = host {
        host.finish();
    }
}

#[cfg(test)]
mod tests;
