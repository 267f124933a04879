//! Times as people and programs read them: RFC 3339, UTC.

use std::time::{Duration, SystemTime};

use carrel_protocol::vmm::Mark;

const DAY: u64 = 86_400;

/// Nanoseconds since the epoch, now.
pub fn now_ns() -> u64 {
    since_epoch().as_nanos().try_into().unwrap_or(u64::MAX)
}

/// Milliseconds since the epoch, now.
pub(crate) fn now_ms() -> u64 {
    since_epoch().as_millis().try_into().unwrap_or(u64::MAX)
}

/// CLOCK_MONOTONIC, µs: the clock of timelines, of all processes of a host alike.
pub fn now_us() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let since = Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0));
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// A step of a start that was just done.
pub fn mark(done: &str) -> Mark {
    Mark { done: done.to_owned(), at_us: now_us() }
}

fn since_epoch() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// `2026-11-21T07:05:00.123456789Z` for nanoseconds since the epoch.
pub fn rfc3339(ns: u64) -> String {
    let (seconds, fraction) = (ns / 1_000_000_000, ns % 1_000_000_000);
    let (year, month, day) = date(seconds / DAY);
    let (hour, minute, second) = (seconds % DAY / 3600, seconds % 3600 / 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{fraction:09}Z")
}

/// The same for a moment of the system's clock; one before the epoch counts as the epoch.
pub fn rfc3339_of(moment: SystemTime) -> String {
    let since = moment.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    rfc3339(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

/// Year, month and day of the n-th day since 1970-01-01, by years of 365 or 366 days and their months.
fn date(mut days: u64) -> (u64, u64, u64) {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    loop {
        let length = if leap(year) { 366 } else { 365 };
        if days < length {
            break;
        }
        days -= length;
        year += 1;
    }
    let february = if leap(year) { 29 } else { 28 };
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_moments_read_as_they_should() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00"),
            (951_782_399, "2000-02-28T23:59:59"),
            (951_782_400, "2000-02-29T00:00:00"),
            (1_709_251_200, "2024-03-01T00:00:00"),
            (1_798_761_599, "2026-12-31T23:59:59"),
            (4_107_542_400, "2100-03-01T00:00:00"),
        ] {
            assert_eq!(rfc3339(seconds * 1_000_000_000 + 5), format!("{text}.000000005Z"));
            let moment = SystemTime::UNIX_EPOCH + Duration::new(seconds, 5);
            assert_eq!(rfc3339_of(moment), format!("{text}.000000005Z"));
        }
    }
}
