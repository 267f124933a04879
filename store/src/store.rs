//! The store's door: one type, whose methods are all that host and command need.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::blobs::{BlobError, Blobs};
use crate::config::ConfigError;
use crate::digest::Digest;
use crate::docker_archive::refusal::DockerArchiveError;
use crate::document::DocumentError;
use crate::images::{Image, ImageError, Record, Records};
use crate::ingest::{self, CHUNK, Ingest};
use crate::layout::LayoutError;
use crate::lease::{Lease, LeaseError};
use crate::platform::Platform;
use crate::printable::Printable;
use crate::reference::Source;
use crate::registry::refusal::RegistryError;
use crate::section::SectionError;
use crate::templates::{TemplateBounds, TemplateError, Templates};

/// Why the store could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// `--pull never`, and it was never pulled.
    #[error("The image {0} is not in the store, and may not be pulled: pull it first, or allow it.")]
    NotPulled(String),
    /// No image has this name or digest.
    #[error("There is no image {0:?} in the store: `carrel images` lists what there is.")]
    NoImage(Printable),
    /// Several images begin with these digits.
    #[error("{0:?} is the beginning of several images' digests: give more digits.")]
    AmbiguousDigest(Printable),
    /// It was built for another kind of machine.
    #[error("The image {image} is for {found}, and {wanted} is wanted: choose an image for {wanted}.")]
    WrongPlatform {
        /// The image.
        image: String,
        /// What its configuration says.
        found: Printable,
        /// What was asked for.
        wanted: Platform,
    },
    /// The file that was given to be stored can't be read.
    #[error("The file to be stored can't be read, or is no regular file.")]
    Unreadable(#[source] io::Error),
    /// A blob is missing, wrong or has no room.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// A manifest or an index is not what it should be.
    #[error(transparent)]
    Document(#[from] DocumentError),
    /// A configuration is not what it should be.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A record is not what it should be.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The store's lock can't be had.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// A Docker archive can't be used.
    #[error(transparent)]
    DockerArchive(#[from] DockerArchiveError),
    /// A layout can't be used.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A registry did not give what was asked for.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A file of the user's can't be read.
    #[error(transparent)]
    Section(#[from] SectionError),
    /// The templates can't be used.
    #[error(transparent)]
    Template(#[from] TemplateError),
}

/// Images, blobs and templates below one folder. Cheap to open and to clone; any number of processes may have it open.
#[derive(Clone, Debug)]
pub struct Store {
    pub(crate) blobs: Blobs,
    pub(crate) records: Records,
    templates: Templates,
}

impl Store {
    /// Opens the store in this folder, creating what is missing of it (for its owner alone, mode 0700), and removes what dead processes left on
    /// its way in.
    ///
    /// # Errors
    ///
    /// If the folders can't be created or looked at.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        let (blobs, records) = (Blobs::open(root)?, Records::open(root)?);
        let store = Self { blobs, records, templates: Templates::open(root)? };
        store.sweep();
        Ok(store)
    }

    /// The same store, its templates kept within these bounds.
    #[must_use]
    pub fn with_template_bounds(self, bounds: TemplateBounds) -> Self {
        Self { templates: self.templates.bounded(bounds), ..self }
    }

    /// The folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        self.blobs.root()
    }

    /// The templates.
    #[must_use]
    pub fn templates(&self) -> &Templates {
        &self.templates
    }

    /// Keeps everything that is in the store there while the lease lives. Take one before acquiring an image, and hold it until the
    /// blobs that you need are open: an open file outlives its removal. Waits while another process collects.
    ///
    /// # Errors
    ///
    /// If the lock file can't be opened.
    pub fn lease(&self) -> Result<Lease, StoreError> {
        Ok(Lease::shared(self.root())?)
    }

    /// A blob's content, read-only.
    ///
    /// # Errors
    ///
    /// If it isn't in the store.
    pub fn blob(&self, digest: &Digest) -> Result<File, StoreError> {
        Ok(self.blobs.handle(digest)?)
    }

    /// Where a blob is: for messages and for measuring. Open it with [`Store::blob`].
    #[must_use]
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.blobs.path(digest)
    }

    /// Stores a regular file's content, from its beginning, and returns its digest and its size in bytes.
    ///
    /// # Errors
    ///
    /// If it can't be read, or the store has no space for it.
    pub fn add_file(&self, file: &mut File) -> Result<(Digest, u64), StoreError> {
        let _lease = self.lease()?;
        let metadata = file.metadata().map_err(StoreError::Unreadable)?;
        // A device may have no end, and a pipe no beginning.
        if !metadata.is_file() {
            return Err(StoreError::Unreadable(io::ErrorKind::InvalidInput.into()));
        }
        self.blobs.reserve(metadata.len())?;
        file.rewind().map_err(StoreError::Unreadable)?;
        let mut ingest = Ingest::unnamed(&self.blobs)?;
        let mut buffer = vec![0; CHUNK];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => return Ok(ingest.commit()?),
                Ok(count) => ingest.write(&buffer[..count])?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(StoreError::Unreadable(error)),
            }
        }
    }

    /// All images, by name. One that is not whole any more is left out, with a warning in the log.
    ///
    /// # Errors
    ///
    /// If the store can't be read.
    pub fn images(&self) -> Result<Vec<Image>, StoreError> {
        let warn = |error: &ImageError| tracing::warn!(%error, "an image is passed over");
        let records = self.records.readable()?;
        let load = |record: &Record| record.load(&self.blobs).inspect_err(warn).ok();
        Ok(records.iter().filter_map(load).collect())
    }

    /// Forgets images: the one of this name, or all of this digest (`sha256:…`, with or without the prefix, at least 12 digits).
    /// Returns the names that went. Their blobs stay until [`Store::prune`], and what was opened stays open.
    ///
    /// # Errors
    ///
    /// If there is no such image.
    pub fn remove(&self, image: &str) -> Result<Vec<String>, StoreError> {
        let _lease = self.lease()?;
        let mut names = self.named(image)?;
        if names.is_empty() {
            names = self.digested(image)?;
        }
        if names.is_empty() {
            return Err(StoreError::NoImage(Printable::new(image)));
        }
        for name in &names {
            self.records.remove(name)?;
        }
        Ok(names)
    }

    fn named(&self, image: &str) -> Result<Vec<String>, StoreError> {
        let Ok(source) = image.parse::<Source>() else { return Ok(Vec::new()) };
        Ok(self.records.find(&source.to_string())?.map(|record| record.name).into_iter().collect())
    }

    fn digested(&self, image: &str) -> Result<Vec<String>, StoreError> {
        const FEWEST: usize = 12;
        let digits = image.strip_prefix("sha256:").unwrap_or(image);
        if digits.len() < FEWEST || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Ok(Vec::new());
        }
        let mut found: Vec<Record> = self.records.readable()?;
        found.retain(|record| record.manifest.digest.digits().starts_with(digits));
        if found.windows(2).any(|pair| pair[0].manifest.digest != pair[1].manifest.digest) {
            return Err(StoreError::AmbiguousDigest(Printable::new(image)));
        }
        Ok(found.into_iter().map(|record| record.name).collect())
    }

    /// Removes what dead processes left on its way in. Not worth a failure: it is done again the next time.
    fn sweep(&self) {
        if let Err(error) = ingest::sweep(&self.blobs, SystemTime::now(), false, false) {
            tracing::warn!(%error, "what dead processes left was not swept");
        }
        if let Err(error) = self.templates.sweep(false) {
            tracing::warn!(%error, "what dead makers of templates left was not swept");
        }
    }
}
