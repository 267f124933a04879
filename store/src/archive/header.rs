//! One 512-byte header of a tar, and the extensions that come before one. Pure: bytes in, fields out.

use super::refusal::Damage;

/// Everything in a tar is a multiple of this, in bytes.
pub(super) const BLOCK: usize = 512;

/// What a header is for (POSIX.1-2017, pax, "typeflag"; GNU tar's `L` and `K`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Folder,
    Symlink,
    Hardlink,
    /// `x`: for the next entry.
    Pax,
    /// `g`: for all that follow.
    GlobalPax,
    /// GNU's `L`.
    LongName,
    /// GNU's `K`.
    LongLink,
    /// All else.
    Other(char),
}

/// The fields that matter. Names are bytes up to the first NUL.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) name: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) kind: Kind,
    /// In bytes.
    pub(super) size: u64,
}

impl Header {
    /// Reads a header, or says what is wrong with it.
    pub(super) fn parse(block: &[u8; BLOCK]) -> Result<Self, Damage> {
        let stated = octal(&block[148..156]).ok_or(Damage::NoChecksum)?;
        let sum: u64 = block
            .iter()
            .enumerate()
            .map(|(at, byte)| match at {
                // The checksum counts as spaces in its own sum.
                148..156 => u64::from(b' '),
                _ => u64::from(*byte),
            })
            .sum();
        if sum != stated {
            return Err(Damage::WrongChecksum);
        }
        let mut name = until_nul(&block[..100]).to_vec();
        // GNU's format has other things where ustar keeps the prefix.
        let prefix = until_nul(&block[345..500]);
        if &block[257..263] == b"ustar\0" && !prefix.is_empty() {
            name = [prefix, b"/", &name].concat();
        }
        let kind = match block[156] {
            // Before ustar, a folder was a file whose name ends with a slash.
            b'0' | 0 | b'7' if name.ends_with(b"/") => Kind::Folder,
            b'0' | 0 | b'7' => Kind::File,
            b'1' => Kind::Hardlink,
            b'2' => Kind::Symlink,
            b'5' => Kind::Folder,
            b'x' => Kind::Pax,
            b'g' => Kind::GlobalPax,
            b'L' => Kind::LongName,
            b'K' => Kind::LongLink,
            other => Kind::Other(char::from(other)),
        };
        let size = number(&block[124..136]).ok_or(Damage::NoSize)?;
        Ok(Self { name, link: until_nul(&block[157..257]).to_vec(), kind, size })
    }
}

fn until_nul(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// Octal digits between spaces and NULs.
fn octal(field: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(field).ok()?;
    let digits = text.trim_matches([' ', '\0']);
    if digits.starts_with('+') {
        return None;
    }
    if digits.is_empty() { Some(0) } else { u64::from_str_radix(digits, 8).ok() }
}

/// Octal, or GNU's binary form for what has no room in eleven digits: the first byte is 0x80, the rest big-endian.
fn number(field: &[u8]) -> Option<u64> {
    match field {
        [0x80, rest @ ..] => {
            let (high, low) = rest.split_at(rest.len().checked_sub(8)?);
            let low: [u8; 8] = low.try_into().ok()?;
            high.iter().all(|byte| *byte == 0).then(|| u64::from_be_bytes(low))
        }
        _ => octal(field),
    }
}

/// What extensions said about the next entry.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Pax {
    pub(super) name: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
}

impl Pax {
    /// Takes in the content of an extension's entry.
    pub(super) fn extend(&mut self, kind: Kind, content: &[u8]) -> Result<(), Damage> {
        if kind == Kind::LongName {
            self.name = Some(until_nul(content).to_vec());
        } else if kind == Kind::LongLink {
            self.link = Some(until_nul(content).to_vec());
        } else {
            self.records(content)?;
        }
        Ok(())
    }

    /// `LENGTH KEYWORD=VALUE\n`, where LENGTH counts the whole record (POSIX.1-2017, pax, "Extended Header").
    fn records(&mut self, mut content: &[u8]) -> Result<(), Damage> {
        const MALFORMED: Damage = Damage::MalformedExtension;
        while !content.is_empty() {
            let space = content.iter().take(20).position(|byte| *byte == b' ').ok_or(MALFORMED)?;
            let length: usize =
                std::str::from_utf8(&content[..space]).ok().and_then(|n| n.parse().ok()).ok_or(MALFORMED)?;
            if length <= space + 1 || length > content.len() {
                return Err(MALFORMED);
            }
            let (record, rest) = content.split_at(length);
            let record = record[space + 1..].strip_suffix(b"\n").ok_or(MALFORMED)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or(MALFORMED)?;
            let value = &record[equals + 1..];
            match &record[..equals] {
                b"path" => self.name = Some(value.to_vec()),
                b"linkpath" => self.link = Some(value.to_vec()),
                b"size" => {
                    let digits = std::str::from_utf8(value).ok().filter(|text| !text.starts_with('+'));
                    self.size = Some(digits.and_then(|text| text.parse().ok()).ok_or(MALFORMED)?);
                }
                key if key.starts_with(b"GNU.sparse.") => return Err(Damage::Sparse),
                // Times, owners, attributes: nothing that reading needs.
                _ => {}
            }
            content = rest;
        }
        Ok(())
    }
}
