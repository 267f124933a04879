//! Standard streams: what stands between a process's pipes or terminal and its vsock connections. Bytes are copied without
//! being looked at.
//!
//! ```text
//!  host ══ stdin ══▶ input  ──▶ pipe ──▶ process        end of connection ⇒ end of file
//!                                                        the process closes it ⇒ the host's writes fail
//!  host ◀═ stdout ══ output ◀── pipe ◀── process        end of file ⇒ half-close
//!                                                        the host closes it ⇒ EPIPE
//! ```

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use carrel_protocol::agent::{Stdio, TerminalSize};
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use tokio::sync::watch;
use tokio::task::{JoinHandle, spawn_local};

use crate::container::supervise;
use crate::socket::{Dialler, Socket};

/// Copied at once, and what a pipe holds.
const CHUNK: usize = 256 << 10;
/// How long a process that ended may keep its output open in the hands of others, once nothing more comes.
const GRACE: Duration = Duration::from_millis(250);

/// The connections of a process's streams.
#[derive(Debug)]
pub(crate) struct Connections([Option<Socket>; 3]);

/// A process's streams at work.
#[derive(Debug)]
pub(crate) struct Pumps {
    input: Option<JoinHandle<()>>,
    outputs: Vec<JoinHandle<()>>,
    ended: watch::Sender<bool>,
    terminal: Option<Rc<Socket>>,
}

impl Connections {
    /// Dials what the request names.
    ///
    /// # Errors
    ///
    /// The host doesn't answer.
    pub(crate) async fn dial(dialler: &Dialler, stdio: &Stdio) -> io::Result<Self> {
        let mut connections = [None, None, None];
        for (connection, stream) in connections.iter_mut().zip([&stdio.stdin, &stdio.stdout, &stdio.stderr]) {
            if let Some(stream) = stream {
                *connection = Some(dialler.open(stream).await?);
            }
        }
        Ok(Self(connections))
    }

    /// Joins each with a pipe. Returns the process's ends.
    ///
    /// # Errors
    ///
    /// No more descriptors.
    pub(crate) fn through_pipes(self) -> io::Result<(Pumps, [Option<OwnedFd>; 3])> {
        let Self([stdin, stdout, stderr]) = self;
        let mut pumps = Pumps::new(None);
        let mut ends = [None, None, None];
        if let Some(host) = stdin {
            let (reader, writer) = pipe()?;
            ends[0] = Some(reader);
            pumps.input = Some(spawn_local(input(host, Rc::new(Socket::new(writer)?))));
        }
        for (end, host) in ends.iter_mut().skip(1).zip([stdout, stderr]) {
            if let Some(host) = host {
                let (reader, writer) = pipe()?;
                *end = Some(writer);
                let reader = Rc::new(Socket::new(reader)?);
                pumps.outputs.push(spawn_local(output(reader, host, pumps.ended.subscribe())));
            }
        }
        Ok((pumps, ends))
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
        pumps.input = stdin.map(|host| spawn_local(input(host, Rc::clone(&master))));
        pumps.outputs.extend(stdout.map(|host| spawn_local(output(master, host, pumps.ended.subscribe()))));
        Ok(pumps)
    }
}

impl Pumps {
    fn new(terminal: Option<Rc<Socket>>) -> Self {
        Self { input: None, outputs: Vec::new(), ended: watch::channel(false).0, terminal }
    }

    /// Sets the terminal's size. Without a terminal nothing happens.
    pub(crate) fn resize(&self, size: TerminalSize) {
        if let Some(terminal) = &self.terminal {
            // It may have ended by now.
            let _ = supervise::resize(terminal.as_fd(), size);
        }
    }

    /// The process is gone: stops its input, waits until all of its output has been sent.
    pub(crate) async fn finish(&mut self) {
        if let Some(input) = self.input.take() {
            input.abort();
        }
        self.ended.send_replace(true);
        for output in self.outputs.drain(..) {
            let _ = output.await;
        }
    }
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    // A smaller one works as well.
    let _ = fcntl_setpipe_size(&writer, CHUNK);
    Ok((reader, writer))
}

async fn input(host: Socket, process: Rc<Socket>) {
    let mut chunk = vec![0; CHUNK];
    loop {
        match host.read(&mut chunk).await {
            Ok(0) | Err(_) => return,
            Ok(read) => {
                if process.write(chunk.get(..read).unwrap_or_default()).await.is_err() {
                    // It doesn't read any more: neither do we.
                    host.refuse();
                    return;
                }
            }
        }
        tokio::task::consume_budget().await;
    }
}

async fn output(process: Rc<Socket>, host: Socket, mut ended: watch::Receiver<bool>) {
    let mut chunk = vec![0; CHUNK];
    loop {
        let over = *ended.borrow_and_update();
        let read = if over {
            tokio::time::timeout(GRACE, process.read(&mut chunk)).await.unwrap_or(Ok(0))
        } else {
            tokio::select! {
                biased;
                read = process.read(&mut chunk) => read,
                _ = ended.changed() => continue,
            }
        };
        // A terminal that nobody has open any more gives EIO.
        let Ok(read @ 1..) = read else { break };
        if host.write(chunk.get(..read).unwrap_or_default()).await.is_err() {
            break;
        }
        tokio::task::consume_budget().await;
    }
    host.finish();
}

#[cfg(test)]
mod tests;
