//! Progress: how a pull tells its caller how far it is, and the bars that a terminal shows of it.
//!
//! ```text
//!   Progress::started ─▶ Transfer: advanced* ─┬─▶ finished
//!                            ▲                └─▶ dropped (failed)
//!                            └── restarted: what had come was worth nothing
//! ```

use std::io::IsTerminal;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// Told about every blob that is brought into the store; not about those that were there.
pub trait Progress: Sync {
    /// A blob begins. `total` is its size in bytes.
    fn started(&self, what: &str, total: u64) -> Box<dyn Transfer>;
}

/// One blob on its way.
pub trait Transfer: Send {
    /// So many more bytes have come.
    fn advanced(&self, bytes: u64);
    /// It begins again from its first byte.
    fn restarted(&self);
    /// It is in the store, verified.
    fn finished(&self);
}

/// Says nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quiet;

impl Progress for Quiet {
    fn started(&self, _what: &str, _total: u64) -> Box<dyn Transfer> {
        Box::new(Self)
    }
}

impl Transfer for Quiet {
    fn advanced(&self, _bytes: u64) {}
    fn restarted(&self) {}
    fn finished(&self) {}
}

/// A bar for each blob on standard error.
pub struct Bars {
    bars: MultiProgress,
    style: ProgressStyle,
}

impl Bars {
    /// Bars if standard error is a terminal, and nothing at all if not: logs and pipes get no control characters.
    #[must_use]
    pub fn stderr() -> Box<dyn Progress> {
        if !std::io::stderr().is_terminal() {
            return Box::new(Quiet);
        }
        // A template that doesn't parse would be ours; indicatif's own bar is then good enough.
        let style = ProgressStyle::with_template(
            "{prefix:14} {bar:30} {bytes:>10}/{total_bytes:10} {bytes_per_sec:>12} {eta}",
        )
        .unwrap_or_else(|_| ProgressStyle::default_bar());
        Box::new(Self { bars: MultiProgress::new(), style })
    }
}

impl std::fmt::Debug for Bars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bars").finish_non_exhaustive()
    }
}

impl Progress for Bars {
    fn started(&self, what: &str, total: u64) -> Box<dyn Transfer> {
        let bar = self.bars.add(ProgressBar::new(total).with_style(self.style.clone()));
        bar.set_prefix(what.to_owned());
        Box::new(Bar(bar))
    }
}

struct Bar(ProgressBar);

impl Transfer for Bar {
    fn advanced(&self, bytes: u64) {
        self.0.inc(bytes);
    }

    fn restarted(&self) {
        self.0.set_position(0);
    }

    fn finished(&self) {
        self.0.finish_and_clear();
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
