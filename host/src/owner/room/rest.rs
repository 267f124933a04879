//! How a function's room rests: one that waits for another event gives back what its guest has free, and then stands still.
//!
//! ```text
//!            its creator said Rest, a while ago
//!   Awake ──────────────────────────────────────▶ Asking: what can the guest spare?
//!     ▲                                             │ its report        │ nothing, or no report in time
//!     │                                             ▼                   │
//!     │                                           Giving: a balloon of that size
//!     │                                             │ it is full, or grows no more
//!     │                                             ▼                   │
//!     │                                           Giving: a balloon of 0
//!     │                                             │ it is empty, or shrinks no more
//!     │                                             ▼                   ▼
//!     └──────── whatever the agent is told ─────── Paused: no vCPU runs, nobody samples
//! ```
//!
//! The balloon is emptied before the pause: pages that it took stay with the host until the guest touches them, and a guest that is woken
//! has its memory at once. What the guest says of it is a claim; every wait for it is bounded, and whatever it does it is paused in the end.

use std::time::{Duration, Instant};

use carrel_protocol::vmm::{FromOwner, Pause, Resume, SetBalloon};

use super::{Room, SAMPLE, WORKLOAD};
use crate::record::Phase;
use crate::resident::Rests;

/// How often the VMM is asked how far the balloon is. Linux fills it by 1 MiB and says so each time (drivers/virtio/virtio_balloon.c).
const LOOK: Duration = Duration::from_millis(20);
/// What is to be had must be so much of what the guest has free, as a divisor: it goes through all of that, since it picks pages by no reason of its host's.
const WORTH: u64 = 32;
/// What the guest keeps beside its kernel's own reserve, bytes: whatever runs in it meanwhile, and the agent for one, finds memory.
const RESERVE: u64 = 4 << 20;

/// See the module's page.
#[derive(Debug, Default)]
pub(super) enum Rest {
    #[default]
    Awake,
    Asking,
    Giving(Balloon),
    Paused {
        _counted: Rests,
    },
}

/// A balloon on its way to a size.
#[derive(Clone, Copy, Debug)]
pub(super) struct Balloon {
    /// MiB.
    target: u32,
    /// What it held when somebody looked last, bytes.
    held: u64,
    /// Since when it holds that.
    since: Instant,
    /// When it is waited for no longer.
    until: Instant,
    /// What the guest said that it can spare, bytes.
    spare: u64,
}

impl Balloon {
    fn is_there(&self) -> bool {
        match self.target {
            0 => self.held == 0,
            target => self.held >= u64::from(target) << 20,
        }
    }
}

impl Room {
    /// Its creator has no event for it.
    pub(super) fn keep(&mut self) {
        self.kept = self.own.spec.function.is_some();
        self.put_off_rest();
    }

    /// Its creator has an event for it.
    pub(super) fn stop_keeping(&mut self) {
        self.kept = false;
        self.deadlines.rest = None;
    }

    pub(super) fn is_paused(&self) -> bool {
        matches!(self.rest, Rest::Paused { .. })
    }

    /// What has to be told to the agent goes before any rest.
    pub(super) fn wake(&mut self) {
        match std::mem::take(&mut self.rest) {
            Rest::Awake => return,
            Rest::Asking | Rest::Giving(Balloon { target: 0, .. }) => {}
            Rest::Giving(_) => self.set_balloon(0),
            Rest::Paused { .. } => {
                self.deadlines.sample = Some(Instant::now() + SAMPLE);
                self.tell_vmm(&Resume {}.into(), None);
            }
        }
        self.put_off_rest();
    }

    fn put_off_rest(&mut self) {
        self.deadlines.rest = self.kept.then(|| Instant::now() + self.own.patience.rest());
    }

    /// Nothing is going on in it that anybody waits for.
    fn is_idle(&self) -> bool {
        self.record.phase == Phase::Running
            && self.kept
            && !self.invoking
            && self.usage_waiters.is_empty()
            && self.deadlines.kill.is_none()
            && self.processes.keys().all(|process| *process == WORKLOAD)
    }

    /// The next step is due.
    pub(super) fn rest(&mut self, now: Instant) {
        match &self.rest {
            Rest::Awake if self.is_idle() => {
                self.rest = Rest::Asking;
                self.deadlines.rest = Some(now + self.own.patience.usage());
                self.ask_spare();
            }
            Rest::Awake => self.put_off_rest(),
            Rest::Asking => self.pause(),
            Rest::Giving(_) => {
                self.ask_vmm();
                self.follow(now);
            }
            Rest::Paused { .. } => {}
        }
    }

    /// The guest says what it can spare, and is asked for that.
    pub(super) fn hear_spare(&mut self, bytes: u64) {
        if !matches!(self.rest, Rest::Asking) {
            return;
        }
        let spare = bytes.saturating_sub(RESERVE);
        match target(spare, self.taken(spare), self.left) {
            0 => self.pause(),
            // The VMM refuses one that is larger than the guest's memory; nothing follows then, as with a guest that gives nothing.
            target => self.inflate(target, 0, spare),
        }
    }

    /// What the room takes of the host and the guest could spare, bytes; not without a cgroup. That counts page by page, where `memory.stat` is seconds behind.
    fn taken(&mut self, spare: u64) -> Option<u64> {
        self.meter.sample();
        Some(self.meter.usage().memory_current_bytes?.saturating_add(spare))
    }

    fn inflate(&mut self, target: u32, held: u64, spare: u64) {
        tracing::debug!(mib = target, held, "the balloon is to be of this size");
        let now = Instant::now();
        let until = now + self.own.patience.give();
        self.rest = Rest::Giving(Balloon { target, held, since: now, until, spare });
        self.deadlines.rest = Some(now + LOOK);
        self.set_balloon(target);
    }

    fn set_balloon(&mut self, size_mib: u32) {
        self.tell_vmm(&FromOwner::from(SetBalloon { size_mib }), None);
    }

    /// The VMM says what the balloon holds, by the guest's word.
    pub(super) fn hear_balloon(&mut self, bytes: u64) {
        let now = Instant::now();
        if let Rest::Giving(balloon) = &mut self.rest
            && balloon.held != bytes
        {
            (balloon.held, balloon.since) = (bytes, now);
        }
        self.follow(now);
    }

    fn follow(&mut self, now: Instant) {
        let Rest::Giving(balloon) = self.rest else { return };
        let is_stuck = now >= balloon.since + self.own.patience.give_on();
        if !balloon.is_there() && !is_stuck && now < balloon.until {
            self.deadlines.rest = Some(now + LOOK);
            return;
        }
        match balloon.target {
            0 => self.pause(),
            _ => self.inflate(0, balloon.held, balloon.spare),
        }
        // Of one that was never filled there is nothing to wait for.
        self.follow(now);
    }

    /// The guest stands still from here on.
    fn pause(&mut self) {
        if !self.is_idle() {
            return self.wake();
        }
        tracing::debug!("the room rests");
        if let Rest::Giving(Balloon { spare, .. }) = self.rest {
            self.left = self.taken(spare);
        }
        self.rest = Rest::Paused { _counted: self.own.held.resting.one() };
        (self.deadlines.rest, self.deadlines.sample) = (None, None);
        self.tell_vmm(&Pause {}.into(), None);
        self.meter.sample();
    }
}

/// The balloon for a guest that can spare so much, MiB: all of it, or none where little would come of it. When the room rested last nothing that its guest could spare took memory
/// of the host; what does now is what the room takes more than then, and what its guest has more to spare: `now` and `then` are these two together, bytes, where they are known.
fn target(spare: u64, now: Option<u64>, then: Option<u64>) -> u32 {
    let more = now.zip(then).map_or(spare, |(now, then)| now.saturating_sub(then));
    match more >= spare / WORTH {
        true => u32::try_from(spare >> 20).unwrap_or(u32::MAX),
        false => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_guest_is_asked_for_all_that_it_can_spare_or_for_nothing() {
        let spare = 64 * MIB;
        // It never rested, or nobody knows what it takes.
        assert_eq!(target(spare, Some(90 * MIB), None), 64);
        assert_eq!(target(spare, None, None), 64);
        // Since then it took more, or freed some of what it took.
        let then = Some(90 * MIB);
        assert_eq!(target(spare, Some(92 * MIB), then), 64);
        assert_eq!(target(spare, Some(91 * MIB), then), 0);
        assert_eq!(target(spare, Some(80 * MIB), then), 0);
        assert_eq!(target(MIB - 1, Some(92 * MIB), then), 0, "less than a MiB");
        assert_eq!(target(u64::MAX, None, None), u32::MAX, "whatever it says");
    }
}
