//! Reads all headers of a tar, strictly and in place.
//!
//! Nothing is allocated by what a header claims. What is read is what `skopeo`, `docker save`, `podman save`, `umoci` and GNU tar write of such
//! trees: files, folders and links in ustar (POSIX.1-2017, pax, "ustar Interchange Format"), with pax's `path`, `size` and `linkpath`,
//! GNU's long names and its binary sizes. All else is refused, since it has no business in an image archive.
//!
//! It needs nothing but the opened file and pread(2), so that it runs in a process that has nothing else.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::header::{self, BLOCK, Header, Pax};
use super::index::{Entry, Index, Kind};
use super::name::normal;
use super::refusal::{Compressor, Damage, NameFault, Refusal};
use crate::printable::Printable;

/// The longest pax header or GNU long name, in bytes.
const LONGEST_EXTENSION: u64 = 64 << 10;
/// The most headers: an entry may have a long name, a long link and a pax header before it, and folders may come again.
const MOST_HEADERS: usize = 1 << 17;

/// The entries of an archive of so many bytes.
pub(super) fn scan(archive: &File, length: u64) -> Result<Index, Refusal> {
    let mut scan = Scan { archive, length, index: Index::new(length) };
    scan.headers()?;
    Ok(scan.index)
}

struct Scan<'a> {
    archive: &'a File,
    length: u64,
    index: Index,
}

impl Scan<'_> {
    fn headers(&mut self) -> Result<(), Refusal> {
        let mut at = 0;
        let mut pax = Pax::default();
        for _ in 0..MOST_HEADERS {
            let block = self.block(at)?;
            if block.iter().all(|byte| *byte == 0) {
                return Ok(());
            }
            let header = Header::parse(&block).map_err(|damage| damaged(at, damage))?;
            let content = at + BLOCK as u64;
            match header.kind {
                header::Kind::Pax | header::Kind::LongName | header::Kind::LongLink => {
                    let bytes = self.extension(content, header.size, at)?;
                    pax.extend(header.kind, &bytes).map_err(|damage| damaged(at, damage))?;
                    at = after(content, header.size)?;
                }
                // `git archive` writes one, with a comment: it may not say anything about the entries.
                header::Kind::GlobalPax => {
                    let bytes = self.extension(content, header.size, at)?;
                    let mut global = Pax::default();
                    global.extend(header::Kind::Pax, &bytes).map_err(|damage| damaged(at, damage))?;
                    if global != Pax::default() {
                        return Err(damaged(at, Damage::GlobalNames));
                    }
                    at = after(content, header.size)?;
                }
                header::Kind::File
                | header::Kind::Folder
                | header::Kind::Symlink
                | header::Kind::Hardlink
                | header::Kind::Other(_) => {
                    at = self.entry(&header, &std::mem::take(&mut pax), content)?;
                }
            }
        }
        Err(Refusal::TooManyEntries)
    }

    /// Takes in an entry and returns where the next header is.
    fn entry(&mut self, header: &Header, pax: &Pax, content: u64) -> Result<u64, Refusal> {
        let raw = pax.name.as_ref().unwrap_or(&header.name);
        let bad = |fault| Refusal::Name { name: Printable::new(&String::from_utf8_lossy(raw)), fault };
        let name = normal(raw, "").map_err(bad)?;
        let link = |folder: &str| {
            let to = pax.link.as_ref().unwrap_or(&header.link);
            normal(to, folder).map_err(|fault| {
                bad(if fault == NameFault::NotUtf8 { NameFault::LinkNotUtf8 } else { fault })
            })
        };
        let length = pax.size.unwrap_or(header.size);
        let kind = match header.kind {
            header::Kind::File => Kind::File { offset: content, length },
            header::Kind::Folder => Kind::Folder,
            header::Kind::Symlink => {
                Kind::Link { to: link(name.rsplit_once('/').map_or("", |(folder, _)| folder))? }
            }
            header::Kind::Hardlink => Kind::Link { to: link("")? },
            header::Kind::Other(kind) => return Err(Refusal::Kind { name: Printable::new(&name), kind }),
            header::Kind::Pax | header::Kind::GlobalPax | header::Kind::LongName | header::Kind::LongLink => {
                return Ok(content);
            }
        };
        let has_content = matches!(kind, Kind::File { .. });
        self.index.add(Entry { name, kind })?;
        // Old tars give folders and links a size without content; ours to ignore (POSIX.1-2017, pax, "size").
        if has_content { after(content, length) } else { Ok(content) }
    }

    fn block(&self, at: u64) -> Result<[u8; BLOCK], Refusal> {
        let mut block = [0; BLOCK];
        let count = self.read(&mut block, at)?;
        if at == 0
            && let Some(compressor) = compressor(&block)
        {
            return Err(Refusal::Compressed(compressor));
        }
        match count {
            BLOCK => Ok(block),
            _ if at == 0 => Err(Refusal::NotATar),
            _ => Err(Refusal::Truncated),
        }
    }

    fn extension(&self, content: u64, size: u64, at: u64) -> Result<Vec<u8>, Refusal> {
        if size > LONGEST_EXTENSION {
            return Err(damaged(at, Damage::LongExtension));
        }
        let mut bytes = vec![0; usize::try_from(size).unwrap_or_default()];
        let count = self.read(&mut bytes, content)?;
        if count == bytes.len() { Ok(bytes) } else { Err(Refusal::Truncated) }
    }

    /// Fills the buffer from this place, or as much of it as the archive has; returns how much.
    fn read(&self, buffer: &mut [u8], at: u64) -> Result<usize, Refusal> {
        let left = usize::try_from(self.length.saturating_sub(at)).unwrap_or(usize::MAX).min(buffer.len());
        let mut filled = 0;
        while filled < left {
            match self.archive.read_at(&mut buffer[filled..left], at + filled as u64) {
                Ok(0) => return Err(Refusal::Shortened),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Refusal::Unreadable { errno: error.raw_os_error().unwrap_or(0) }),
            }
        }
        Ok(filled)
    }
}

/// The block after some content.
fn after(content: u64, size: u64) -> Result<u64, Refusal> {
    let padded = size.checked_next_multiple_of(BLOCK as u64);
    padded.and_then(|padded| content.checked_add(padded)).ok_or(Refusal::Truncated)
}

/// What isn't a tar at all fails in its first header.
fn damaged(at: u64, damage: Damage) -> Refusal {
    if at == 0 { Refusal::NotATar } else { Refusal::Damaged { at, damage } }
}

/// What this is packed with, if it is.
fn compressor(block: &[u8]) -> Option<Compressor> {
    match block {
        [0x1f, 0x8b, ..] => Some(Compressor::Gzip),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Compressor::Zstd),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => Some(Compressor::Xz),
        [b'B', b'Z', b'h', ..] => Some(Compressor::Bzip2),
        _ => None,
    }
}
