//! The numbers of pax records and of what they say of sparse files (POSIX.1-2017, pax, "pax Extended Header").

/// A decimal number without sign.
pub(super) fn digits(text: &[u8]) -> Option<u64> {
    let valid = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    str::from_utf8(text).ok().filter(|_| valid)?.parse().ok()
}
