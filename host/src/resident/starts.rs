//! Rooms that are starting: whose turn it is, and when VMMs may be prepared beside them.
//!
//! A start is the work of CPUs. All of a burst at once would have each wait for all others and none come early, while every guest that is awake takes some time for nothing; so a few for
//! each CPU have their turn and the others wait for it, in the order in which they came. A turn ends when its room runs or is over, or after [`TURN`]: a room that is slow for its own
//! reasons, or by intent, holds nobody up.
//!
//! The CPUs are first those rooms' that were asked for, so a VMM is prepared,
//!
//! ```text
//!   none starts ────────────────────▶ at once
//!   fewer than there are CPUs ──────▶ PAUSE after the first of them began: starts may follow each other without end
//!   as many, or more ───────────────▶ YIELD after the last of them began: who finds no VMM ready starts one, at no more cost than preparing it
//! ```

use std::collections::VecDeque;
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// Rooms that start on some of the CPUs are given this much time.
const PAUSE: Duration = Duration::from_millis(100);
/// Rooms that need all of them this much: one that takes longer waits for something else.
const YIELD: Duration = Duration::from_secs(60);

/// Turns at once for each CPU: while one waits for a disk or another process, another computes.
const TURNS: usize = 2;
/// The longest turn.
const TURN: Duration = Duration::from_secs(2);

/// A start, by the order in which they came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Number(u64);

/// See the module's page.
#[derive(Debug)]
pub(super) struct Starts {
    cpus: u64,
    turns_at_once: usize,
    next: u64,
    /// Those that wait for their turns, and the threads that do so for them.
    waiting: VecDeque<(Number, Thread)>,
    /// Those whose turn it is, and since when.
    turns: Vec<(Number, Instant)>,
    under_way: u64,
    /// When the first and the last of those under way began.
    first: Instant,
    last: Instant,
}

impl Starts {
    /// None yet, on so many CPUs.
    pub(super) fn new(cpus: usize, now: Instant) -> Self {
        Self {
            cpus: u64::try_from(cpus).unwrap_or(u64::MAX),
            turns_at_once: cpus.saturating_mul(TURNS),
            next: 0,
            waiting: VecDeque::new(),
            turns: Vec::new(),
            under_way: 0,
            first: now,
            last: now,
        }
    }

    /// A room is to start, and this thread waits for its turn.
    pub(super) fn begin(&mut self, now: Instant) -> Number {
        if self.under_way == 0 {
            self.first = now;
        }
        self.last = now;
        self.under_way += 1;
        let number = Number(self.next);
        self.next += 1;
        self.waiting.push_back((number, thread::current()));
        number
    }

    /// Takes the turn of one that waits. If it isn't its turn yet, says how long that may take at the most: for ever, for who is not the next. A thread that waits is unparked sooner
    /// when it may be its turn.
    ///
    /// # Errors
    ///
    /// How long.
    pub(super) fn take_turn(&mut self, number: Number, now: Instant) -> Result<(), Duration> {
        self.turns.retain(|(_, since)| now < *since + TURN);
        if self.waiting.front().is_none_or(|(first, _)| *first != number) {
            return Err(Duration::MAX);
        }
        let first_over =
            self.turns.iter().map(|(_, since)| (*since + TURN).saturating_duration_since(now)).min();
        match first_over {
            Some(left) if self.turns.len() >= self.turns_at_once => Err(left),
            _ => {
                self.waiting.pop_front();
                self.turns.push((number, now));
                self.wake_next();
                Ok(())
            }
        }
    }

    /// It runs, or is over.
    pub(super) fn end(&mut self, number: Number) {
        self.waiting.retain(|(waiting, _)| *waiting != number);
        self.turns.retain(|(turn, _)| *turn != number);
        self.under_way = self.under_way.saturating_sub(1);
        self.wake_next();
    }

    fn wake_next(&self) {
        if let Some((_, thread)) = self.waiting.front() {
            thread.unpark();
        }
    }

    /// How many are under way.
    pub(super) fn under_way(&self) -> u64 {
        self.under_way
    }

    /// For how long still nothing is to be prepared, if nothing changes.
    pub(super) fn pause(&self, now: Instant) -> Option<Duration> {
        let until = match self.under_way {
            0 => return None,
            some if some < self.cpus => self.first + PAUSE,
            _ => self.last + YIELD,
        };
        Some(until.saturating_duration_since(now)).filter(|left| !left.is_zero())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One whose turn it is at once.
    fn begin(starts: &mut Starts, now: Instant) -> Number {
        let number = starts.begin(now);
        starts.take_turn(number, now).unwrap();
        number
    }

    #[test]
    fn beside_rooms_on_some_of_the_cpus_a_moment_after_the_first_began() {
        let begun = Instant::now();
        let mut starts = Starts::new(4, begun);
        assert_eq!(starts.pause(begun), None);
        let first = begin(&mut starts, begun);
        assert_eq!(starts.pause(begun), Some(PAUSE));
        let later = begun + PAUSE / 2;
        let second = begin(&mut starts, later);
        assert_eq!(starts.pause(later), Some(PAUSE / 2), "those that follow it don't put it off");
        assert_eq!(starts.pause(begun + PAUSE), None);
        starts.end(first);
        starts.end(second);
        assert_eq!((starts.under_way(), starts.pause(later)), (0, None));
    }

    #[test]
    fn beside_rooms_on_all_cpus_long_after_the_last_began_or_when_one_has_ended() {
        let begun = Instant::now();
        let mut starts = Starts::new(2, begun);
        let last = begun + Duration::from_secs(1);
        let first = begin(&mut starts, begun);
        begin(&mut starts, last);
        assert_eq!(starts.pause(last), Some(YIELD));
        assert_eq!(starts.pause(last + YIELD), None);
        starts.end(first);
        assert_eq!(starts.pause(last), None);
    }

    #[test]
    fn one_cpu_is_its_rooms() {
        let begun = Instant::now();
        let mut starts = Starts::new(1, begun);
        begin(&mut starts, begun);
        assert_eq!(starts.pause(begun + PAUSE), Some(YIELD - PAUSE));
    }

    #[test]
    fn a_few_for_each_cpu_have_their_turn_and_the_others_follow_in_their_order() {
        let now = Instant::now();
        let mut starts = Starts::new(1, now);
        let numbers: Vec<_> = (0..4).map(|_| starts.begin(now)).collect();
        let turns = |starts: &mut Starts, now| -> Vec<bool> {
            numbers.iter().map(|number| starts.take_turn(*number, now).is_ok()).collect()
        };
        assert_eq!(starts.take_turn(numbers[1], now), Err(Duration::MAX), "it is not the next");
        assert_eq!(turns(&mut starts, now), [true, true, false, false]);
        assert_eq!(starts.take_turn(numbers[2], now), Err(TURN));
        starts.end(numbers[1]);
        assert_eq!(starts.take_turn(numbers[3], now), Err(Duration::MAX));
        starts.take_turn(numbers[2], now).unwrap();
        assert_eq!(starts.under_way(), 3);
    }

    #[test]
    fn who_waits_and_goes_holds_nobody_up() {
        let now = Instant::now();
        let mut starts = Starts::new(1, now);
        let numbers: Vec<_> = (0..4).map(|_| starts.begin(now)).collect();
        starts.take_turn(numbers[0], now).unwrap();
        starts.end(numbers[1]);
        starts.take_turn(numbers[2], now).unwrap();
        assert_eq!(starts.take_turn(numbers[3], now), Err(TURN));
    }

    #[test]
    fn a_turn_is_over_after_its_time_though_its_room_starts_still() {
        let now = Instant::now();
        let mut starts = Starts::new(1, now);
        let slow: Vec<_> = (0..2).map(|_| begin(&mut starts, now)).collect();
        let next = starts.begin(now);
        assert_eq!(starts.take_turn(next, now + TURN / 2), Err(TURN / 2));
        starts.take_turn(next, now + TURN).unwrap();
        // Their ends give nobody else's turn away.
        slow.into_iter().for_each(|number| starts.end(number));
        let (third, fourth) = (starts.begin(now), starts.begin(now));
        starts.take_turn(third, now + TURN).unwrap();
        assert_eq!(starts.take_turn(fourth, now + TURN), Err(TURN));
    }
}
