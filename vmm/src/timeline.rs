//! What happened when in a start, in µs of CLOCK_MONOTONIC, so that the owner can lay it beside its own marks.

use std::time::Duration;

use carrel_protocol::vmm::Mark;

/// The marks so far.
#[derive(Debug, Default)]
pub struct Timeline(Vec<Mark>);

impl Timeline {
    /// Notes that something was just done.
    pub fn mark(&mut self, done: &str) {
        self.0.push(Mark { done: done.to_owned(), at_us: now_us() });
    }

    /// All marks, in order; none are left.
    pub fn take(&mut self) -> Vec<Mark> {
        std::mem::take(&mut self.0)
    }
}

/// CLOCK_MONOTONIC, µs.
pub fn now_us() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is valid for the write, and CLOCK_MONOTONIC exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let since = Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0));
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}
