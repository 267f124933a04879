//! What an archive's reader and whoever started it say to each other: packets over a socketpair, both ends one program of one build.
//!
//! ```text
//!   reader ─▶ Ready | Unconfined        once it is confined, or can't be
//!   reader ◀─ Read + the archive        one descriptor, open for reading
//!   reader ─▶ Entries … Done | Refused
//! ```

use carrel_store::archive::{Entry, Refusal};
use serde::{Deserialize, Serialize};

const KIB: u32 = 1 << 10;
/// The most of one packet of entries. The longest entry, all of it escaped in JSON, takes 49 KiB.
pub(super) const ENTRIES_BYTES: usize = 80 << 10;

carrel_protocol::messages! {
    /// What the reader is told.
    ToReader {
        1 Read KIB;
    }
}

carrel_protocol::messages! {
    /// What the reader tells.
    FromReader {
        1 Ready KIB;
        2 Unconfined KIB;
        3 Entries 84 * KIB;
        4 Done KIB;
        5 Refused 4 * KIB;
    }
}

/// Read this archive; its descriptor comes along.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Read {
    /// The archive's, in bytes.
    pub length: u64,
}

/// Confined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ready {}

/// A part of the confinement can't be had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unconfined {
    /// Which, and why.
    pub part: String,
}

/// Some entries, at least one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entries(pub Vec<Entry>);

/// There are no more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Done {}

/// It is no image archive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused(pub Refusal);

#[cfg(test)]
mod tests {
    use carrel_protocol::Message;
    use carrel_store::archive::{Kind, NameFault};
    use carrel_store::printable::Printable;

    use super::*;

    #[test]
    fn the_longest_entry_has_room_in_a_packet() {
        // A control character takes six bytes of JSON.
        let longest = "\u{1}".repeat(4096);
        let entry = Entry { name: longest.clone(), kind: Kind::Link { to: longest } };
        let encoded = FromReader::from(Entries(vec![entry])).encode().unwrap();
        assert!(encoded.len() < ENTRIES_BYTES);
        const { assert!(ENTRIES_BYTES < carrel_protocol::vmm::MAX_PACKET_BYTES) };
        let name = Printable::new(&"\u{10ffff}".repeat(300));
        FromReader::from(Refused(Refusal::Name { name, fault: NameFault::LinkNotUtf8 })).encode().unwrap();
    }

    #[test]
    fn an_entrys_name_is_cleaned_again_where_it_arrives() {
        let body = br#"{"kind":{"name":"a\u001b[2J","kind":"3"}}"#;
        let Ok(FromReader::Refused(Refused(refusal))) = FromReader::from_body(5, body) else { panic!() };
        assert_eq!(refusal, Refusal::Kind { name: Printable::new("a[2J"), kind: '3' });
    }
}
