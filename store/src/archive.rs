//! The outer tar of an image archive, read strictly and in place.
//!
//! In: a file that can be read in any order. Out: its entries by name, as sections of the file. Nothing is extracted, no name reaches
//! a file system, and nothing is allocated by what a header claims. What is read is what `skopeo`, `docker save`, `podman save`, `umoci` and
//! GNU tar write of such trees: files, folders and links in ustar (POSIX.1-2017, pax, "ustar Interchange Format"), with pax's
//! `path`, `size` and `linkpath`, GNU's long names and its binary sizes. All else is refused, since it has no business in an image archive.
//!
//! It needs nothing but the opened file: a caller that wants this parser in a confined child can have it there.

use std::collections::BTreeMap;

use crate::printable::Printable;
use crate::section::{Section, SectionError};

mod header;

use header::{BLOCK, Header, Kind, Pax};

/// The most entries of an archive: 128 layers have three each, and 16,384 are hundreds of images.
const MOST_ENTRIES: usize = 16_384;
/// The longest pax header or GNU long name, in bytes.
const LONGEST_EXTENSION: u64 = 64 << 10;
/// The longest name, in bytes: `PATH_MAX`.
const LONGEST_NAME: usize = 4096;

/// Why a file is no image archive.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// Not a tar.
    #[error("{0} is no tar archive.")]
    NotATar(String),
    /// A packed one.
    #[error("{path} is compressed: unpack it first, with `{tool}`.")]
    Compressed {
        /// The archive.
        path: String,
        /// What unpacks it.
        tool: &'static str,
    },
    /// Its end is missing.
    #[error("The archive {0} is truncated: it ends within an entry, or without its end mark.")]
    Truncated(String),
    /// A header that can't be right.
    #[error("The archive {path} is damaged: the header at byte {at} {what}.")]
    Damaged {
        /// The archive.
        path: String,
        /// Where.
        at: u64,
        /// What is wrong with it.
        what: &'static str,
    },
    /// `..`, an absolute name, a name that is there twice.
    #[error("The archive {path} has an entry called {name:?}, which {what}.")]
    BadName {
        /// The archive.
        path: String,
        /// The entry.
        name: Printable,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A device, a pipe, a sparse file.
    #[error("The archive {path} has the entry {name:?} of a kind that image archives don't have ({kind:?}).")]
    BadKind {
        /// The archive.
        path: String,
        /// The entry.
        name: Printable,
        /// Its type flag.
        kind: char,
    },
    /// A flood.
    #[error("The archive {0} has more than {MOST_ENTRIES} entries, the most that is read.")]
    TooManyEntries(String),
    /// The file can't be read.
    #[error(transparent)]
    Section(#[from] SectionError),
}

/// The entries of an archive.
#[derive(Debug)]
pub(crate) struct Archive {
    whole: Section,
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug)]
enum Entry {
    File(Section),
    Folder,
    /// Where it leads, from the archive's root.
    Link(String),
}

impl Archive {
    /// Reads all headers.
    pub(crate) fn read(whole: Section) -> Result<Self, ArchiveError> {
        let mut archive = Self { whole, entries: BTreeMap::new() };
        archive.scan()?;
        Ok(archive)
    }

    pub(crate) fn path(&self) -> &str {
        self.whole.path()
    }

    /// A regular file, or what a link to one leads to.
    pub(crate) fn file(&self, name: &str) -> Option<Section> {
        // `docker save` before version 25 links equal layers to the first of them: one step, never a chain.
        match self.entries.get(name)? {
            Entry::File(section) => Some(section.clone()),
            Entry::Folder => None,
            Entry::Link(to) => match self.entries.get(to)? {
                Entry::File(section) => Some(section.clone()),
                Entry::Folder | Entry::Link(_) => None,
            },
        }
    }

    fn scan(&mut self) -> Result<(), ArchiveError> {
        let mut at = 0;
        let mut pax = Pax::default();
        loop {
            let block = self.block(at)?;
            if block.iter().all(|byte| *byte == 0) {
                return Ok(());
            }
            let header = Header::parse(&block).map_err(|what| self.damaged(at, what))?;
            let content = at + BLOCK as u64;
            match header.kind {
                Kind::Pax | Kind::LongName | Kind::LongLink => {
                    let bytes = self.extension(content, header.size, at)?;
                    pax.extend(header.kind, &bytes).map_err(|what| self.damaged(at, what))?;
                    at = self.after(content, header.size)?;
                }
                // `git archive` writes one, with a comment: it may not say anything about the entries.
                Kind::GlobalPax => {
                    let bytes = self.extension(content, header.size, at)?;
                    let mut global = Pax::default();
                    global.extend(Kind::Pax, &bytes).map_err(|what| self.damaged(at, what))?;
                    if global != Pax::default() {
                        return Err(self.damaged(at, "sets names or sizes for all entries"));
                    }
                    at = self.after(content, header.size)?;
                }
                Kind::File | Kind::Folder | Kind::Symlink | Kind::Hardlink | Kind::Other(_) => {
                    at = self.entry(&header, std::mem::take(&mut pax), content)?;
                }
            }
        }
    }

    /// Takes in an entry and returns where the next header is.
    fn entry(&mut self, header: &Header, pax: Pax, content: u64) -> Result<u64, ArchiveError> {
        if self.entries.len() >= MOST_ENTRIES {
            return Err(ArchiveError::TooManyEntries(self.path().to_owned()));
        }
        let raw = pax.name.unwrap_or_else(|| header.name.clone());
        let bad = |what| ArchiveError::BadName {
            path: self.path().to_owned(),
            name: Printable::new(&String::from_utf8_lossy(&raw)),
            what,
        };
        let name = normal(&raw, "").map_err(bad)?;
        let link = || {
            let to = pax.link.as_ref().unwrap_or(&header.link);
            std::str::from_utf8(to).map_err(|_| bad("leads to a name that is not UTF-8"))
        };
        let size = pax.size.unwrap_or(header.size);
        let entry = match header.kind {
            Kind::File => {
                let section = self.whole.part(content, size);
                Entry::File(section.ok_or_else(|| ArchiveError::Truncated(self.path().to_owned()))?)
            }
            Kind::Folder => Entry::Folder,
            Kind::Symlink => {
                let folder = name.rsplit_once('/').map_or("", |(folder, _)| folder);
                Entry::Link(normal(link()?.as_bytes(), folder).map_err(bad)?)
            }
            Kind::Hardlink => Entry::Link(normal(link()?.as_bytes(), "").map_err(bad)?),
            Kind::Other(kind) => {
                let (path, name) = (self.path().to_owned(), Printable::new(&name));
                return Err(ArchiveError::BadKind { path, name, kind });
            }
            Kind::Pax | Kind::GlobalPax | Kind::LongName | Kind::LongLink => return Ok(content),
        };
        let has_content = matches!(entry, Entry::File(_));
        match (self.entries.get(&name), &entry) {
            (None, _) | (Some(Entry::Folder), Entry::Folder) => {}
            _ => return Err(bad("is there twice")),
        }
        self.entries.insert(name, entry);
        // Old tars give folders and links a size without content; ours to ignore (POSIX.1-2017, pax, "size").
        if has_content { self.after(content, size) } else { Ok(content) }
    }

    fn block(&self, at: u64) -> Result<[u8; BLOCK], ArchiveError> {
        let mut block = [0; BLOCK];
        let count = self.whole.read_at(&mut block, at)?;
        if at == 0
            && let Some(tool) = compressor(&block)
        {
            return Err(ArchiveError::Compressed { path: self.path().to_owned(), tool });
        }
        match count {
            BLOCK => Ok(block),
            _ if at == 0 => Err(ArchiveError::NotATar(self.path().to_owned())),
            _ => Err(ArchiveError::Truncated(self.path().to_owned())),
        }
    }

    fn extension(&self, content: u64, size: u64, at: u64) -> Result<Vec<u8>, ArchiveError> {
        if size > LONGEST_EXTENSION {
            return Err(self.damaged(at, "says that its extension is longer than 64 KiB"));
        }
        let part = self.whole.part(content, size);
        Ok(part.ok_or_else(|| ArchiveError::Truncated(self.path().to_owned()))?.document()?)
    }

    /// The block after some content.
    fn after(&self, content: u64, size: u64) -> Result<u64, ArchiveError> {
        let padded = size.checked_next_multiple_of(BLOCK as u64);
        padded
            .and_then(|padded| content.checked_add(padded))
            .ok_or_else(|| ArchiveError::Truncated(self.path().to_owned()))
    }

    fn damaged(&self, at: u64, what: &'static str) -> ArchiveError {
        // What isn't a tar at all fails in its first header.
        if at == 0 {
            return ArchiveError::NotATar(self.path().to_owned());
        }
        ArchiveError::Damaged { path: self.path().to_owned(), at, what }
    }
}

/// What unpacks this, if it is packed.
fn compressor(block: &[u8]) -> Option<&'static str> {
    match block {
        [0x1f, 0x8b, ..] => Some("gunzip"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Some("zstd -d"),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => Some("unxz"),
        [b'B', b'Z', b'h', ..] => Some("bunzip2"),
        _ => None,
    }
}

/// A name without `.` and empty parts; for a symbolic link's target, seen from the link's folder. The archive's root is "".
fn normal(raw: &[u8], folder: &str) -> Result<String, &'static str> {
    if raw.len() > LONGEST_NAME {
        return Err("is longer than 4096 bytes");
    }
    let text = std::str::from_utf8(raw).map_err(|_| "is not UTF-8")?;
    if text.starts_with('/') {
        return Err("is an absolute name or leads to one");
    }
    if text.contains('\0') {
        return Err("has a NUL character");
    }
    let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
    let may_climb = !parts.is_empty();
    for part in text.split('/') {
        match part {
            "" | "." => {}
            ".." if may_climb && parts.pop().is_some() => {}
            ".." => return Err("leads out of the archive by .."),
            part => parts.push(part),
        }
    }
    Ok(parts.join("/"))
}

#[cfg(test)]
mod tests;
