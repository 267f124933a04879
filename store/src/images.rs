//! Images that the store knows by name: one small record each, which points at a manifest among the blobs.
//!
//! ```text
//!   ROOT/images/<SHA-256 of the name>.json    {"name", "manifest", "pulled"}; its mtime is when the image was last used
//! ```
//!
//! A record is written last, when all that it needs is there, and read first; so an image is there with everything or not at all.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::blobs::{BlobError, Blobs, remove_if_there, sync_folder};
use crate::config::{self, ConfigError, ImageConfig};
use crate::digest::Digest;
use crate::document::{Compression, Descriptor, Document, DocumentError, LARGEST_DOCUMENT, Manifest};
use crate::section::verify;

/// Why a known image can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The operating system refused.
    #[error("The record {} can't be {doing}.", .path.display())]
    Io {
        /// `read`, `written`…
        doing: &'static str,
        /// Which record.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Not ours, or of a later version.
    #[error("The record {} can't be understood: remove it, and pull the image again.", .path.display())]
    Malformed {
        /// Which record.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A record without all of its blobs.
    #[error("The image {name} is not whole any more: pull it again.")]
    Incomplete {
        /// The image.
        name: String,
        /// What is missing.
        #[source]
        source: Box<BlobError>,
    },
    /// Its manifest is none.
    #[error(transparent)]
    Document(#[from] DocumentError),
    /// Its configuration is none.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The folder of records can't be used.
    #[error(transparent)]
    Blob(#[from] BlobError),
}

/// An image whose every blob is in the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Its canonical name.
    pub name: String,
    /// Of its manifest: what `carrel images --digests` shows, and a registry resolves.
    pub digest: Digest,
    /// Of its configuration: what Docker calls the image's id.
    pub config_digest: Digest,
    /// What it says about running it.
    pub config: ImageConfig,
    /// Lowest first. The same blob may be there twice.
    pub layers: Vec<LayerBlob>,
    /// All distinct blobs together, in bytes, as they are stored (compressed).
    pub size_bytes: u64,
    /// When its name was first resolved to this manifest.
    pub pulled: SystemTime,
    /// When it was last acquired.
    pub used: SystemTime,
}

/// A layer, as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerBlob {
    /// Of the blob.
    pub digest: Digest,
    /// Of the blob, in bytes.
    pub size: u64,
    /// How it is packed.
    pub compression: Compression,
    /// Of the unpacked tar. The store can't check it, since it unpacks nothing: who unpacks does.
    pub diff_id: Digest,
}

/// What a record's file holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) name: String,
    pub(crate) manifest: Descriptor,
    /// Seconds since 1970.
    pulled: u64,
    #[serde(skip, default = "epoch")]
    pub(crate) used: SystemTime,
}

fn epoch() -> SystemTime {
    SystemTime::UNIX_EPOCH
}

impl Record {
    pub(crate) fn new(name: String, manifest: Descriptor, now: SystemTime) -> Self {
        let pulled = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        // Only what a reader needs: a platform or a tag of the source's would go stale here.
        let manifest = Descriptor { platform: None, annotations: None, ..manifest };
        Self { name, manifest, pulled, used: now }
    }

    /// Reads the image that this record points at, and checks that all of it is there.
    pub(crate) fn load(&self, blobs: &Blobs) -> Result<Image, ImageError> {
        let incomplete =
            |source| ImageError::Incomplete { name: self.name.clone(), source: Box::new(source) };
        let manifest = self.manifest(blobs)?;
        let bytes = document(blobs, &manifest.config).map_err(incomplete)?;
        let (config, diff_ids) = config::parse(&bytes, &manifest.config.digest, manifest.layers.len())?;
        let mut layers = Vec::with_capacity(manifest.layers.len());
        for (layer, diff_id) in manifest.layers.iter().zip(diff_ids) {
            if !blobs.has(&layer.digest, layer.size).map_err(incomplete)? {
                return Err(incomplete(BlobError::Missing(layer.digest.clone())));
            }
            let compression = layer.compression()?;
            layers.push(LayerBlob { digest: layer.digest.clone(), size: layer.size, compression, diff_id });
        }
        let mut distinct: Vec<(&Digest, u64)> =
            layers.iter().map(|layer| (&layer.digest, layer.size)).collect();
        distinct.sort_unstable();
        distinct.dedup();
        let layers_bytes = distinct.iter().fold(0_u64, |sum, (_, size)| sum.saturating_add(*size));
        Ok(Image {
            name: self.name.clone(),
            digest: self.manifest.digest.clone(),
            config_digest: manifest.config.digest.clone(),
            config,
            size_bytes: layers_bytes.saturating_add(manifest.config.size + self.manifest.size),
            layers,
            pulled: SystemTime::UNIX_EPOCH + Duration::from_secs(self.pulled),
            used: self.used,
        })
    }

    /// Every blob that this record keeps from being collected.
    pub(crate) fn blobs(&self, blobs: &Blobs) -> Result<Vec<Digest>, ImageError> {
        let manifest = self.manifest(blobs)?;
        let parts = manifest.layers.into_iter().chain([manifest.config]).map(|part| part.digest);
        Ok(parts.chain([self.manifest.digest.clone()]).collect())
    }

    fn manifest(&self, blobs: &Blobs) -> Result<Manifest, ImageError> {
        let bytes = document(blobs, &self.manifest)
            .map_err(|source| ImageError::Incomplete { name: self.name.clone(), source: Box::new(source) })?;
        let digest = &self.manifest.digest;
        match Document::parse(&bytes, &self.manifest.media_type, digest)? {
            Document::Manifest(manifest) => Ok(*manifest),
            Document::Index(_) => Err(ImageError::Incomplete {
                name: self.name.clone(),
                source: Box::new(BlobError::Missing(digest.clone())),
            }),
        }
    }
}

/// A stored document, verified again: it is small, and disks forget.
pub(crate) fn document(blobs: &Blobs, descriptor: &Descriptor) -> Result<Vec<u8>, BlobError> {
    let mut bytes = Vec::new();
    blobs
        .handle(&descriptor.digest)?
        .take(LARGEST_DOCUMENT)
        .read_to_end(&mut bytes)
        .map_err(BlobError::io("read", &blobs.path(&descriptor.digest)))?;
    verify(&bytes, &descriptor.digest)?;
    Ok(bytes)
}

/// The folder of records.
#[derive(Clone, Debug)]
pub(crate) struct Records {
    folder: PathBuf,
}

impl Records {
    pub(crate) fn open(root: &Path) -> Result<Self, BlobError> {
        let folder = root.join("images");
        crate::blobs::create_private(&folder)?;
        Ok(Self { folder })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{}.json", Digest::of(name.as_bytes()).digits()))
    }

    /// The record of a name.
    pub(crate) fn find(&self, name: &str) -> Result<Option<Record>, ImageError> {
        Ok(read(&self.path(name))?.filter(|record| record.name == name))
    }

    /// All, by name; what can't be read stands as its error.
    pub(crate) fn all(&self) -> Result<Vec<Result<Record, ImageError>>, ImageError> {
        let failed = |source| ImageError::Io { doing: "read", path: self.folder.clone(), source };
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.extension().is_some_and(|ending| ending == "json") {
                all.extend(read(&path).transpose());
            }
        }
        all.sort_by(|a, b| name_of(a).cmp(name_of(b)));
        Ok(all)
    }

    /// All that can be read, by name: one that can't is no reason to hide the others.
    pub(crate) fn readable(&self) -> Result<Vec<Record>, ImageError> {
        let warn = |error: &ImageError| tracing::warn!(%error, "a record is passed over");
        Ok(self.all()?.into_iter().filter_map(|record| record.inspect_err(warn).ok()).collect())
    }

    /// Writes a record in place of the one before: by a rename, so that readers see the one or the other.
    pub(crate) fn put(&self, record: &Record) -> Result<(), ImageError> {
        let path = self.path(&record.name);
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let new = path.with_extension(format!("new-{}-{count}", std::process::id()));
        let io = |doing| {
            let path = new.clone();
            move |source| ImageError::Io { doing, path, source }
        };
        let text = serde_json::to_vec(record)
            .map_err(|source| ImageError::Malformed { path: path.clone(), source })?;
        let written = File::create(&new).and_then(|mut file| {
            file.set_permissions(fs::Permissions::from_mode(0o600))?;
            file.write_all(&text)?;
            file.set_modified(record.used)?;
            file.sync_all()
        });
        if let Err(error) = written.and_then(|()| fs::rename(&new, &path)) {
            let _ = fs::remove_file(&new);
            return Err(io("written")(error));
        }
        Ok(sync_folder(&self.folder)?)
    }

    /// Notes that an image was used. Only `prune --older-than` reads it, so it is not worth an fsync, nor a failure.
    pub(crate) fn touch(&self, name: &str, now: SystemTime) {
        let touched =
            File::options().write(true).open(self.path(name)).and_then(|file| file.set_modified(now));
        if let Err(error) = touched {
            tracing::debug!(name, %error, "the time of use was not noted");
        }
    }

    /// Removes what killed processes left of records. Only the collector may: others may be writing one.
    pub(crate) fn sweep(&self) -> Result<(), ImageError> {
        let failed = |source| ImageError::Io { doing: "read", path: self.folder.clone(), source };
        for entry in fs::read_dir(&self.folder).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let half = path.extension().and_then(|ending| ending.to_str());
            if half.is_some_and(|ending| ending.starts_with("new-")) {
                remove_if_there(&path)?;
            }
        }
        Ok(())
    }

    pub(crate) fn remove(&self, name: &str) -> Result<(), ImageError> {
        remove_if_there(&self.path(name))?;
        Ok(sync_folder(&self.folder)?)
    }
}

fn name_of(record: &Result<Record, ImageError>) -> &str {
    record.as_ref().map_or("", |record| &record.name)
}

fn read(path: &Path) -> Result<Option<Record>, ImageError> {
    let io = |source| ImageError::Io { doing: "read", path: path.to_owned(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io(error)),
    };
    let used = file.metadata().and_then(|metadata| metadata.modified()).map_err(io)?;
    let mut bytes = Vec::new();
    file.take(LARGEST_DOCUMENT).read_to_end(&mut bytes).map_err(io)?;
    let record: Record = serde_json::from_slice(&bytes)
        .map_err(|source| ImageError::Malformed { path: path.to_owned(), source })?;
    Ok(Some(Record { used, ..record }))
}
