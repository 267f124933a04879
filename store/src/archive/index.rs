//! The index of an archive: the only thing that is known of it outside of the process that reads its headers.
//!
//! An [`Index`] can't hold a wrong entry: every one, whether the scanner found it or another process tells of it, comes in by
//! [`Index::add`]. What a process that lies can still do is point at other bytes of the same archive, whose author
//! could have put those bytes anywhere.

use std::collections::BTreeMap;
use std::collections::btree_map;

use serde::{Deserialize, Serialize};

use super::name::normal;
use super::refusal::{MOST_ENTRIES, MOST_NAME_BYTES, NameFault, Refusal};
use crate::printable::Printable;

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Its name, from the archive's root, without `.`, `..` and empty parts; at most 4096 bytes.
    pub name: String,
    /// What it is.
    pub kind: Kind,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A regular file: bytes of the archive.
    File {
        /// From the archive's beginning, in bytes.
        offset: u64,
        /// In bytes.
        length: u64,
    },
    /// A folder.
    Folder,
    /// A symbolic or a hard link.
    Link {
        /// Where it leads, from the archive's root.
        to: String,
    },
}

/// All entries of one archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Index {
    entries: BTreeMap<String, Kind>,
    name_bytes: usize,
    /// The archive's, in bytes.
    length: u64,
}

impl Index {
    /// An empty one, for an archive of so many bytes.
    #[must_use]
    pub fn new(length: u64) -> Self {
        Self { entries: BTreeMap::new(), name_bytes: 0, length }
    }

    /// Takes in an entry.
    ///
    /// # Errors
    ///
    /// If the archive can't have it: its name is wrong or known, its bytes lie outside, or there are too many already.
    pub fn add(&mut self, entry: Entry) -> Result<(), Refusal> {
        let Entry { name, kind } = entry;
        let bad = |fault| Err(Refusal::Name { name: Printable::new(&name), fault });
        if self.entries.len() >= MOST_ENTRIES {
            return Err(Refusal::TooManyEntries);
        }
        let to = match &kind {
            Kind::Link { to } => to.as_str(),
            Kind::File { .. } | Kind::Folder => "",
        };
        for name in [&name, to] {
            match normal(name.as_bytes(), "") {
                Ok(normal) if normal == *name => {}
                Ok(_) => return bad(NameFault::NotNormal),
                Err(fault) => return bad(fault),
            }
        }
        if let Kind::File { offset, length } = kind
            && offset.checked_add(length).is_none_or(|end| end > self.length)
        {
            return Err(Refusal::Truncated);
        }
        // One more each, so that even a folder without a name can't come for ever.
        self.name_bytes += name.len() + to.len() + 1;
        if self.name_bytes > MOST_NAME_BYTES {
            return Err(Refusal::TooManyNameBytes);
        }
        match self.entries.entry(name) {
            btree_map::Entry::Vacant(place) => {
                place.insert(kind);
                Ok(())
            }
            // Tools write a folder again for each of its parts.
            btree_map::Entry::Occupied(known) if kind == Kind::Folder && *known.get() == Kind::Folder => {
                Ok(())
            }
            btree_map::Entry::Occupied(known) => {
                Err(Refusal::Name { name: Printable::new(known.key()), fault: NameFault::Twice })
            }
        }
    }

    /// How many entries there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.entries.len()
    }

    /// All entries, by name.
    pub fn into_entries(self) -> impl Iterator<Item = Entry> {
        self.entries.into_iter().map(|(name, kind)| Entry { name, kind })
    }

    /// Offset and length of a regular file, or of what a link to one leads to.
    pub(super) fn file(&self, name: &str) -> Option<(u64, u64)> {
        // `docker save` before version 25 links equal layers to the first of them: one step, never a chain.
        match self.entries.get(name)? {
            Kind::File { offset, length } => Some((*offset, *length)),
            Kind::Folder => None,
            Kind::Link { to } => match self.entries.get(to)? {
                Kind::File { offset, length } => Some((*offset, *length)),
                Kind::Folder | Kind::Link { .. } => None,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, offset: u64, length: u64) -> Entry {
        Entry { name: name.into(), kind: Kind::File { offset, length } }
    }

    fn fault(entry: Entry) -> NameFault {
        let refused = Index::new(100).add(entry);
        let Err(Refusal::Name { fault, .. }) = refused else { panic!("{refused:?}") };
        fault
    }

    #[test]
    fn an_index_from_elsewhere_is_held_to_the_same_rules() {
        for (name, why) in [
            ("/etc/passwd", NameFault::Absolute),
            ("../a", NameFault::LeadsOut),
            ("a/../b", NameFault::LeadsOut),
            ("./a", NameFault::NotNormal),
            ("a//b", NameFault::NotNormal),
            ("a\0", NameFault::Nul),
            (&"n".repeat(4097), NameFault::TooLong),
        ] {
            assert_eq!(fault(file(name, 0, 0)), why, "{name:.20}");
            assert_eq!(fault(Entry { name: "l".into(), kind: Kind::Link { to: name.into() } }), why);
        }
        let mut index = Index::new(100);
        index.add(file("a", 60, 40)).unwrap();
        assert_eq!(index.add(file("b", 61, 40)), Err(Refusal::Truncated));
        assert_eq!(index.add(file("b", u64::MAX, 2)), Err(Refusal::Truncated));
        assert!(matches!(index.add(file("a", 0, 0)), Err(Refusal::Name { fault: NameFault::Twice, .. })));
        assert_eq!((index.count(), index.file("a")), (1, Some((60, 40))));
    }

    #[test]
    fn floods_of_entries_and_of_names_are_refused() {
        let mut index = Index::new(0);
        for n in 0..MOST_ENTRIES {
            index.add(file(&n.to_string(), 0, 0)).unwrap();
        }
        assert_eq!(index.add(file("more", 0, 0)), Err(Refusal::TooManyEntries));
        let mut index = Index::new(0);
        let refused = (0..MOST_ENTRIES).find_map(|n| index.add(file(&format!("{n:04000}"), 0, 0)).err());
        assert_eq!(refused, Some(Refusal::TooManyNameBytes));
        // A folder that is said again and again is one entry, and not for ever.
        let mut index = Index::new(0);
        let folder = || Entry { name: "f".repeat(4000), kind: Kind::Folder };
        assert!((0..2 * MOST_ENTRIES).any(|_| index.add(folder()) == Err(Refusal::TooManyNameBytes)));
    }
}
