//! The digest of a file that is mostly holes.
//!
//! ```text
//!   SHA-256 of   "carrel sparse 1\n"
//!                length of the file                u64, little-endian
//!                for each block that is not all zeros, in order:
//!                    its offset                    u64, little-endian
//!                    its bytes                     4096, fewer at the end of the file
//! ```
//!
//! It is a digest of the content alone: a block of zeros counts for nothing, whether the file system keeps it or not, so a copy
//! that filled the holes has the same digest. Since the length comes first, no two contents are spelt alike. Holes are skipped
//! (lseek(2), `SEEK_DATA`), which makes it as quick as what is allocated: a plain SHA-256 would hash every zero of a guest's empty memory.

use std::fmt::{self, Debug, Display, Formatter};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::str::FromStr;

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::digest::{Algorithm, Hasher};
use crate::printable::Printable;

const PREFIX: &str = "sparse-sha256:";
/// What is left out if it is zeros, in bytes: a page, and a block of nearly every file system.
const BLOCK: usize = 4096;
/// How much is read at a time, in bytes; a multiple of the block.
const CHUNK: u64 = 1 << 20;

/// Why words are no such digest.
#[derive(Debug, thiserror::Error)]
#[error(
    "{0:?} is no digest of a template's file: it is written as sparse-sha256:… with 64 lower-case hexadecimal digits."
)]
pub struct SparseDigestError(Printable);

/// The digest of a file of a template, written as `sparse-sha256:` and 64 digits.
#[derive(Clone, PartialEq, Eq)]
pub struct SparseDigest(String);

impl SparseDigest {
    /// Digests a file from its first byte to `length`, in bytes. Where the file stands is not changed for reads by offset, and is afterwards
    /// anywhere.
    ///
    /// # Errors
    ///
    /// If it can't be read, or ends before `length`.
    pub fn of(file: &File, length: u64) -> io::Result<Self> {
        let mut hasher = Hasher::new(Algorithm::Sha256);
        hasher.update(b"carrel sparse 1\n");
        hasher.update(&length.to_le_bytes());
        let mut buffer = Vec::new();
        let mut offset = 0;
        while let Some(data) = next_data(file, offset, length)? {
            // From the beginning of the block in which data begins, up to the chunk's end.
            offset = data - data % BLOCK as u64;
            let count = CHUNK.min(length - offset);
            buffer.resize(usize::try_from(count).map_err(io::Error::other)?, 0);
            file.read_exact_at(&mut buffer, offset)?;
            for block in buffer.chunks(BLOCK) {
                if block.iter().any(|byte| *byte != 0) {
                    hasher.update(&offset.to_le_bytes());
                    hasher.update(block);
                }
                offset += block.len() as u64;
            }
        }
        Ok(Self(hasher.finish().digits().to_owned()))
    }
}

/// Where the next bytes that may not be zeros are, from `offset` on and before `length`.
fn next_data(file: &File, offset: u64, length: u64) -> io::Result<Option<u64>> {
    if offset >= length {
        return Ok(None);
    }
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(data) => Ok(Some(data).filter(|data| *data < length)),
        // Nothing but a hole up to the end; whether the end is where it should be is the caller's to check.
        Err(Errno::NXIO) => Ok(None),
        // A file system without holes.
        Err(Errno::INVAL) => Ok(Some(offset)),
        Err(error) => Err(error.into()),
    }
}

impl FromStr for SparseDigest {
    type Err = SparseDigestError;

    fn from_str(text: &str) -> Result<Self, SparseDigestError> {
        match text.strip_prefix(PREFIX) {
            Some(digits) if digits.len() == 64 && super::key::are_digits(digits) => {
                Ok(Self(digits.to_owned()))
            }
            Some(_) | None => Err(SparseDigestError(Printable::new(text))),
        }
    }
}

impl Display for SparseDigest {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", self.0)
    }
}

impl Debug for SparseDigest {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        Display::fmt(self, f)
    }
}

impl Serialize for SparseDigest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SparseDigest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::time::Instant;

    use proptest::prelude::*;

    use super::*;
    use crate::digest::Digest;

    fn digest(file: &File) -> SparseDigest {
        SparseDigest::of(file, file.metadata().unwrap().len()).unwrap()
    }

    /// What the module's head says, word by word.
    fn by_the_book(content: &[u8]) -> SparseDigest {
        let mut told = b"carrel sparse 1\n".to_vec();
        told.extend((content.len() as u64).to_le_bytes());
        for (at, block) in content.chunks(4096).enumerate().filter(|(_, block)| block.iter().any(|b| *b != 0))
        {
            told.extend((at as u64 * 4096).to_le_bytes());
            told.extend(block);
        }
        SparseDigest(Digest::of(&told).digits().to_owned())
    }

    #[test]
    fn the_digest_is_pinned() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 30).unwrap();
        file.write_all_at(b"carrel", 5000).unwrap();
        file.write_all_at(b"end", (1 << 30) - 3).unwrap();
        assert_eq!(
            digest(&file).to_string(),
            "sparse-sha256:2701f9dd943a5e039097b351a0c8d5eef7458e85f2d4903a591238627a8513ef"
        );
    }

    #[test]
    fn holes_and_zeros_are_the_same_and_length_is_not() {
        let (holes, zeros) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        holes.set_len(3_000_000).unwrap();
        zeros.write_all_at(&vec![0; 3_000_000], 0).unwrap();
        assert!(holes.metadata().unwrap().blocks() < zeros.metadata().unwrap().blocks());
        assert_eq!(digest(&holes), digest(&zeros));
        holes.set_len(3_000_001).unwrap();
        assert_ne!(digest(&holes), digest(&zeros));
    }

    #[test]
    fn a_hole_of_a_tebibyte_costs_nothing() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 40).unwrap();
        file.write_all_at(b"x", 1 << 39).unwrap();
        let begun = Instant::now();
        digest(&file);
        // Hashing it would take a quarter of an hour at best.
        assert!(begun.elapsed().as_secs() < 20);
    }

    #[test]
    fn a_file_that_ends_early_is_an_error_if_data_was_lost_with_it() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"short", 0).unwrap();
        assert_eq!(SparseDigest::of(&file, 6).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn what_is_no_digest_is_refused() {
        let digits = "0123456789abcdef".repeat(4);
        let good = format!("sparse-sha256:{digits}");
        assert_eq!(good.parse::<SparseDigest>().unwrap().to_string(), good);
        for wrong in
            ["", "sparse-sha256:", &digits, &good.to_uppercase(), &good[..77], &format!("sha256:{digits}")]
        {
            assert!(wrong.parse::<SparseDigest>().is_err(), "{wrong}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_layout_of_holes_gives_what_the_book_says(
            pieces in prop::collection::vec((0_u64..3_000_000, prop::collection::vec(any::<u8>(), 1..9000), any::<bool>()), 0..6),
            length in 0_u64..3_100_000,
        ) {
            let file = tempfile::tempfile().unwrap();
            for (at, bytes, zero) in &pieces {
                let bytes = if *zero { vec![0; bytes.len()] } else { bytes.clone() };
                file.write_all_at(&bytes, *at).unwrap();
            }
            file.set_len(length).unwrap();
            let mut content = vec![0; usize::try_from(length).unwrap()];
            file.read_exact_at(&mut content, 0).unwrap();
            prop_assert_eq!(digest(&file), by_the_book(&content));
        }
    }
}
