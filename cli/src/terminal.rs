//! The user's terminal in raw mode, and back again on every way out.
//!
//! ```text
//!   cooked ── Raw::enter ──▶ raw ── drop ──────────▶ cooked
//!                             ├─── panic hook ─────▶ cooked   (a panic aborts: no drop runs)
//!                             └─── process::exit ──▶ cooked   only through `drop`: main returns its status instead
//! ```
//!
//! Signals that would end carrel are forwarded to the workload while it runs, so none of them leaves the terminal raw.
//! SIGKILL does; `stty sane` or `reset` mends that, as with every program.

use std::io::{IsTerminal, stdin, stdout};
use std::sync::Arc;

use anyhow::{Context, Result};
use carrel_protocol::agent::TerminalSize;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// What a terminal is taken to be where it doesn't say, or where there is none.
pub(crate) const FALLBACK: TerminalSize = TerminalSize { rows: 24, columns: 80 };

/// Standard input is a terminal in raw mode for as long as this lives.
pub(crate) struct Raw {
    original: Arc<Termios>,
}

impl Raw {
    /// Puts standard input into raw mode: every key goes to the workload, Ctrl-C too.
    pub(crate) fn enter() -> Result<Self> {
        let original = tcgetattr(stdin()).context("The terminal's settings can't be read.")?;
        let mut raw = original.clone();
        raw.make_raw();
        let original = Arc::new(original);
        let for_panic = Arc::clone(&original);
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            restore(&for_panic);
            previous(panic);
        }));
        tcsetattr(stdin(), OptionalActions::Flush, &raw)
            .context("The terminal can't be put into raw mode.")?;
        Ok(Self { original })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore(&self.original);
    }
}

/// Without complaint: there is nobody left to tell when the terminal is gone.
fn restore(original: &Termios) {
    // Now, not Flush: what the user typed ahead belongs to the shell.
    let _ = tcsetattr(stdin(), OptionalActions::Now, original);
}

/// The size of the terminal that the user looks at.
pub(crate) fn size() -> TerminalSize {
    let size = tcgetwinsize(stdout()).or_else(|_| tcgetwinsize(stdin()));
    match size {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => {
            TerminalSize { rows: size.ws_row, columns: size.ws_col }
        }
        Ok(_) | Err(_) => FALLBACK,
    }
}

/// Whether standard input is a directory, from which nothing can be read.
pub(crate) fn stdin_is_directory() -> bool {
    rustix::fs::fstat(stdin()).is_ok_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir())
}

/// Whether keys come from a terminal.
pub(crate) fn stdin_is_terminal() -> bool {
    stdin().is_terminal()
}
