//! Signals and window sizes, forwarded to a process in a room while it runs.

use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use carrel_host::session::Remote;
use signal_hook::consts::{SIGHUP, SIGINT, SIGKILL, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
use signal_hook::iterator::{Handle, Signals};

use crate::terminal;

/// A user who insists: so many INTs or TERMs within this time mean SIGKILL.
const INSISTS: usize = 3;
const WITHIN: Duration = Duration::from_secs(3);

/// Signals go to the room for as long as this lives.
pub(crate) struct Forwarding {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

impl Forwarding {
    /// Begins. With a terminal, its size is told at once and whenever it changes.
    pub(crate) fn begin(remote: Remote, has_terminal: bool) -> Result<Self> {
        let cannot = "Signals can't be received.";
        let mut signals =
            Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2]).context(cannot)?;
        if has_terminal {
            signals.add_signal(SIGWINCH).context(cannot)?;
        }
        let handle = signals.handle();
        if has_terminal {
            // Whatever changed since it was looked at first; from here on nothing is missed.
            let told = remote.resize(terminal::size());
            told.unwrap_or_else(|error| tracing::debug!(%error, "the terminal's size was not told"));
        }
        let thread = thread::Builder::new()
            .name("signals".into())
            .spawn(move || forward(&mut signals, &remote))
            .context("A thread can't be started.")?;
        Ok(Self { handle, thread: Some(thread) })
    }
}

/// A room that is gone takes no signals; whoever serves its session hears of its end.
fn forward(signals: &mut Signals, remote: &Remote) {
    let mut insisted: Vec<Instant> = Vec::new();
    for signal in signals.forever() {
        let sent = match signal {
            SIGWINCH => remote.resize(terminal::size()),
            SIGINT | SIGTERM => {
                let now = Instant::now();
                insisted.retain(|then| now.duration_since(*then) <= WITHIN);
                insisted.push(now);
                let signal = if insisted.len() >= INSISTS { SIGKILL } else { signal };
                remote.signal(u8::try_from(signal).unwrap_or(0))
            }
            other => remote.signal(u8::try_from(other).unwrap_or(0)),
        };
        if let Err(error) = sent {
            tracing::debug!(%error, signal, "a signal was not forwarded");
        }
    }
}

impl Drop for Forwarding {
    fn drop(&mut self) {
        self.handle.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
