//! A tar reader for layers: ustar, pax, and GNU's long names, large numbers and holes. It knows no file system; names are bytes.
//!
//! ```text
//!   x L K ──▶ remembered for the next        0 7 S ──▶ Entry, then its data
//!   g ──▶ passed over                        1 2 3 4 5 6 ──▶ Entry; its size means nothing
//!   zero block, or end of stream at a block's beginning ──▶ the end
//! ```
//!
//! Source: POSIX.1-2024 pax, *ustar Interchange Format*; GNU tar's manual, *Basic Tar Format*. Where they leave a choice it
//! is that of Go's `archive/tar` and containerd, through which nearly every image has passed: global headers are passed over, links and
//! directories have no data whatever their size says, and only the oldest type (a zero byte) makes `name/` a directory.

use std::io::{self, Read};

use super::pax::Extension;
use super::sparse::{MOST_PIECES, Map};

const BLOCK: usize = 512;
/// Largest extended headers and long names of one entry, together.
const LARGEST_HEADER: u64 = 1 << 20;

/// What is wrong with an archive.
#[derive(Debug)]
pub(super) enum ArchiveError {
    /// The bytes are no tar, or end in the middle.
    Damaged(io::Error),
    /// An entry can't be read: its name, and a predicate.
    Entry(Vec<u8>, String),
}

impl From<io::Error> for ArchiveError {
    fn from(error: io::Error) -> Self {
        Self::Damaged(error)
    }
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    File { map: Option<Map> },
    Directory,
    SymbolicLink { target: Vec<u8> },
    HardLink { target: Vec<u8> },
    CharacterDevice { major: u32, minor: u32 },
    BlockDevice { major: u32, minor: u32 },
    Fifo,
}

/// An entry's head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) path: Vec<u8>,
    pub(super) kind: Kind,
    /// Permissions, with setuid, setgid and sticky.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Seconds and nanoseconds since the epoch.
    pub(super) mtime: (i64, u32),
    pub(super) attributes: Vec<(Vec<u8>, Vec<u8>)>,
    /// Bytes of data that follow.
    pub(super) stored: u64,
}

/// The reader.
#[derive(Debug)]
pub(super) struct Archive<R> {
    from: R,
    /// Data of the current entry that wasn't read, and the padding after it.
    left: u64,
    padding: u64,
}

impl<R: Read> Archive<R> {
    pub(super) fn new(from: R) -> Self {
        Self { from, left: 0, padding: 0 }
    }

    /// The next entry; what was left of the last is passed over.
    ///
    /// # Errors
    ///
    /// See [`ArchiveError`].
    pub(super) fn next(&mut self) -> Result<Option<Entry>, ArchiveError> {
        let mut extension = Extension::default();
        let (mut long_name, mut long_link) = (None, None);
        let mut allowance = LARGEST_HEADER;
        loop {
            self.skip()?;
            let Some(header) = self.header()? else { return Ok(None) };
            let name = header.name();
            let wrong = |problem: String| ArchiveError::Entry(name.clone(), problem);
            let size = header.number(124..136).map_err(&wrong)?;
            match header.kind() {
                b'x' => extension.add(&self.body(&name, size, &mut allowance)?).map_err(wrong)?,
                b'g' => self.set_data(size),
                b'L' => long_name = long(&self.body(&name, size, &mut allowance)?),
                b'K' => long_link = long(&self.body(&name, size, &mut allowance)?),
                _ => {
                    extension.path = extension.path.or(long_name);
                    extension.link = extension.link.or(long_link);
                    return self.entry(&header, extension, size).map(Some);
                }
            }
        }
    }

    /// The entry of a header, with what came before it.
    fn entry(&mut self, header: &Header, extension: Extension, size: u64) -> Result<Entry, ArchiveError> {
        let sparse = extension.sparse;
        let path = sparse.name.clone().or(extension.path).unwrap_or_else(|| header.name());
        let wrong = |problem: String| ArchiveError::Entry(path.clone(), problem);
        let mut stored = extension.size.unwrap_or(size);
        let kind = self.kind(header, &path, extension.link, stored)?;
        // Nothing else has data, whatever its size says.
        if !matches!(kind, Kind::File { .. }) {
            stored = 0;
        }
        self.set_data(stored);
        let kind = if kind == (Kind::File { map: None }) && sparse.is_set() {
            let numbers = if sparse.map_is_in_the_data().map_err(wrong)? {
                let numbers = self.map_before_data(&path)?;
                // What is left after the map; its blocks are data as far as padding is concerned.
                stored = self.left;
                numbers
            } else {
                sparse.numbers.clone()
            };
            let real_size = sparse.real_size.ok_or_else(|| wrong("has holes and no size".into()))?;
            Kind::File { map: Some(Map::new(&numbers, real_size, stored).map_err(wrong)?) }
        } else {
            kind
        };
        let owner = |id: u32| {
            // chown(2) takes it for "unchanged".
            if id == u32::MAX { Err(wrong(format!("has the owner {id}, which is no id"))) } else { Ok(id) }
        };
        Ok(Entry {
            kind,
            mode: header.small(100..108).map_err(wrong)? & 0o7777,
            uid: owner(extension.uid.map_or_else(|| header.small(108..116), Ok).map_err(wrong)?)?,
            gid: owner(extension.gid.map_or_else(|| header.small(116..124), Ok).map_err(wrong)?)?,
            mtime: extension.mtime.map_or_else(|| header.time(), Ok).map_err(wrong)?,
            attributes: extension.attributes,
            stored,
            path,
        })
    }

    fn kind(
        &mut self,
        header: &Header,
        path: &[u8],
        link: Option<Vec<u8>>,
        stored: u64,
    ) -> Result<Kind, ArchiveError> {
        let wrong = |problem: String| ArchiveError::Entry(path.to_vec(), problem);
        let target = || link.unwrap_or_else(|| text(header.field(157..257)).to_vec());
        let device = || -> Result<(u32, u32), ArchiveError> {
            Ok((header.small(329..337).map_err(wrong)?, header.small(337..345).map_err(wrong)?))
        };
        Ok(match header.kind() {
            // The oldest archives mark directories by a slash.
            0 if path.ends_with(b"/") => Kind::Directory,
            b'0' | 0 | b'7' => Kind::File { map: None },
            b'S' => {
                let map = self.old_gnu_map(header, stored).map_err(|error| error.named(path))?;
                Kind::File { map: Some(map) }
            }
            b'1' => Kind::HardLink { target: target() },
            b'2' => Kind::SymbolicLink { target: target() },
            b'3' => device().map(|(major, minor)| Kind::CharacterDevice { major, minor })?,
            b'4' => device().map(|(major, minor)| Kind::BlockDevice { major, minor })?,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => {
                let shown = char::from(other).escape_default();
                return Err(wrong(format!("is of the unknown type '{shown}'")));
            }
        })
    }

    fn set_data(&mut self, stored: u64) {
        self.left = stored;
        self.padding = stored.wrapping_neg() % 512;
    }

    /// Data of the current entry; 0 at its end.
    ///
    /// # Errors
    ///
    /// The archive ends too early.
    pub(super) fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.left).unwrap_or(usize::MAX).min(into.len());
        let into = into.get_mut(..wanted).unwrap_or_default();
        if into.is_empty() {
            return Ok(0);
        }
        let read = self.from.read(into)?;
        if read == 0 {
            return Err(cut_short());
        }
        self.left -= u64::try_from(read).unwrap_or_default();
        Ok(read)
    }

    fn skip(&mut self) -> io::Result<()> {
        self.left = self.left.saturating_add(std::mem::take(&mut self.padding));
        let mut chunk = [0; 16 << 10];
        while self.read(&mut chunk)? > 0 {}
        Ok(())
    }

    /// One block; `None` at a clean end.
    fn header(&mut self) -> Result<Option<Header>, ArchiveError> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while let Some(rest) = block.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.from.read(rest)? {
                0 if filled == 0 => return Ok(None),
                0 => return Err(cut_short().into()),
                read => filled += read,
            }
        }
        if block.iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
        let header = Header(block);
        if header.checksum_holds() {
            Ok(Some(header))
        } else {
            Err(io::Error::new(io::ErrorKind::InvalidData, "a tar header's checksum is wrong").into())
        }
    }

    fn body(&mut self, name: &[u8], size: u64, allowance: &mut u64) -> Result<Vec<u8>, ArchiveError> {
        let Some(left) = allowance.checked_sub(size) else {
            let problem =
                format!("has extended headers of more than {LARGEST_HEADER} bytes, the last of {size}");
            return Err(ArchiveError::Entry(name.to_vec(), problem));
        };
        *allowance = left;
        self.set_data(size);
        let mut body = vec![0; usize::try_from(size).unwrap_or_default()];
        self.fill(&mut body)?;
        Ok(body)
    }

    fn fill(&mut self, mut into: &mut [u8]) -> io::Result<()> {
        while !into.is_empty() {
            let read = self.read(into)?;
            if read == 0 {
                return Err(cut_short());
            }
            into = into.get_mut(read..).unwrap_or_default();
        }
        Ok(())
    }

    /// Four pieces in the header, 21 in each block that follows (GNU tar, *old GNU format*).
    fn old_gnu_map(&mut self, header: &Header, stored: u64) -> Result<Map, ArchiveError> {
        let wrong = |problem| ArchiveError::Entry(header.name(), problem);
        let mut numbers = Vec::new();
        let pieces =
            |block: &Header, from: usize, count: usize, numbers: &mut Vec<u64>| -> Result<(), String> {
                for at in (0..count).map(|n| from + 24 * n) {
                    // An unused one is all zeros.
                    if text(block.field(at + 12..at + 24)).is_empty() {
                        break;
                    }
                    numbers.extend([block.number(at..at + 12)?, block.number(at + 12..at + 24)?]);
                }
                Ok(())
            };
        pieces(header, 386, 4, &mut numbers).map_err(wrong)?;
        let mut more = header.field(482..483) != [0];
        while more {
            let mut block = Header([0; BLOCK]);
            self.left = 512;
            self.fill(&mut block.0)?;
            pieces(&block, 0, 21, &mut numbers).map_err(wrong)?;
            if numbers.len() > 2 * MOST_PIECES {
                return Err(wrong(format!("has more than {MOST_PIECES} pieces")));
            }
            more = block.field(504..505) != [0];
        }
        Map::new(&numbers, header.number(483..495).map_err(wrong)?, stored).map_err(wrong)
    }

    /// Decimal lines: how many pieces, then offset and length of each; padded to a block.
    fn map_before_data(&mut self, path: &[u8]) -> Result<Vec<u64>, ArchiveError> {
        let wrong = || ArchiveError::Entry(path.to_vec(), "has a malformed sparse map".into());
        let (mut numbers, mut number, mut digits) = (Vec::new(), 0_u64, 0);
        let mut wanted = None;
        let mut block = [0; BLOCK];
        while wanted.is_none_or(|wanted| numbers.len() < wanted) {
            if self.left < 512 {
                return Err(wrong());
            }
            self.fill(&mut block)?;
            for &byte in &block {
                if wanted.is_some_and(|wanted| numbers.len() == wanted) {
                    break;
                }
                match byte {
                    b'0'..=b'9' if digits < 20 => {
                        let next = number.checked_mul(10).and_then(|n| n.checked_add(u64::from(byte - b'0')));
                        (number, digits) = (next.ok_or_else(wrong)?, digits + 1);
                    }
                    b'\n' if digits > 0 => {
                        match wanted {
                            None => {
                                let pieces = usize::try_from(number).ok().filter(|&n| n <= MOST_PIECES);
                                wanted = Some(2 * pieces.ok_or_else(wrong)?);
                            }
                            Some(_) => numbers.push(number),
                        }
                        (number, digits) = (0, 0);
                    }
                    _ => return Err(wrong()),
                }
            }
        }
        Ok(numbers)
    }
}

impl ArchiveError {
    /// With the entry's full name, where the header had a short one.
    fn named(self, path: &[u8]) -> Self {
        match self {
            Self::Entry(_, problem) => Self::Entry(path.to_vec(), problem),
            Self::Damaged(error) => Self::Damaged(error),
        }
    }
}

fn cut_short() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the archive is cut short")
}

/// A long name. An empty one is none.
fn long(body: &[u8]) -> Option<Vec<u8>> {
    Some(text(body).to_vec()).filter(|name| !name.is_empty())
}

/// Up to the first zero byte.
fn text(field: &[u8]) -> &[u8] {
    field.split(|&byte| byte == 0).next().unwrap_or_default()
}

#[derive(Debug)]
struct Header([u8; BLOCK]);

impl Header {
    /// Ranges are constants inside the block.
    fn field(&self, range: std::ops::Range<usize>) -> &[u8] {
        self.0.get(range).unwrap_or_default()
    }

    fn kind(&self) -> u8 {
        self.0[156]
    }

    fn name(&self) -> Vec<u8> {
        let name = text(self.field(0..100));
        let prefix = text(self.field(345..500));
        // GNU's own magic has other fields where ustar has the prefix.
        if self.field(257..263) == b"ustar\0" && !prefix.is_empty() {
            [prefix, b"/", name].concat()
        } else {
            name.to_vec()
        }
    }

    /// The sum of all bytes, its own field as spaces; some old programs took them as signed.
    fn checksum_holds(&self) -> bool {
        let Ok(expected) = self.number(148..156) else { return false };
        let bytes = || {
            self.0.iter().enumerate().map(|(at, &byte)| if (148..156).contains(&at) { b' ' } else { byte })
        };
        let unsigned: u64 = bytes().map(u64::from).sum();
        let signed: i64 = bytes().map(|byte| i64::from(byte.cast_signed())).sum();
        unsigned == expected || u64::try_from(signed) == Ok(expected)
    }

    /// Octal digits with spaces around, or GNU's big-endian binary; negative numbers only where [`Header::time`] reads.
    fn signed(&self, range: std::ops::Range<usize>) -> Result<i128, String> {
        let field = self.field(range.clone());
        if let Some((&first @ (0x80 | 0xff), rest)) = field.split_first() {
            let start = if first == 0xff { -1_i128 } else { 0 };
            let number = rest
                .iter()
                .try_fold(start, |number, &byte| number.checked_mul(256)?.checked_add(i128::from(byte)));
            return number.ok_or_else(|| format!("has a number beyond all bounds at byte {}", range.start));
        }
        // Fields that nobody needed, or that were too short for their number, begin with zero bytes in some old archives.
        let start = field.iter().take_while(|&&byte| byte == 0 || byte == b' ').count();
        let digits = text(field.get(start..).unwrap_or_default()).trim_ascii_end();
        let mut number = 0_i128;
        for digit in digits {
            if !(b'0'..=b'7').contains(digit) {
                return Err(format!("has a malformed number at byte {} of its header", range.start));
            }
            number = number * 8 + i128::from(digit - b'0');
        }
        Ok(number)
    }

    fn number(&self, range: std::ops::Range<usize>) -> Result<u64, String> {
        let number = self.signed(range.clone())?;
        u64::try_from(number)
            .map_err(|_| format!("has a number out of range at byte {} of its header", range.start))
    }

    fn small(&self, range: std::ops::Range<usize>) -> Result<u32, String> {
        let number = self.signed(range.clone())?;
        u32::try_from(number)
            .map_err(|_| format!("has a number out of range at byte {} of its header", range.start))
    }

    fn time(&self) -> Result<(i64, u32), String> {
        let seconds = self.signed(136..148)?;
        let seconds = i64::try_from(seconds).map_err(|_| "has a time beyond all bounds".to_owned())?;
        Ok((seconds, 0))
    }
}
