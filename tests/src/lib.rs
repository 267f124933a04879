//! What the whole-system tests stand on: the `carrel` command, run as a user runs it, and a look at what it leaves behind.
//!
//! ```text
//!   Carrel::new ──▶ notes what is there ──▶ run, start, … ──▶ drop: nothing more is there than before
//!        └── waits for its turn: tests share one host, and a leftover must have one culprit
//! ```
//!
//! The program is `$CARREL_BIN`, else `carrel` on the PATH. Each [`Carrel`] has a home of its own below `$CARREL_TEST_DIR`
//! (without it on the store's disk, where there is one, else in the system's temporary folder). Nothing here sleeps for a result: it polls, with a
//! deadline that fits an emulated machine; `$CARREL_TEST_PATIENCE` multiplies it.

// A test's harness fails by panicking; that is what a test's failure is.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod carrel;
pub mod evidence;
pub mod fixtures;
pub mod functions;
pub mod initramfs;
pub mod layout;
pub mod leftovers;
pub mod machine;
pub mod processes;
pub mod pty;
pub mod registry;

pub use carrel::{Carrel, Done, Running};

use std::time::{Duration, Instant};

/// How long anything may take before a test gives up on it.
pub fn patience() -> Duration {
    let factor = std::env::var("CARREL_TEST_PATIENCE").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    Duration::from_secs(120) * factor
}

/// Asks again and again until there is an answer; `what` names what was waited for in vain.
pub fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patience();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
