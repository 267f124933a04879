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
}
