//! A thread that hears at once: what it waits for is read when it is there, and not when the scheduler comes round to it.
//!
//! On a host with one CPU the waker runs on until its slice is over, which is some milliseconds, in one cgroup others than in another: a clock that is stopped by whoever waits would measure
//! that. What such a thread starts is scheduled as ever.

use std::mem::zeroed;

use nix::libc::{SCHED_FIFO, SCHED_OTHER, SCHED_RESET_ON_FORK, sched_param, sched_setscheduler};

/// While it lives, this thread comes before all that are not in real time (sched(7)). Where that is not permitted nothing changes.
pub(crate) struct Prompt;

impl Prompt {
    /// From now on.
    pub(crate) fn now() -> Self {
        schedule(SCHED_FIFO | SCHED_RESET_ON_FORK, 1);
        Self
    }
}

impl Drop for Prompt {
    fn drop(&mut self) {
        schedule(SCHED_OTHER, 0);
    }
}

fn schedule(policy: i32, priority: i32) {
    // SAFETY: plain data of which zeros are a value.
    let mut parameters: sched_param = unsafe { zeroed() };
    parameters.sched_priority = priority;
    // SAFETY: 0 is this thread; the structure outlives the call, which reads it alone.
    unsafe { sched_setscheduler(0, policy, &raw const parameters) };
}

#[cfg(test)]
mod tests {
    use nix::libc::sched_getscheduler;

    use super::*;

    #[test]
    fn it_is_of_one_thread_and_over_when_dropped() {
        // SAFETY: 0 is this thread; no pointer.
        let policy = || unsafe { sched_getscheduler(0) };
        let before = policy();
        let prompt = Prompt::now();
        let meanwhile = policy();
        assert!(meanwhile == before || meanwhile == SCHED_FIFO | SCHED_RESET_ON_FORK, "{meanwhile}");
        assert_eq!(std::thread::spawn(policy).join().unwrap(), before, "what it starts is as ever");
        drop(prompt);
        assert_eq!(policy(), before);
    }
}
