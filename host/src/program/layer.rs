//! A tree becomes a layer: an uncompressed tar whose bytes depend on names, contents and modes alone, kept in the store under a fingerprint of what it was
//! made of, so that the next room with the same files reads none of them.
//!
//! Entries are sorted by path, owners are root or the room's user, directories have no time, and files have their own only where somebody reads it
//! ([`Times::Kept`]). So the same program is the same layer, whoever built it and when.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::time::SystemTime;

use carrel_protocol::agent::Compression;
use carrel_store::digest::{Algorithm, Hasher};
use carrel_store::{Digest, Made, Store, StoreError, Written};
use serde::{Deserialize, Serialize};
use tar::{Builder, EntryType, Header};

use super::elf;
use super::libraries::Object;
use super::tree::{HostFile, Node, Owner, Tree};
use crate::spec::LayerSpec;

/// Of the layers' form: another one has other fingerprints.
const FORM: &[u8] = b"carrel layer of host files, 1\n";

/// What files' times are in the room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Times {
    /// 1970: a program that was built again to the same bytes is the same layer.
    Dropped,
    /// Their own, in whole seconds: Python compares them with those in its bytecode.
    Kept,
}

/// Who the room's user is, in numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ids {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// What is worth knowing of a layer without reading it again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Notes {
    /// Programs and libraries in it, with what they ask for.
    pub(crate) objects: Vec<Object>,
    /// What follows [`Wanted::mentions`] in its files.
    pub(crate) mentioned: Vec<String>,
}

/// A layer in the store.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) spec: LayerSpec,
    pub(crate) file: File,
    pub(crate) notes: Notes,
}

/// What a layer is to be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    pub(crate) tree: &'a Tree,
    pub(crate) times: Times,
    pub(crate) ids: Ids,
    /// A folder's path; names in it that occur after it in the files' bytes are noted.
    pub(crate) mentions: Option<&'a str>,
}

impl Wanted<'_> {
    /// The layer, from the store or made now. The caller holds a lease.
    pub(crate) fn obtain(&self, store: &Store) -> Result<Layer, Box<StoreError>> {
        let made = store.obtain(&self.fingerprint(), |to| self.write(to)).map_err(Box::new)?;
        let Made { digest, size, notes } = made;
        let notes = serde_json::from_value(notes).unwrap_or_default();
        let file = store.blob(&digest).map_err(Box::new)?;
        let (digest, compression) = (digest.to_string(), Compression::None);
        let spec = LayerSpec { diff_id: digest.clone(), digest, size, compression };
        Ok(Layer { spec, file, notes })
    }

    /// Differs where the tar would, and where the files' contents may.
    fn fingerprint(&self) -> Digest {
        let mut hasher = Hasher::new(Algorithm::Sha256);
        let mut field = |bytes: &[u8]| {
            hasher.update(&u64::try_from(bytes.len()).unwrap_or(u64::MAX).to_le_bytes());
            hasher.update(bytes);
        };
        field(FORM);
        let about = (self.times == Times::Kept, self.ids.uid, self.ids.gid, self.mentions);
        field(format!("{about:?}").as_bytes());
        for (path, node) in self.tree.nodes() {
            field(path.as_os_str().as_bytes());
            match node {
                Node::Directory { mode, owner } => field(format!("d {mode} {owner:?}").as_bytes()),
                Node::Link { target } => {
                    field(b"l");
                    field(target.as_os_str().as_bytes());
                }
                Node::Text { content, mode } => {
                    field(format!("t {mode}").as_bytes());
                    field(content.as_bytes());
                }
                Node::File(file) => {
                    let HostFile { source, mode, owner, size, mtime, ctime, identity } = file;
                    field(format!("f {mode} {owner:?} {size} {mtime:?} {ctime:?} {identity:?}").as_bytes());
                    field(source.as_os_str().as_bytes());
                }
            }
        }
        hasher.finish()
    }

    fn write(&self, to: &mut dyn Write) -> io::Result<Written> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let now = (i64::try_from(now.as_secs()).unwrap_or(i64::MAX), i64::from(now.subsec_nanos()));
        let mut tar = Builder::new(io::BufWriter::with_capacity(1 << 20, to));
        tar.sparse(false);
        let (mut notes, mut lasting) = (Notes::default(), true);
        for (path, node) in self.tree.nodes() {
            let name = path.strip_prefix("/").unwrap_or(path);
            match node {
                Node::Directory { mode, owner } => {
                    let mut header = self.header(EntryType::Directory, *mode, *owner);
                    tar.append_data(&mut header, name, io::empty())?;
                }
                Node::Link { target } => {
                    let mut header = self.header(EntryType::Symlink, 0o777, Owner::Root);
                    tar.append_link(&mut header, name, target)?;
                }
                Node::Text { content, mode } => {
                    let mut header = self.header(EntryType::Regular, *mode, Owner::Root);
                    header.set_size(u64::try_from(content.len()).unwrap_or(u64::MAX));
                    tar.append_data(&mut header, name, content.as_bytes())?;
                }
                Node::File(file) => {
                    lasting &= file.is_settled(now);
                    let mut header = self.header(EntryType::Regular, file.mode, file.owner);
                    header.set_size(file.size);
                    if self.times == Times::Kept {
                        header.set_mtime(u64::try_from(file.mtime.0).unwrap_or(0));
                    }
                    self.append(&mut tar, &mut header, name, file, &mut notes).map_err(|error| {
                        io::Error::new(error.kind(), format!("{}: {error}", file.source.display()))
                    })?;
                }
            }
        }
        tar.into_inner()?.flush()?;
        notes.mentioned.sort();
        notes.mentioned.dedup();
        Ok(Written { notes: serde_json::to_value(notes)?, lasting })
    }

    fn append(
        &self,
        tar: &mut Builder<impl Write>,
        header: &mut Header,
        name: &std::path::Path,
        file: &HostFile,
        notes: &mut Notes,
    ) -> io::Result<()> {
        let content = File::open(&file.source)?;
        if !file.is_still(&content.metadata()?) {
            return Err(io::Error::other("it was changed while it was read; run this again"));
        }
        if let Some(needs) = elf::needs(&content) {
            notes.objects.push(Object { path: file.source.clone(), needs });
        }
        let mut content = content;
        io::Seek::rewind(&mut content)?;
        let mut mentions =
            Mentions { from: &content, after: self.mentions, tail: Vec::new(), found: Vec::new() };
        // One that became shorter leaves the archive damaged, which the second look finds.
        tar.append_data(header, name, Read::take(&mut mentions, file.size))?;
        notes.mentioned.append(&mut mentions.found);
        match file.is_still(&content.metadata()?) {
            true => Ok(()),
            false => Err(io::Error::other("it was changed while it was read; run this again")),
        }
    }

    fn header(&self, kind: EntryType, mode: u32, owner: Owner) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_mtime(0);
        header.set_size(0);
        let (uid, gid) = match owner {
            Owner::Root => (0, 0),
            Owner::User => (self.ids.uid, self.ids.gid),
        };
        header.set_uid(uid.into());
        header.set_gid(gid.into());
        header
    }
}

/// A file as it is read, and the names that follow a folder's path in it: `env!("CARGO_BIN_EXE_x")` leaves such in a program.
struct Mentions<'a> {
    from: &'a File,
    after: Option<&'a str>,
    /// The end of what was read before, which the path or a name may span.
    tail: Vec<u8>,
    found: Vec<String>,
}

/// Longest name that is looked for.
const LONGEST_NAME: usize = 128;

impl Read for Mentions<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.from.read(buffer)?;
        if let Some(after) = self.after {
            self.tail.extend_from_slice(buffer.get(..read).unwrap_or_default());
            self.found.extend(mentioned(&self.tail, after));
            let kept = self.tail.len().saturating_sub(after.len() + LONGEST_NAME);
            self.tail.drain(..kept);
        }
        Ok(read)
    }
}

fn mentioned<'a>(bytes: &'a [u8], after: &'a str) -> impl Iterator<Item = String> + 'a {
    let word = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    memchr::memmem::find_iter(bytes, after).filter_map(move |at| {
        let rest = bytes.get(at + after.len()..)?;
        let name: Vec<u8> = rest.iter().copied().take(LONGEST_NAME).take_while(word).collect();
        String::from_utf8(name).ok().filter(|name| !name.is_empty())
    })
}

#[cfg(test)]
mod tests;
