//! Files that are read only when they are whole, and of this version.
//!
//! ```text
//!  0   magic      8 bytes, of the kind of file
//!  8   version    u32, little-endian as all that follows
//!  12  length     u32: bytes of the body
//!  16  checksum   u64: CRC-64/XZ of the body
//!  24  body
//! ```
//!
//! The checksum finds damage, not malice: whoever can write a host's templates can write its kernels.

use crc::{CRC_64_XZ, Crc};

/// Bytes before a body.
pub(crate) const HEADER_BYTES: usize = 24;

/// A kind of file, in the version that is written and read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    pub(crate) magic: [u8; 8],
    pub(crate) version: u32,
}

/// Bytes are no whole file of a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Broken {
    /// Another kind.
    Magic,
    /// Another version, this one.
    Version(u32),
    /// Too long, too short, or not as long as they say.
    Length,
    /// They were changed.
    Checksum,
}

impl Kind {
    /// A body behind its header.
    pub(crate) fn seal(self, body: &[u8]) -> Vec<u8> {
        // One that is too long for its header is too long for any reader.
        let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
        bytes.extend(self.magic);
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(checksum(body).to_le_bytes());
        bytes.extend(body);
        bytes
    }

    /// The body of a whole file.
    ///
    /// # Errors
    ///
    /// It is none; the first reason in the order of the header.
    pub(crate) fn open(self, bytes: &[u8]) -> Result<&[u8], Broken> {
        let (header, body) = bytes.split_first_chunk::<HEADER_BYTES>().ok_or(Broken::Length)?;
        let [magic @ .., v0, v1, v2, v3, n0, n1, n2, n3, c0, c1, c2, c3, c4, c5, c6, c7] = *header;
        if magic != self.magic {
            return Err(Broken::Magic);
        }
        match u32::from_le_bytes([v0, v1, v2, v3]) {
            version if version == self.version => {}
            other => return Err(Broken::Version(other)),
        }
        if usize::try_from(u32::from_le_bytes([n0, n1, n2, n3])) != Ok(body.len()) {
            return Err(Broken::Length);
        }
        if u64::from_le_bytes([c0, c1, c2, c3, c4, c5, c6, c7]) != checksum(body) {
            return Err(Broken::Checksum);
        }
        Ok(body)
    }
}

fn checksum(body: &[u8]) -> u64 {
    const CRC: Crc<u64> = Crc::<u64>::new(&CRC_64_XZ);
    CRC.checksum(body)
}
