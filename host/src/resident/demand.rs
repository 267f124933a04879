//! How many VMMs of a kind are worth having ready: as many as were lately asked for at once.
//!
//! ```text
//!   asked ─▶ a burst: what is asked for until the shelf is full again
//!              │ larger than those before: so many are wanted from now on
//!              └ no burst of more than half of it for a while: half of it is
//! ```

use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

/// A burst that was not nearly repeated for so long counts half.
const HALVED: Duration = Duration::from_secs(600);

/// See the module's page.
#[derive(Debug)]
pub(super) struct Demand {
    /// Asked for since the shelf was full.
    burst: usize,
    /// The largest burst that counts, and since when it was not nearly repeated.
    largest: usize,
    since: Instant,
}

impl Demand {
    /// Nobody has asked yet.
    pub(super) fn new(now: Instant) -> Self {
        Self { burst: 0, largest: 0, since: now }
    }

    /// One was asked for, and was there or not.
    pub(super) fn asked(&mut self, now: Instant) {
        self.burst = self.burst.saturating_add(1);
        self.largest = self.largest.max(self.burst);
        if self.burst > self.largest / 2 {
            self.since = now;
        }
    }

    /// So many are there.
    pub(super) fn has(&mut self, ready: usize, bounds: &RangeInclusive<usize>) {
        if ready >= self.wanted(bounds) {
            self.burst = 0;
        }
    }

    /// How many are to be there.
    pub(super) fn wanted(&self, bounds: &RangeInclusive<usize>) -> usize {
        self.largest.min(*bounds.end()).max(*bounds.start())
    }

    /// Lets a burst of long ago count less.
    pub(super) fn forget(&mut self, now: Instant) {
        if now.saturating_duration_since(self.since) >= HALVED {
            self.largest /= 2;
            self.since = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: RangeInclusive<usize> = 4..=64;

    fn ask(demand: &mut Demand, times: usize, now: Instant) {
        (0..times).for_each(|_| demand.asked(now));
    }

    #[test]
    fn as_many_are_wanted_as_were_asked_for_at_once_within_bounds() {
        let now = Instant::now();
        let mut demand = Demand::new(now);
        assert_eq!(demand.wanted(&BOUNDS), 4);
        ask(&mut demand, 40, now);
        assert_eq!(demand.wanted(&BOUNDS), 40);
        demand.has(39, &BOUNDS);
        ask(&mut demand, 1, now);
        assert_eq!(demand.wanted(&BOUNDS), 41, "the shelf was not full: it is the same burst");
        demand.has(41, &BOUNDS);
        ask(&mut demand, 1, now);
        assert_eq!(demand.wanted(&BOUNDS), 41, "another one, and a small one");
        ask(&mut demand, 1000, now);
        assert_eq!(demand.wanted(&BOUNDS), 64);
    }

    #[test]
    fn one_after_another_is_no_burst() {
        let now = Instant::now();
        let mut demand = Demand::new(now);
        for _ in 0..1000 {
            ask(&mut demand, 1, now);
            demand.has(4, &BOUNDS);
        }
        assert_eq!(demand.wanted(&BOUNDS), 4);
    }

    #[test]
    fn a_burst_that_does_not_come_again_is_forgotten_by_halves() {
        let begun = Instant::now();
        let mut demand = Demand::new(begun);
        ask(&mut demand, 64, begun);
        demand.has(64, &BOUNDS);
        // More than half of it is nearly it.
        let later = begun + HALVED / 2;
        ask(&mut demand, 33, later);
        demand.has(64, &BOUNDS);
        demand.forget(begun + HALVED);
        assert_eq!(demand.wanted(&BOUNDS), 64);
        ask(&mut demand, 32, begun + HALVED);
        demand.has(64, &BOUNDS);
        demand.forget(later + HALVED);
        assert_eq!(demand.wanted(&BOUNDS), 32);
        for halvings in 2..9 {
            demand.forget(later + HALVED * halvings);
        }
        assert_eq!(demand.wanted(&BOUNDS), 4);
    }

    #[test]
    fn where_none_is_wanted_none_is() {
        let mut demand = Demand::new(Instant::now());
        ask(&mut demand, 10, Instant::now());
        assert_eq!(demand.wanted(&(0..=0)), 0);
    }
}
