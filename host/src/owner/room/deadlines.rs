//! Moments at which something is due to a room.

use std::time::{Duration, Instant};

use crate::outcome::Step;

/// An owner that comes so late to what is due was itself not let run: stopped, on a host that was paused, or that has no time for it.
const STOOD_STILL: Duration = Duration::from_secs(1);

/// What is due, and when.
#[derive(Debug, Default)]
pub(super) struct Deadlines {
    /// The current step is overdue.
    pub(super) step: Option<(Instant, Step, Duration)>,
    /// The room's timeout. It is the caller's and of the time that passes outside: never put off.
    pub(super) timeout: Option<Instant>,
    /// The stop signal was not enough.
    pub(super) kill: Option<Instant>,
    /// The end needs more pressure.
    pub(super) pressure: Option<Instant>,
    /// Usage was asked for and not reported.
    pub(super) usage: Option<Instant>,
    /// The meter is to be read.
    pub(super) sample: Option<Instant>,
    /// The working set is asked for, result or not.
    pub(super) record: Option<Instant>,
    /// The next step of the way to rest.
    pub(super) rest: Option<Instant>,
}

impl Deadlines {
    /// The first of them.
    pub(super) fn next(&self) -> Option<Instant> {
        let step = self.step.map(|(at, ..)| at);
        let others =
            [self.timeout, self.kill, self.pressure, self.usage, self.sample, self.record, self.rest];
        [step].into_iter().chain(others).flatten().min()
    }

    /// Gives all but the room's timeout this much more.
    pub(super) fn put_off(&mut self, by: Duration) {
        let step = self.step.as_mut().map(|(at, ..)| at);
        let others = [
            &mut self.kill,
            &mut self.pressure,
            &mut self.usage,
            &mut self.sample,
            &mut self.record,
            &mut self.rest,
        ];
        step.into_iter().chain(others.into_iter().flatten()).for_each(|at| *at += by);
    }
}

/// How long an owner stood still whose wait, begun then, for what was due ends now. While it did, most likely nothing of its room ran either, or what did was not heard.
/// What it took before that wait, writing to a guest that reads slowly for one, is no standing still: a guest could put off its own end by it.
pub(super) fn stood_still(due: Option<Instant>, began: Instant, now: Instant) -> Option<Duration> {
    let late = now.saturating_duration_since(due?.max(began));
    (late > STOOD_STILL).then_some(late)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_due_while_the_owner_stood_still_is_put_off_and_the_rooms_timeout_is_not() {
        let begun = Instant::now();
        let after = |seconds| begun + Duration::from_secs(seconds);
        let mut deadlines = Deadlines {
            step: Some((after(60), Step::Boot, Duration::from_secs(60))),
            timeout: Some(after(30)),
            sample: Some(after(5)),
            ..Deadlines::default()
        };
        assert_eq!(stood_still(deadlines.next(), begun, after(5) + STOOD_STILL), None);
        assert_eq!(stood_still(deadlines.next(), after(124), after(125)), None, "it was busy until then");
        let by = stood_still(deadlines.next(), begun, after(125)).unwrap();
        assert_eq!(by, Duration::from_secs(120));
        deadlines.put_off(by);
        assert_eq!(deadlines.step, Some((after(180), Step::Boot, Duration::from_secs(60))));
        assert_eq!((deadlines.timeout, deadlines.sample), (Some(after(30)), Some(after(125))));
        assert_eq!(stood_still(None, begun, after(1000)), None);
    }
}
