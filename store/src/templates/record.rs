//! Records: what a template says about itself, and whether that is still what was written.
//!
//! ```text
//!   template.json:  {"checksum":"sha256:…","record":{"version":1,"key":"…","point":"unpacked",…}}
//! ```
//!
//! The checksum is of the record's very bytes, as they stand there, so that a flipped bit in it is found before anything in it is believed. What
//! changes while a template lives is not in it: its last use is the file's mtime, and a pinned template has a file `pinned` beside it.

use std::fmt::{self, Display, Formatter};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use super::key::TemplateKey;
use super::sparse::SparseDigest;
use crate::digest::Digest;

/// The version that is written, and the only one that is read.
pub(super) const VERSION: u32 = 1;
/// A longer file is no record, in bytes.
pub(super) const LARGEST: u64 = 256 << 10;
/// A longer description is refused, in bytes of JSON.
pub const LARGEST_DESCRIPTION: usize = 64 << 10;

/// Why a file is no record.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// Longer than a record may be.
    #[error("The template's record is larger than {LARGEST} bytes.")]
    TooLarge,
    /// No JSON, or not of this form.
    #[error("The template's record can't be understood.")]
    Malformed(#[source] serde_json::Error),
    /// Other bytes than were written.
    #[error(
        "The template's record was changed or damaged: its digest is {actual}, and should be {expected}."
    )]
    Checksum {
        /// Of the bytes that were written.
        expected: Digest,
        /// Of those that are there.
        actual: Digest,
    },
    /// Of another carrel.
    #[error("The template's record is of version {0}, and {VERSION} is understood.")]
    Version(u32),
    /// It belongs to another template.
    #[error("The template's record is that of {0}.")]
    OtherKey(TemplateKey),
}

/// Where a workload stood when it was frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Point {
    /// Just before its first instruction.
    Unpacked,
    /// When it said that it was ready, or a function's handler waited for its first event. What it had read by then, secrets and seeds too, is
    /// in every clone.
    Initialised,
}

impl Display for Point {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unpacked => "unpacked",
            Self::Initialised => "initialised",
        })
    }
}

/// One of a template's three files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The VMM's state: vCPUs, interrupt chips, clock, devices.
    State,
    /// The guest's memory, sparse.
    Memory,
    /// The disk that clones share, sparse.
    Disk,
}

impl Part {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::State, Self::Memory, Self::Disk];

    /// What its file is called.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::State => "state",
            Self::Memory => "memory",
            Self::Disk => "disk",
        }
    }
}

impl Display for Part {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What is recorded of a file when it is published.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Published {
    /// Its length, in bytes, holes included.
    pub bytes: u64,
    /// What it took of the disk, in bytes.
    pub allocated_bytes: u64,
    /// Of its content.
    pub digest: SparseDigest,
    /// Whether the file system itself checks what is read (fs-verity).
    pub verity: bool,
}

/// What a template says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TemplateRecord {
    /// Of this form.
    version: u32,
    /// Its name.
    pub key: TemplateKey,
    /// Where the workload stood.
    pub point: Point,
    /// When it was published, in milliseconds since 1970.
    created_ms: u64,
    /// `state`.
    pub state: Published,
    /// `memory`.
    pub memory: Published,
    /// `disk`.
    pub disk: Published,
    /// What the host says about it: for people, and for the host. At most 64 KiB of JSON.
    pub description: Value,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed<'a> {
    checksum: Digest,
    #[serde(borrow)]
    record: &'a RawValue,
}

/// The one field that every version has.
#[derive(Deserialize)]
struct AnyVersion {
    version: u32,
}

impl TemplateRecord {
    /// The record of a template that is about to be published.
    pub(super) fn new(
        key: TemplateKey,
        point: Point,
        now: SystemTime,
        [state, memory, disk]: [Published; 3],
        description: Value,
    ) -> Self {
        let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let created_ms = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
        Self { version: VERSION, key, point, created_ms, state, memory, disk, description }
    }

    /// When it was published.
    #[must_use]
    pub fn created(&self) -> SystemTime {
        // A record that was made to lie may name a moment that no clock reaches.
        let since = Duration::from_millis(self.created_ms);
        SystemTime::UNIX_EPOCH.checked_add(since).unwrap_or(SystemTime::UNIX_EPOCH)
    }

    /// What is recorded of one of its files.
    #[must_use]
    pub fn part(&self, part: Part) -> &Published {
        match part {
            Part::State => &self.state,
            Part::Memory => &self.memory,
            Part::Disk => &self.disk,
        }
    }

    /// The length of its files together, in bytes, holes included.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        Part::ALL.iter().fold(0, |sum: u64, part| sum.saturating_add(self.part(*part).bytes))
    }

    /// As it is written to `template.json`.
    pub(super) fn seal(&self) -> Result<Vec<u8>, serde_json::Error> {
        let record = serde_json::to_string(self)?;
        let checksum = Digest::of(record.as_bytes());
        Ok(format!("{{\"checksum\":\"{checksum}\",\"record\":{record}}}\n").into_bytes())
    }

    /// Reads what was written, and believes it only whole.
    ///
    /// # Errors
    ///
    /// If it is no record of this version, not this key's, or was changed.
    pub fn parse(bytes: &[u8], key: &TemplateKey) -> Result<Self, RecordError> {
        let sealed: Sealed<'_> = serde_json::from_slice(bytes).map_err(RecordError::Malformed)?;
        let text = sealed.record.get();
        let actual = Digest::of(text.as_bytes());
        if actual != sealed.checksum {
            return Err(RecordError::Checksum { expected: sealed.checksum, actual });
        }
        let AnyVersion { version } = serde_json::from_str(text).map_err(RecordError::Malformed)?;
        if version != VERSION {
            return Err(RecordError::Version(version));
        }
        let record: Self = serde_json::from_str(text).map_err(RecordError::Malformed)?;
        if record.key != *key {
            return Err(RecordError::OtherKey(record.key));
        }
        Ok(record)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const CREATED: Duration = Duration::from_millis(1_795_000_000_123);

    fn key() -> TemplateKey {
        "0123456789abcdef".repeat(4).parse().unwrap()
    }

    fn published(bytes: u64) -> Published {
        let digest = format!("sparse-sha256:{}", "5".repeat(64)).parse().unwrap();
        Published { bytes, allocated_bytes: 4096, digest, verity: bytes > 100 }
    }

    fn record(description: Value) -> TemplateRecord {
        let parts = [7, 128 << 20, 1 << 33].map(published);
        TemplateRecord::new(key(), Point::Initialised, SystemTime::UNIX_EPOCH + CREATED, parts, description)
    }

    #[test]
    fn the_form_is_pinned() {
        let digest = format!("sparse-sha256:{}", "5".repeat(64));
        let text = format!(
            r#"{{"version":1,"key":"{}","point":"initialised","created_ms":1795000000123,"state":{{"bytes":7,"allocated_bytes":4096,"digest":"{digest}","verity":false}},"memory":{{"bytes":134217728,"allocated_bytes":4096,"digest":"{digest}","verity":true}},"disk":{{"bytes":8589934592,"allocated_bytes":4096,"digest":"{digest}","verity":true}},"description":{{"image":"alpine"}}}}"#,
            key()
        );
        let sealed = format!("{{\"checksum\":\"{}\",\"record\":{text}}}\n", Digest::of(text.as_bytes()));
        let record = record(json!({ "image": "alpine" }));
        assert_eq!(String::from_utf8(record.seal().unwrap()).unwrap(), sealed);
        assert_eq!(TemplateRecord::parse(sealed.as_bytes(), &key()).unwrap(), record);
        assert_eq!(record.created(), SystemTime::UNIX_EPOCH + CREATED);
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let description = json!({ "image": "alpine:3.20", "domain": "default", "memory_mib": 128 });
        let sealed = record(description).seal().unwrap();
        for at in 0..sealed.len() * 8 {
            let mut flipped = sealed.clone();
            flipped[at / 8] ^= 1 << (at % 8);
            assert!(TemplateRecord::parse(&flipped, &key()).is_err(), "bit {at}");
        }
    }

    #[test]
    fn another_version_or_key_is_named() {
        let later = TemplateRecord { version: 2, ..record(Value::Null) }.seal().unwrap();
        assert!(matches!(TemplateRecord::parse(&later, &key()), Err(RecordError::Version(2))));
        let unlike = r#"{"version":3,"new":true}"#;
        let unlike = format!(r#"{{"checksum":"{}","record":{unlike}}}"#, Digest::of(unlike.as_bytes()));
        assert!(matches!(TemplateRecord::parse(unlike.as_bytes(), &key()), Err(RecordError::Version(3))));
        let other: TemplateKey = "f".repeat(64).parse().unwrap();
        let sealed = record(Value::Null).seal().unwrap();
        assert!(matches!(TemplateRecord::parse(&sealed, &other), Err(RecordError::OtherKey(_))));
    }

    #[test]
    fn a_moment_beyond_all_clocks_is_no_crash() {
        let far = TemplateRecord { created_ms: u64::MAX, ..record(Value::Null) };
        assert_eq!(
            far.seal().map(|text| TemplateRecord::parse(&text, &key()).unwrap().created()).unwrap(),
            far.created()
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_record_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(TemplateRecord::parse(&bytes, &key()).is_err());
        }

        #[test]
        fn a_record_that_was_cut_or_spliced_is_an_error(
            at in 0_usize..700, with in prop::collection::vec(any::<u8>(), 0..8), gone in 0_usize..8,
        ) {
            let record = record(json!({ "image": "alpine" }));
            let sealed = record.seal().unwrap();
            let at = at.min(sealed.len());
            let mut spliced = sealed.clone();
            spliced.splice(at..(at + gone).min(sealed.len()), with);
            if let Ok(read) = TemplateRecord::parse(&spliced, &key()) {
                prop_assert_eq!(read, record, "what is accepted is what was written");
            }
        }

        #[test]
        fn what_is_written_is_read(
            sizes in any::<[u64; 3]>(), created_ms in any::<u64>(), text in ".{0,40}", number in any::<i64>(),
        ) {
            let parts = sizes.map(published);
            let made = SystemTime::UNIX_EPOCH + Duration::from_millis(created_ms >> 8);
            let description = json!({ "text": text, "number": number, "fraction": 0.5 });
            let record = TemplateRecord::new(key(), Point::Unpacked, made, parts, description);
            prop_assert_eq!(TemplateRecord::parse(&record.seal().unwrap(), &key()).unwrap(), record);
        }
    }
}
