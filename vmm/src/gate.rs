//! The gate that every vCPU passes before it runs, and by which all of them are stopped.
//!
//! ```text
//!            pause()                 stop()
//!  Running ──────────▶ Paused ──────────────▶ Stopped
//!     ▲                  │                       ▲
//!     └──── resume() ────┘      Running ─────────┘
//! ```
//!
//! Entering the guest takes a [`Permit`], which only [`Gate::pass`] gives and only while the gate is open: running a vCPU
//! of a paused machine can't be written. A permit is good for one entry; whoever closes the gate then kicks the threads and waits
//! until none is inside.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Running,
    Paused,
    Stopped,
}

#[derive(Debug)]
struct Inner {
    state: State,
    inside: usize,
}

/// See the module's page.
#[derive(Debug)]
pub struct Gate {
    inner: Mutex<Inner>,
    changed: Condvar,
}

/// Leave to enter the guest once.
#[derive(Debug)]
pub struct Permit<'a>(&'a Gate);

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        let mut inner = self.0.lock();
        inner.inside -= 1;
        if inner.inside == 0 && inner.state != State::Running {
            self.0.changed.notify_all();
        }
    }
}

impl Default for Gate {
    fn default() -> Self {
        Self { inner: Mutex::new(Inner { state: State::Running, inside: 0 }), changed: Condvar::new() }
    }
}

impl Gate {
    /// Waits while paused. `None` once the machine has stopped for good.
    pub fn pass(&self) -> Option<Permit<'_>> {
        let mut inner = self.lock();
        loop {
            match inner.state {
                State::Running => {
                    inner.inside += 1;
                    return Some(Permit(self));
                }
                State::Paused => inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner),
                State::Stopped => return None,
            }
        }
    }

    /// Closes the gate, calls `kick` to bring every vCPU out, and returns once none is inside.
    pub fn pause(&self, kick: impl Fn()) {
        self.close(State::Paused, kick);
    }

    /// Opens the gate again. Without effect on a stopped machine.
    pub fn resume(&self) {
        let mut inner = self.lock();
        if inner.state == State::Paused {
            inner.state = State::Running;
        }
        self.changed.notify_all();
    }

    /// Closes the gate for good.
    pub fn stop(&self, kick: impl Fn()) {
        self.close(State::Stopped, kick);
    }

    /// Whether the gate is open.
    pub fn is_open(&self) -> bool {
        self.lock().state == State::Running
    }

    fn close(&self, to: State, kick: impl Fn()) {
        let mut inner = self.lock();
        if inner.state != State::Stopped {
            inner.state = to;
        }
        self.changed.notify_all();
        kick();
        while inner.inside > 0 {
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // No code panics while it holds this; a poisoned lock's content is still right.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use super::*;

    #[test]
    fn pausing_waits_until_nobody_is_inside_and_lets_nobody_in() {
        let gate = Arc::new(Gate::default());
        let leave = Arc::new(AtomicBool::new(false));
        let vcpu = {
            let (gate, leave) = (gate.clone(), leave.clone());
            thread::spawn(move || {
                let mut entries = 0;
                while let Some(permit) = gate.pass() {
                    entries += 1;
                    while !leave.load(Ordering::Acquire) {
                        thread::yield_now();
                    }
                    drop(permit);
                }
                entries
            })
        };
        while gate.lock().inside == 0 {
            thread::yield_now();
        }
        gate.pause(|| leave.store(true, Ordering::Release));
        assert_eq!(gate.lock().inside, 0);
        assert!(!gate.is_open());
        gate.resume();
        gate.stop(|| {});
        assert!(vcpu.join().unwrap() >= 1);
        gate.resume();
        assert!(gate.pass().is_none(), "stopped is for good");
    }
}
