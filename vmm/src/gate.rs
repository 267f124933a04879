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
//! until none is inside. Those that wait before a closed gate can be sent on an [`Errand`], each once: that is how a vCPU is saved by the thread that
//! runs it.

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
    /// Errands so far, and how many threads have not come back from the last.
    errands: u64,
    away: usize,
}

/// See the module's page.
#[derive(Debug)]
pub struct Gate {
    inner: Mutex<Inner>,
    changed: Condvar,
}

/// What a thread may do.
#[derive(Debug)]
pub enum Pass<'a> {
    /// Enter the guest.
    Enter(Permit<'a>),
    /// Run the errand that [`Gate::send`] waits for.
    Run(Errand<'a>),
}

/// Leave to enter the guest once.
#[derive(Debug)]
pub struct Permit<'a> {
    gate: &'a Gate,
    waited: bool,
}

impl Permit<'_> {
    /// Whether the gate was closed when this was asked for: the guest stood still.
    pub fn waited(&self) -> bool {
        self.waited
    }
}

/// An errand; dropped, it is done.
#[derive(Debug)]
pub struct Errand<'a>(&'a Gate);

impl Drop for Errand<'_> {
    fn drop(&mut self) {
        let mut inner = self.0.lock();
        inner.away -= 1;
        if inner.away == 0 {
            self.0.changed.notify_all();
        }
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        let mut inner = self.gate.lock();
        inner.inside -= 1;
        if inner.inside == 0 && inner.state != State::Running {
            self.gate.changed.notify_all();
        }
    }
}

impl Default for Gate {
    fn default() -> Self {
        let inner = Inner { state: State::Running, inside: 0, errands: 0, away: 0 };
        Self { inner: Mutex::new(inner), changed: Condvar::new() }
    }
}

impl Gate {
    /// Waits while paused, unless there is an errand that this thread has not run: `errands` is how many it has, 0 at first. `None` once the machine has
    /// stopped for good.
    pub fn pass(&self, errands: &mut u64) -> Option<Pass<'_>> {
        let mut inner = self.lock();
        let mut waited = false;
        loop {
            match inner.state {
                State::Running => {
                    inner.inside += 1;
                    // Those that were missed are over.
                    *errands = inner.errands;
                    return Some(Pass::Enter(Permit { gate: self, waited }));
                }
                State::Paused if *errands < inner.errands => {
                    *errands = inner.errands;
                    return Some(Pass::Run(Errand(self)));
                }
                State::Paused => {
                    waited = true;
                    inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
                }
                State::Stopped => return None,
            }
        }
    }

    /// Closes the gate, calls `kick` to bring every vCPU out, and returns once none is inside.
    pub fn pause(&self, kick: impl Fn()) {
        self.close(State::Paused, kick);
    }

    /// Sends `threads` threads, all that pass here, on an errand, and returns once each has run it. False, and nothing happened, unless the gate is
    /// closed and may open again.
    pub fn send(&self, threads: usize) -> bool {
        let mut inner = self.lock();
        if inner.state != State::Paused {
            return false;
        }
        inner.errands += 1;
        inner.away = threads;
        self.changed.notify_all();
        while inner.away > 0 {
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        true
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
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
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
                let mut errands = 0;
                while let Some(Pass::Enter(permit)) = gate.pass(&mut errands) {
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
        assert!(gate.pass(&mut 0).is_none(), "stopped is for good");
    }

    #[test]
    fn who_stood_at_a_closed_gate_knows_it() {
        let gate = Arc::new(Gate::default());
        let Some(Pass::Enter(permit)) = gate.pass(&mut 0) else { panic!("the gate is open") };
        assert!(!permit.waited());
        drop(permit);
        gate.pause(|| {});
        let vcpu = thread::spawn({
            let gate = gate.clone();
            move || matches!(gate.pass(&mut 0), Some(Pass::Enter(permit)) if permit.waited())
        });
        // It comes to the gate sooner or later.
        thread::sleep(std::time::Duration::from_millis(200));
        gate.resume();
        assert!(vcpu.join().unwrap());
    }

    #[test]
    fn an_errand_is_run_once_by_each_and_only_while_paused() {
        let gate = Arc::new(Gate::default());
        let ran = Arc::new(AtomicUsize::new(0));
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let (gate, ran) = (gate.clone(), ran.clone());
                thread::spawn(move || {
                    let mut errands = 0;
                    while let Some(pass) = gate.pass(&mut errands) {
                        match pass {
                            Pass::Enter(_permit) => thread::yield_now(),
                            Pass::Run(_errand) => drop(ran.fetch_add(1, Ordering::SeqCst)),
                        }
                    }
                })
            })
            .collect();
        assert!(!gate.send(3), "the gate is open");
        for round in 1..=50 {
            gate.pause(|| {});
            assert!(gate.send(3));
            assert_eq!(ran.load(Ordering::SeqCst), 6 * round - 3);
            assert!(gate.send(3), "twice in one pause");
            assert_eq!(ran.load(Ordering::SeqCst), 6 * round);
            gate.resume();
        }
        gate.stop(|| {});
        assert!(!gate.send(3), "stopped is for good");
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}
