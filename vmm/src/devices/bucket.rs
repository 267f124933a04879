//! A token bucket: so many bytes and operations a second, with what one second gives as the burst.
//!
//! A request is let through while anything is left and may overdraw; the debt delays the next. So a request larger than the bucket
//! is possible, and the rate holds over time.

use std::time::{Duration, Instant};

use carrel_protocol::vmm::IoLimit;

/// See the module's page.
#[derive(Debug)]
pub(super) struct Bucket {
    bytes: Option<Tokens>,
    operations: Option<Tokens>,
    filled: Instant,
    closed: bool,
}

#[derive(Debug)]
struct Tokens {
    rate: i64,
    /// Thousandths of a token, so that a refill after a millisecond is not lost.
    millis: i64,
}

impl Tokens {
    fn new(rate: Option<u64>) -> Option<Self> {
        // A rate of none would stop the disk for good; one a second is the slowest.
        let rate = i64::try_from(rate?.clamp(1, 1 << 40)).ok()?;
        Some(Self { rate, millis: rate * 1000 })
    }

    fn refill(&mut self, passed_ms: i64) {
        self.millis = self.millis.saturating_add(self.rate.saturating_mul(passed_ms)).min(self.rate * 1000);
    }

    fn spend(&mut self, tokens: u64) {
        self.millis =
            self.millis.saturating_sub(i64::try_from(tokens).unwrap_or(i64::MAX).saturating_mul(1000));
    }

    /// ms until something is left.
    fn wait_ms(&self) -> i64 {
        if self.millis > 0 { 0 } else { -self.millis / self.rate + 1 }
    }
}

impl Bucket {
    /// A full one.
    pub(super) fn new(limit: IoLimit, now: Instant) -> Self {
        Self {
            bytes: Tokens::new(limit.bytes_per_second),
            operations: Tokens::new(limit.operations_per_second),
            filled: now,
            closed: false,
        }
    }

    /// Whether a request may go through now.
    pub(super) fn is_open(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.filled).as_millis();
        if let Ok(passed) = i64::try_from(passed)
            && passed > 0
        {
            self.tokens().for_each(|tokens| tokens.refill(passed));
            // By whole milliseconds: what is left of the last one counts the next time.
            self.filled += Duration::from_millis(passed.unsigned_abs());
        }
        let open = self.tokens().all(|tokens| tokens.wait_ms() == 0);
        self.closed = !open;
        open
    }

    /// Takes one operation of so many bytes.
    pub(super) fn spend(&mut self, bytes: u64) {
        if let Some(tokens) = &mut self.bytes {
            tokens.spend(bytes);
        }
        if let Some(tokens) = &mut self.operations {
            tokens.spend(1);
        }
    }

    /// When it opens again, if a request found it closed.
    pub(super) fn resumes_at(&self) -> Option<Instant> {
        let wait = [&self.bytes, &self.operations].into_iter().flatten().map(Tokens::wait_ms).max()?;
        let wait = Duration::from_millis(u64::try_from(wait).ok()?);
        self.closed.then(|| self.filled + wait)
    }

    fn tokens(&mut self) -> impl Iterator<Item = &mut Tokens> {
        [&mut self.bytes, &mut self.operations].into_iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(bytes: Option<u64>, operations: Option<u64>) -> IoLimit {
        IoLimit { bytes_per_second: bytes, operations_per_second: operations }
    }

    /// Requests of this size that go through in ten seconds.
    fn in_ten_seconds(limit: IoLimit, size: u64) -> u64 {
        in_steps_of(Duration::from_millis(1), limit, size)
    }

    /// The same, asked so often.
    fn in_steps_of(step: Duration, limit: IoLimit, size: u64) -> u64 {
        let start = Instant::now();
        let mut bucket = Bucket::new(limit, start);
        let mut through = 0;
        let mut passed = Duration::ZERO;
        while passed < Duration::from_secs(10) {
            passed += step;
            while bucket.is_open(start + passed) {
                bucket.spend(size);
                through += 1;
            }
        }
        through
    }

    #[test]
    fn the_rate_holds_over_time_with_a_second_of_burst() {
        assert!((10..=12).contains(&in_ten_seconds(limit(None, Some(1)), 0)));
        assert!((1090..=1110).contains(&in_ten_seconds(limit(Some(4096 * 100), None), 4096)));
        // Larger than the bucket: through, and the debt is waited for.
        assert!((10..=12).contains(&in_ten_seconds(limit(Some(1000), None), 1000)));
    }

    #[test]
    fn the_rate_holds_however_often_it_is_asked() {
        for step in [200, 999, 1_900] {
            let through = in_steps_of(Duration::from_micros(step), limit(None, Some(1000)), 0);
            assert!((10_900..=11_100).contains(&through), "{through} in steps of {step} µs");
        }
    }

    #[test]
    fn a_closed_bucket_says_when_it_opens() {
        let start = Instant::now();
        let mut bucket = Bucket::new(limit(Some(1000), None), start);
        assert!(bucket.is_open(start));
        bucket.spend(3000);
        assert!(!bucket.is_open(start));
        let opens = bucket.resumes_at().unwrap();
        assert!(!bucket.is_open(opens - Duration::from_millis(2)));
        assert!(bucket.is_open(opens));
        assert_eq!(bucket.resumes_at(), None);
    }
}
