//! Acquire: from a name to an image whose every blob is in the store.
//!
//! ```text
//!   name ─▶ known, and may be used as it is? ─ yes ─▶ load
//!             │ no
//!             ▼
//!   resolve ─▶ index ─▶ … ─▶ manifest ─▶ configuration: for this platform?
//!                                             ▼
//!                       space for what is missing ─▶ blobs, some at once ─▶ documents ─▶ record ─▶ load
//! ```
//!
//! The platform is known before the first layer is fetched, and the record is written after the last blob.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::SystemTime;

use crate::archive::{Archive, Indexer};
use crate::blobs::Blobs;
use crate::config::{self, ImageConfig};
use crate::digest::Digest;
use crate::docker_archive::{DockerArchive, DockerArchiveError};
use crate::document::{Descriptor, Document, DocumentError, Manifest};
use crate::images::{Image, Record};
use crate::ingest::{Ingest, Kind};
use crate::layout::{Layout, LayoutError};
use crate::options::{Policy, PullOptions};
use crate::origin::Origin;
use crate::platform::Platform;
use crate::printable::Printable;
use crate::progress::Progress;
use crate::reference::Source;
use crate::registry::Registry;
use crate::section::Section;
use crate::store::{Store, StoreError};

/// How many indexes may be within each other.
const DEEPEST: usize = 4;

/// What a name was resolved to.
struct Chosen {
    descriptor: Descriptor,
    bytes: Vec<u8>,
    manifest: Manifest,
}

impl Store {
    /// Finds an image and brings all of it into the store. What is there already is not brought again.
    ///
    /// Take a [`Store::lease`] first, and open the layers before you drop it. `indexer` reads the headers of archives.
    ///
    /// # Errors
    ///
    /// If it doesn't exist, is not an image for this platform, or any of it has a wrong digest or size. Then nothing new has a
    /// name in the store.
    pub fn acquire(
        &self,
        source: &Source,
        options: &PullOptions,
        indexer: &dyn Indexer,
        progress: &dyn Progress,
    ) -> Result<Image, StoreError> {
        let _lease = self.lease()?;
        let name = source.to_string();
        match source {
            Source::Layout { folder, tag } => {
                let layout = Layout::Folder(folder.clone());
                self.acquire_layout(&layout, tag.as_deref(), &name, options, progress)
            }
            Source::OciArchive { file, tag } => {
                let archive = Archive::read(Section::open(file)?, indexer).map_err(LayoutError::from)?;
                let layout = Layout::Archive(archive);
                self.acquire_layout(&layout, tag.as_deref(), &name, options, progress)
            }
            Source::DockerArchive { file, tag } => {
                let archive =
                    Archive::read(Section::open(file)?, indexer).map_err(DockerArchiveError::from)?;
                let (image, top) = DockerArchive::read(&archive, tag.as_ref())?;
                let bytes = image.document(&top)?;
                self.bring(&image, &name, top, bytes, options, progress)
            }
            Source::Registry(remote) => {
                if let Some(image) = self.known(&name, options)? {
                    return Ok(image);
                }
                if options.policy == Policy::Never {
                    return Err(StoreError::NotPulled(name));
                }
                let registry = Registry::new(remote, options, &self.blobs);
                let (top, bytes) = registry.resolve(remote)?;
                self.bring(&registry, &name, top, bytes, options, progress)
            }
        }
    }

    fn acquire_layout(
        &self,
        layout: &Layout,
        tag: Option<&str>,
        name: &str,
        options: &PullOptions,
        progress: &dyn Progress,
    ) -> Result<Image, StoreError> {
        let wanted = &options.platform;
        let no_platform = |found| no_platform(name, wanted, found);
        let top = layout.top(tag)?.choose(wanted).map_err(no_platform)?;
        top.check_document("manifest")?;
        let bytes = layout.document(&top)?;
        self.bring(layout, name, top, bytes, options, progress)
    }

    /// An image that the store has under this name, if it may be used without asking anybody.
    fn known(&self, name: &str, options: &PullOptions) -> Result<Option<Image>, StoreError> {
        if options.policy == Policy::Always {
            return Ok(None);
        }
        let Some(record) = self.records.find(name)? else { return Ok(None) };
        let image = match record.load(&self.blobs) {
            Ok(image) => image,
            Err(error) if options.policy == Policy::Never => return Err(error.into()),
            Err(error) => {
                tracing::info!(name, %error, "the image is pulled again");
                return Ok(None);
            }
        };
        if !fits(&image.config, &options.platform) {
            if options.policy == Policy::Missing {
                return Ok(None);
            }
            return Err(wrong_platform(name, &image.config.platform, &options.platform));
        }
        self.records.touch(name, SystemTime::now());
        Ok(Some(image))
    }

    /// Goes from the top document to an image with everything.
    pub(crate) fn bring(
        &self,
        origin: &dyn Origin,
        name: &str,
        top: Descriptor,
        bytes: Vec<u8>,
        options: &PullOptions,
        progress: &dyn Progress,
    ) -> Result<Image, StoreError> {
        let chosen = choose(origin, name, top, bytes, &options.platform)?;
        let config_descriptor = &chosen.manifest.config;
        let config_bytes = origin.document(config_descriptor)?;
        let layers = chosen.manifest.layers.len();
        let (config, _) = config::parse(&config_bytes, &config_descriptor.digest, layers)?;
        if !fits(&config, &options.platform) {
            return Err(wrong_platform(name, &config.platform, &options.platform));
        }
        self.fetch(origin, &chosen.manifest.layers, progress)?;
        put_document(&self.blobs, config_descriptor, &config_bytes)?;
        put_document(&self.blobs, &chosen.descriptor, &chosen.bytes)?;
        let now = SystemTime::now();
        // Unchanged, as a layout mostly is: nothing to write, and no fsync to wait for.
        if let Some(mut record) = self.records.find(name)?
            && record.manifest.digest == chosen.descriptor.digest
        {
            self.records.touch(name, now);
            record.used = now;
            return Ok(record.load(&self.blobs)?);
        }
        let record = Record::new(name.to_owned(), chosen.descriptor, now);
        self.records.put(&record)?;
        Ok(record.load(&self.blobs)?)
    }

    /// Fetches the layers that are missing, some at once. The first failure stops the others and is the one that is told.
    fn fetch(
        &self,
        origin: &dyn Origin,
        layers: &[Descriptor],
        progress: &dyn Progress,
    ) -> Result<(), StoreError> {
        let missing = self.missing(layers)?;
        if missing.is_empty() {
            return Ok(());
        }
        let needed = missing.iter().fold(0_u64, |sum, layer| sum.saturating_add(layer.size));
        self.blobs.reserve(needed)?;
        let queue = Mutex::new(missing.into_iter());
        let cancelled = AtomicBool::new(false);
        let failure = Mutex::new(None);
        let work = || {
            while let Some(layer) = locked(&queue).next() {
                if cancelled.load(Ordering::Relaxed) {
                    return;
                }
                if let Err(error) = self.fetch_one(origin, layer, progress, &cancelled) {
                    // Whoever was cancelled comes after whoever failed.
                    if !cancelled.swap(true, Ordering::Relaxed) {
                        *locked(&failure) = Some(error);
                    }
                    return;
                }
            }
        };
        let threads = origin.parallel().min(locked(&queue).len());
        thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(work);
            }
            work();
        });
        locked(&failure).take().map_or(Ok(()), Err)
    }

    fn fetch_one(
        &self,
        origin: &dyn Origin,
        layer: &Descriptor,
        progress: &dyn Progress,
        cancelled: &AtomicBool,
    ) -> Result<(), StoreError> {
        let transfer = progress.started(&layer.digest.digits()[..12], layer.size);
        origin.fetch(&self.blobs, layer, &*transfer, cancelled)?;
        transfer.finished();
        Ok(())
    }

    /// Each blob that is not there, once.
    fn missing<'a>(&self, layers: &'a [Descriptor]) -> Result<Vec<&'a Descriptor>, StoreError> {
        let mut seen: BTreeSet<&Digest> = BTreeSet::new();
        let mut missing = Vec::new();
        for layer in layers {
            if seen.insert(&layer.digest) && !self.blobs.has(&layer.digest, layer.size)? {
                missing.push(layer);
            }
        }
        Ok(missing)
    }
}

/// Follows indexes to the manifest for a platform.
fn choose(
    origin: &dyn Origin,
    name: &str,
    top: Descriptor,
    bytes: Vec<u8>,
    wanted: &Platform,
) -> Result<Chosen, StoreError> {
    let (mut descriptor, mut bytes) = (top, bytes);
    for _ in 0..=DEEPEST {
        match Document::parse(&bytes, &descriptor.media_type, &descriptor.digest)? {
            Document::Manifest(manifest) => return Ok(Chosen { descriptor, bytes, manifest: *manifest }),
            Document::Index(index) => {
                let entry = index.choose(wanted).map_err(|found| no_platform(name, wanted, found))?;
                entry.check_document("manifest")?;
                bytes = origin.document(entry)?;
                descriptor = entry.clone();
            }
        }
    }
    Err(DocumentError::TooDeep(Printable::new(name)).into())
}

/// Whether an image runs on a platform. One that names none is taken at its word: nothing speaks against it.
fn fits(config: &ImageConfig, wanted: &Platform) -> bool {
    let platform = &config.platform;
    (platform.os.is_empty() && platform.architecture.is_empty()) || platform.suits(wanted).is_some()
}

fn put_document(blobs: &Blobs, descriptor: &Descriptor, bytes: &[u8]) -> Result<(), StoreError> {
    if let Some(mut ingest) = Ingest::named(blobs, &descriptor.digest, descriptor.size, Kind::Copy)? {
        ingest.write(bytes)?;
        ingest.commit()?;
    }
    Ok(())
}

fn no_platform(name: &str, wanted: &Platform, found: Vec<Platform>) -> StoreError {
    DocumentError::NoPlatform { image: Printable::new(name), wanted: wanted.clone(), found }.into()
}

fn wrong_platform(name: &str, found: &Platform, wanted: &Platform) -> StoreError {
    StoreError::WrongPlatform {
        image: name.to_owned(),
        found: Printable::new(&found.to_string()),
        wanted: wanted.clone(),
    }
}

/// A lock whose content is right at any moment, so a thread that panicked over it did no harm.
fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
