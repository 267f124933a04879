//! Extended headers (POSIX.1-2024, pax, *pax Extended Header*): `length name=value\n` records.

use base64::Engine as _;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

use super::decimal::digits;
use super::sparse::Sparse;

/// What an extended header changes in the entry that follows. What isn't here is passed over: access times, comments, names of
/// users.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Extension {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    /// Seconds and nanoseconds.
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) attributes: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: Sparse,
}

/// Largest extended attribute that Linux takes (`XATTR_SIZE_MAX`).
const LARGEST_ATTRIBUTE: usize = 64 << 10;
const LONGEST_ATTRIBUTE_NAME: usize = 255;
/// Attributes of an entry. Real files have a handful.
const MOST_ATTRIBUTES: usize = 256;

impl Extension {
    /// Adds the records of one header.
    ///
    /// # Errors
    ///
    /// What is wrong, as a predicate of the entry.
    pub(super) fn add(&mut self, mut records: &[u8]) -> Result<(), String> {
        while !records.is_empty() {
            let (name, value, rest) = record(records).ok_or("has a malformed extended header")?;
            records = rest;
            self.set(name, value)?;
        }
        Ok(())
    }

    fn set(&mut self, name: &[u8], value: &[u8]) -> Result<(), String> {
        let wrong =
            || format!("has '{}' for {} in its extended header", super::shown(value), super::shown(name));
        // "If the value is of zero length, any value that came before is deleted."
        let bytes = (!value.is_empty()).then(|| value.to_vec());
        match name {
            b"path" => self.path = bytes,
            b"linkpath" => self.link = bytes,
            b"size" => self.size = number(value, wrong)?,
            b"uid" => self.uid = number(value, wrong)?,
            b"gid" => self.gid = number(value, wrong)?,
            b"mtime" => {
                self.mtime = if value.is_empty() { None } else { Some(time(value).ok_or_else(wrong)?) };
            }
            _ => {
                if let Some(attribute) = name.strip_prefix(b"SCHILY.xattr.") {
                    self.set_attribute(attribute, value)?;
                } else if let Some(attribute) = name.strip_prefix(b"LIBARCHIVE.xattr.") {
                    self.set_coded_attribute(attribute, value).ok_or_else(wrong)??;
                } else if let Some(name) = name.strip_prefix(b"GNU.sparse.") {
                    self.sparse.set(name, value)?;
                }
            }
        }
        Ok(())
    }

    fn set_attribute(&mut self, name: &[u8], value: &[u8]) -> Result<(), String> {
        if name.is_empty() || name.len() > LONGEST_ATTRIBUTE_NAME || value.len() > LARGEST_ATTRIBUTE {
            return Err(format!(
                "has the extended attribute '{}' of {} bytes; 255 bytes of name and 65536 of value are the most",
                super::shown(name),
                value.len()
            ));
        }
        let full = self.attributes.len() == MOST_ATTRIBUTES;
        match self.attributes.iter_mut().find(|(other, _)| other == name) {
            Some((_, before)) => *before = value.to_vec(),
            None if full => return Err(format!("has more than {MOST_ATTRIBUTES} extended attributes")),
            None => self.attributes.push((name.to_vec(), value.to_vec())),
        }
        Ok(())
    }

    /// As libarchive writes them beside the plain ones, which win: the name's odd bytes as %XX, the value in base64 without padding.
    /// `None` if they aren't that.
    fn set_coded_attribute(&mut self, name: &[u8], value: &[u8]) -> Option<Result<(), String>> {
        let (name, value) = (percent_decoded(name)?, BASE64.decode(value).ok()?);
        let known = self.attributes.iter().any(|(other, _)| *other == name);
        Some(if known { Ok(()) } else { self.set_attribute(&name, &value) })
    }
}

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

fn percent_decoded(text: &[u8]) -> Option<Vec<u8>> {
    let (mut decoded, mut rest) = (Vec::new(), text);
    while let Some((&first, after)) = rest.split_first() {
        rest = after;
        if first == b'%' {
            let digits = str::from_utf8(after.get(..2)?).ok()?;
            let valid = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
            decoded.push(u8::from_str_radix(digits, 16).ok().filter(|_| valid)?);
            rest = after.get(2..)?;
        } else {
            decoded.push(first);
        }
    }
    Some(decoded)
}

/// Name, value, and what follows. The length counts itself, the space, and the newline.
fn record(records: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = records.iter().take(20).position(|&byte| byte == b' ')?;
    let length: usize = digits(records.get(..space)?)?.try_into().ok()?;
    let (record, rest) = records.split_at_checked(length)?;
    let body = record.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = body.iter().position(|&byte| byte == b'=')?;
    let (name, value) = body.split_at_checked(equals)?;
    Some((name, value.get(1..)?, rest))
}

fn number<T: TryFrom<u64>>(text: &[u8], wrong: impl Fn() -> String) -> Result<Option<T>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    let number = digits(text).and_then(|number| T::try_from(number).ok());
    number.map(Some).ok_or_else(wrong)
}

/// Decimal seconds, perhaps negative, perhaps with a fraction, which counts away from zero.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(text) => (true, text),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |&byte| byte == b'.');
    let seconds = i64::try_from(digits(parts.next()?)?).ok()?;
    let mut nanoseconds = 0;
    if let Some(fraction) = parts.next().filter(|fraction| !fraction.is_empty()) {
        digits(fraction.get(..1)?)?;
        if !fraction.iter().all(u8::is_ascii_digit) {
            return None;
        }
        for place in 0..9 {
            nanoseconds = nanoseconds * 10 + u32::from(fraction.get(place).map_or(0, |digit| digit - b'0'));
        }
    }
    match (negative, nanoseconds) {
        (false, _) => Some((seconds, nanoseconds)),
        (true, 0) => Some((-seconds, 0)),
        (true, _) => Some((-seconds - 1, 1_000_000_000 - nanoseconds)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_signs_and_fractions() {
        assert_eq!(time(b"0"), Some((0, 0)));
        assert_eq!(time(b"1700000000.25"), Some((1_700_000_000, 250_000_000)));
        assert_eq!(time(b"-1.5"), Some((-2, 500_000_000)));
        assert_eq!(time(b"1.1234567899"), Some((1, 123_456_789)));
        for wrong in [&b""[..], b"x", b"--1", b"1.x", b"1.2x", b"99999999999999999999"] {
            assert_eq!(time(wrong), None);
        }
    }

    #[test]
    fn the_later_record_wins_and_an_empty_one_deletes() {
        let records = ["path=a", "path=bc", "linkpath=x", "linkpath=", "uid=7"].map(|body| {
            let length = body.len() + 3 + usize::from(body.len() + 3 > 9);
            format!("{length} {body}\n")
        });
        let mut extension = Extension::default();
        extension.add(records.concat().as_bytes()).unwrap();
        let expected = Extension { path: Some(b"bc".to_vec()), uid: Some(7), ..Extension::default() };
        assert_eq!(extension, expected);
    }

    #[test]
    fn lengths_that_lie_are_malformed() {
        for wrong in [
            &b"0 a=b\n"[..],
            b"7 a=b\n",
            b"99999999999999999999999 a=b\n",
            b"5 a=b\n",
            b"a=b\n",
            b"6 ab\n",
            b"\n",
        ] {
            Extension::default().add(wrong).unwrap_err();
        }
    }
}
