//! Spans of time: `500ms`, `10`, `1m30s`, `2h`, `7d`.

use std::time::{Duration, SystemTime};

use anyhow::{Result, anyhow};

/// Reads a span: numbers with units (`ms`, `s`, `m`, `h`, `d`), largest first or not, added up; a bare number is seconds.
pub(crate) fn parse(text: &str) -> Result<Duration> {
    let wrong = || anyhow!("give a time such as 10s, 1m30s or 500ms");
    if let Ok(seconds) = text.parse::<u64>() {
        return Ok(Duration::from_secs(seconds));
    }
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let number: u64 = rest[..digits].parse().map_err(|_| wrong())?;
        rest = &rest[digits..];
        let letters = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let millis: u64 = match &rest[..letters] {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(wrong()),
        };
        rest = &rest[letters..];
        let part = number.checked_mul(millis).map(Duration::from_millis).ok_or_else(wrong)?;
        total = total.checked_add(part).ok_or_else(wrong)?;
    }
    if text.is_empty() { Err(wrong()) } else { Ok(total) }
}

/// Reads a span that is not zero.
pub(crate) fn positive(text: &str) -> Result<Duration> {
    let span = parse(text)?;
    if span.is_zero() { Err(anyhow!("the time must be longer than zero")) } else { Ok(span) }
}

/// Writes how long ago something was, in its largest unit: `12 seconds`, `1 minute`, `3 days`.
pub(crate) fn human(span: Duration) -> String {
    const UNITS: [(u64, &str); 4] = [(86_400, "day"), (3600, "hour"), (60, "minute"), (1, "second")];
    let seconds = span.as_secs();
    for (length, name) in UNITS {
        let count = seconds / length;
        if count > 0 {
            return format!("{count} {name}{}", if count == 1 { "" } else { "s" });
        }
    }
    "less than a second".to_owned()
}

/// Writes how long ago a moment was; one that lies ahead counts as now.
pub(crate) fn ago(then: SystemTime, now: SystemTime) -> String {
    format!("{} ago", human(now.duration_since(then).unwrap_or_default()))
}

/// Writes a moment as RFC 3339 in UTC, with nanoseconds: what `logs --timestamps` and `--json` show.
pub(crate) fn rfc3339(moment: SystemTime) -> String {
    let since = moment.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let seconds = since.as_secs();
    let (days, second_of_day) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}Z",
        second_of_day / 3600,
        second_of_day / 60 % 60,
        second_of_day % 60,
        since.subsec_nanos()
    )
}

/// The Gregorian date of a day counted from 1970-01-01. Years are counted from March, so that the leap day comes last.
fn civil(days: u64) -> (u64, u64, u64) {
    // Days from 0000-03-01 to 1970-01-01.
    let days = days + 719_468;
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_add_up_and_bare_numbers_are_seconds() {
        assert_eq!(parse("10").unwrap(), Duration::from_secs(10));
        assert_eq!(parse("500ms").unwrap(), Duration::from_millis(500));
        assert_eq!(parse("1m30s").unwrap(), Duration::from_secs(90));
        assert_eq!(parse("2h").unwrap(), Duration::from_secs(7200));
        assert_eq!(parse("7d").unwrap(), Duration::from_secs(604_800));
        assert_eq!(parse("0s").unwrap(), Duration::ZERO);
    }

    #[test]
    fn what_is_no_span_is_refused() {
        for wrong in [
            "",
            "s",
            "-1s",
            "1.5s",
            "10x",
            "1m 30s",
            "1m30",
            "99999999999999999999s",
            "18446744073709551615d",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        assert!(positive("0").is_err());
        assert!(positive("1ms").is_ok());
    }

    #[test]
    fn ages_name_their_largest_unit() {
        assert_eq!(human(Duration::from_millis(900)), "less than a second");
        assert_eq!(human(Duration::from_secs(1)), "1 second");
        assert_eq!(human(Duration::from_secs(3599)), "59 minutes");
        assert_eq!(human(Duration::from_secs(86_400 * 3)), "3 days");
    }

    #[test]
    fn moments_are_written_as_rfc_3339() {
        let at = |seconds| rfc3339(SystemTime::UNIX_EPOCH + Duration::new(seconds, 7));
        assert_eq!(at(0), "1970-01-01T00:00:00.000000007Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00.000000007Z");
        assert_eq!(at(1_709_164_800), "2024-02-29T00:00:00.000000007Z");
        assert_eq!(at(1_735_689_599), "2024-12-31T23:59:59.000000007Z");
        assert_eq!(at(4_107_542_400), "2100-03-01T00:00:00.000000007Z");
    }
}
