//! Bytes that are verified while they pass: a blob as it was sent, and a layer as it was before compression.

use std::io::{self, Read};

use carrel_protocol::agent::Layer;
use sha2::{Digest, Sha256, Sha512};

use super::{Budget, UnpackError};

/// The digests of OCI (image-spec, descriptor.md, *Registered Algorithms*).
#[derive(Clone)]
enum Hasher {
    Sha256(Sha256),
    Sha512(Sha512),
}

impl Hasher {
    /// For a digest as text; `None` if it is none that is known.
    fn of(digest: &str) -> Option<Self> {
        let (algorithm, hex) = digest.split_once(':')?;
        let digits = hex.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        match (algorithm, hex.len()) {
            ("sha256", 64) if digits => Some(Self::Sha256(Sha256::new())),
            ("sha512", 128) if digits => Some(Self::Sha512(Sha512::new())),
            _ => None,
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Sha512(hasher) => hasher.update(bytes),
        }
    }

    fn finish(&self) -> String {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        match self {
            Self::Sha256(hasher) => format!("sha256:{}", hex(&hasher.clone().finalize())),
            Self::Sha512(hasher) => format!("sha512:{}", hex(&hasher.clone().finalize())),
        }
    }
}

/// A blob on its way.
pub(super) struct Blob<R> {
    from: R,
    digest: String,
    size: u64,
    left: u64,
    hasher: Hasher,
}

impl<R: Read> Blob<R> {
    pub(super) fn new(from: R, blob: &carrel_protocol::agent::Blob) -> Result<Self, UnpackError> {
        let hasher = Hasher::of(&blob.digest).ok_or_else(|| UnpackError::Blob {
            name: super::shown(blob.digest.as_bytes()),
            problem: "its name is no sha256 or sha512 digest".into(),
        })?;
        Ok(Self { from, digest: blob.digest.clone(), size: blob.size, left: blob.size, hasher })
    }

    /// Reads what is left, then compares.
    ///
    /// # Errors
    ///
    /// Fewer bytes than announced, more, or others.
    pub(super) fn finish(&mut self) -> Result<(), UnpackError> {
        let mut chunk = vec![0; 64 << 10];
        while self.left > 0 {
            match self.read(&mut chunk) {
                Ok(1..) => {}
                Ok(0) | Err(_) => {
                    let got = self.size - self.left;
                    return Err(self.failed(format!("its size is {got} bytes, {} were announced", self.size)));
                }
            }
        }
        if matches!(self.from.read(&mut [0]), Ok(1..)) {
            return Err(
                self.failed(format!("its size is more than the {} bytes that were announced", self.size))
            );
        }
        let found = self.hasher.finish();
        if found == self.digest { Ok(()) } else { Err(self.failed(format!("its digest is {found}"))) }
    }
}

impl<R> Blob<R> {
    fn failed(&self, problem: String) -> UnpackError {
        UnpackError::Blob { name: self.digest.clone(), problem }
    }
}

impl<R: Read> Read for Blob<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.left).unwrap_or(usize::MAX).min(into.len());
        let into = into.get_mut(..wanted).unwrap_or_default();
        if into.is_empty() {
            return Ok(0);
        }
        let read = loop {
            match self.from.read(into) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        self.hasher.update(into.get(..read).unwrap_or_default());
        self.left -= u64::try_from(read).unwrap_or_default();
        Ok(read)
    }
}

/// A decompressed layer on its way. The budget pays for every byte as it is read: nothing, however it is packed and whether it is
/// looked at or passed over, unpacks to more. Reaching the cap is an [`io::Error`] that holds the [`UnpackError`].
pub(super) struct Plain<'a> {
    from: Box<dyn Read + 'a>,
    layer: &'a Layer,
    hasher: Hasher,
    budget: &'a Budget,
}

impl<'a> Plain<'a> {
    pub(super) fn new(
        from: Box<dyn Read + 'a>,
        layer: &'a Layer,
        budget: &'a Budget,
    ) -> Result<Self, UnpackError> {
        let hasher = Hasher::of(&layer.diff_id).ok_or_else(|| UnpackError::Blob {
            name: layer.blob.digest.clone(),
            problem: format!(
                "its diff_id '{}' in the image's configuration is no sha256 or sha512 digest",
                super::shown(layer.diff_id.as_bytes())
            ),
        })?;
        Ok(Self { from, layer, hasher, budget })
    }

    /// Reads what follows the archive's end, then compares.
    ///
    /// # Errors
    ///
    /// It isn't what the image's configuration says, it is damaged, or endless.
    pub(super) fn finish(mut self, what: &str) -> Result<(), UnpackError> {
        let mut chunk = vec![0; 64 << 10];
        while self.read(&mut chunk).map_err(|source| UnpackError::reading(what, source))? > 0 {}
        let found = self.hasher.finish();
        if found == self.layer.diff_id {
            return Ok(());
        }
        let problem = format!("it unpacks to {found}, the image's configuration says {}", self.layer.diff_id);
        Err(UnpackError::Blob { name: self.layer.blob.digest.clone(), problem })
    }
}

impl Read for Plain<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.from.read(into)?;
        self.hasher.update(into.get(..read).unwrap_or_default());
        self.budget.take_bytes(u64::try_from(read).unwrap_or(u64::MAX)).map_err(io::Error::other)?;
        Ok(read)
    }
}
