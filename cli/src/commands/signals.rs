//! Signals and window sizes, forwarded to a process in a room while it runs.

use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use carrel_host::session::Remote;
use signal_hook::consts::{
    SIGALRM, SIGCONT, SIGHUP, SIGINT, SIGIO, SIGKILL, SIGPROF, SIGQUIT, SIGTERM, SIGTSTP, SIGUSR1, SIGUSR2,
    SIGVTALRM, SIGWINCH, SIGXCPU, SIGXFSZ,
};
use signal_hook::iterator::{Handle, Signals};

use crate::terminal;

/// A user who insists: so many INTs or TERMs within this time mean SIGKILL.
const INSISTS: usize = 3;
const WITHIN: Duration = Duration::from_secs(3);

/// What is forwarded beside the real-time signals: all that Docker forwards, but for those that a fault of carrel's own raises (ILL, TRAP, ABRT, BUS,
/// FPE, SEGV, SYS, STKFLT) and those by which a shell stops carrel's use of its terminal (TTIN, TTOU). CHLD, PIPE and URG have meanings here.
const FORWARDED: [i32; 16] = [
    SIGHUP, SIGINT, SIGQUIT, SIGUSR1, SIGUSR2, SIGALRM, SIGTERM, SIGCONT, SIGTSTP, SIGXCPU, SIGXFSZ,
    SIGVTALRM, SIGPROF, SIGWINCH, SIGIO, SIGPWR,
];
/// Which the library has no name for; signal(7).
const SIGPWR: i32 = 30;
/// Those that the C library leaves to programs.
const REAL_TIME: std::ops::RangeInclusive<i32> = 34..=64;

/// Signals go to the room for as long as this lives.
pub(crate) struct Forwarding {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

impl Forwarding {
    /// Begins. With a terminal, its size is told at once and whenever it changes.
    pub(crate) fn begin(remote: Remote, has_terminal: bool) -> Result<Self> {
        let cannot = "Signals can't be received.";
        let mut signals = Signals::new(FORWARDED.into_iter().chain(REAL_TIME)).context(cannot)?;
        let handle = signals.handle();
        if has_terminal {
            // Whatever changed since it was looked at first; from here on nothing is missed.
            let told = remote.resize(terminal::size());
            told.unwrap_or_else(|error| tracing::debug!(%error, "the terminal's size was not told"));
        }
        let thread = thread::Builder::new()
            .name("signals".into())
            .spawn(move || forward(&mut signals, &remote, has_terminal))
            .context("A thread can't be started.")?;
        Ok(Self { handle, thread: Some(thread) })
    }
}

/// A room that is gone takes no signals; whoever serves its session hears of its end.
fn forward(signals: &mut Signals, remote: &Remote, has_terminal: bool) {
    let mut insisted: Vec<Instant> = Vec::new();
    for signal in signals.forever() {
        let sent = match signal {
            SIGWINCH if has_terminal => remote.resize(terminal::size()),
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

#[cfg(test)]
mod tests {
    use carrel_host::signal;

    use super::*;

    #[test]
    fn what_docker_forwards_is_forwarded_and_a_fault_of_our_own_is_not() {
        let forwarded = |name: &str| {
            let number = i32::from(signal::number(name).unwrap());
            FORWARDED.contains(&number) || REAL_TIME.contains(&number)
        };
        for name in
            ["HUP", "INT", "TERM", "ALRM", "CONT", "TSTP", "WINCH", "PWR", "IO", "RTMIN", "RTMIN+3", "RTMAX"]
        {
            assert!(forwarded(name), "{name}");
        }
        for name in [
            "KILL", "STOP", "SEGV", "BUS", "ILL", "FPE", "ABRT", "TRAP", "SYS", "CHLD", "PIPE", "TTIN",
            "TTOU",
        ] {
            assert!(!forwarded(name), "{name}");
        }
        // All of them can be had, which the library refuses for some.
        Signals::new(FORWARDED.into_iter().chain(REAL_TIME)).unwrap();
    }
}
