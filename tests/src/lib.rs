//! What the whole-system tests stand on: the `carrel` command, run as a user runs it, and a look at what it leaves behind.
//!
//! ```text
//!   Carrel::new ──▶ notes what is there ──▶ run, start, … ──▶ drop: nothing more is there than before
//!        └── waits for its turn: tests share one host, and a leftover must have one culprit
//! ```
//!
//! The program is `$CARREL_BIN`, else `carrel` on the PATH. Each [`Carrel`] has a home of its own below `$CARREL_TEST_DIR`
//! (without it on the store's disk, where there is one, else in the system's temporary folder), and shares a store there with the other tests
//! of its run, `$CARREL_TEST_RUN` (without it, of its program): so most rooms begin as clones of what an earlier test made. With `$CARREL_TEST_COLD` all boot.
//! `$CARREL_TEST_TIMES` names a file that gets each test's seconds and name. Nothing here sleeps for a result: it polls, with a
//! deadline that fits an emulated machine; `$CARREL_TEST_PATIENCE` multiplies it.

// A test's harness fails by panicking; that is what a test's failure is.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod carrel;
pub mod chance;
pub mod evidence;
pub mod fixtures;
pub mod functions;
pub mod initramfs;
pub mod layout;
pub mod leftovers;
pub mod machine;
pub mod mounted;
pub mod processes;
pub mod pty;
pub mod registry;

pub use carrel::{Carrel, Done, Running, binary};

use std::time::{Duration, Instant};

/// How long anything may take before a test gives up on it.
pub fn patience() -> Duration {
    let factor = std::env::var("CARREL_TEST_PATIENCE").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    Duration::from_secs(300) * factor
}

/// How often something is done: `often`, or so much of `soak` as `scripts/test --soak` asks for, in percent (`CARREL_TEST_SOAK`).
pub fn times(often: usize, soak: usize) -> usize {
    let percent = std::env::var("CARREL_TEST_SOAK").ok();
    let percent = percent.map(|text| text.parse::<usize>().expect("CARREL_TEST_SOAK is a number of percent"));
    percent.map_or(often, |percent| often.max(soak * percent / 100))
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
