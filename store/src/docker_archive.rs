//! What `docker save`, `podman save` and `skopeo copy … docker-archive:` write: a tar with `manifest.json`, configurations and layers
//! (Docker image-spec 1.2, "Combined Image JSON + Filesystem Changeset Format").
//!
//! In: the opened archive, and which of its images is meant. Out: an [`Origin`] for it. The format has no manifest with digests and
//! sizes, so one is written here: the configuration's digest is computed; a plain layer must be what the configuration's
//! `diff_ids` say; a packed one is called what its bytes are. The same archive gives the same manifest every time.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

use serde::Deserialize;

use crate::archive::Archive;
use crate::blobs::{BlobError, Blobs};
use crate::config;
use crate::digest::Digest;
use crate::document::{Descriptor, MOST_LAYERS, Manifest, OCI_CONFIG, OCI_LAYER, OCI_MANIFEST};
use crate::origin::Origin;
use crate::printable::Printable;
use crate::progress::Transfer;
use crate::reference::Remote;
use crate::section::{Section, SectionError};
use crate::store::StoreError;

pub(crate) mod refusal;

pub use refusal::DockerArchiveError;

/// An element of `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

/// One image of an archive.
pub(crate) struct DockerArchive {
    documents: BTreeMap<Digest, Vec<u8>>,
    layers: BTreeMap<Digest, Section>,
    path: String,
}

impl DockerArchive {
    /// Finds an image and returns it with the descriptor of the manifest that was written for it.
    pub(crate) fn read(
        archive: &Archive,
        name: Option<&Remote>,
    ) -> Result<(Self, Descriptor), DockerArchiveError> {
        let path = archive.path().to_owned();
        let file = |name: &str| {
            let normal = name.trim_start_matches("./");
            let missing = || DockerArchiveError::NoFile { path: path.clone(), file: Printable::new(name) };
            archive.file(normal).ok_or_else(missing)
        };
        let list =
            archive.file("manifest.json").ok_or_else(|| DockerArchiveError::NoManifest(path.clone()))?;
        let entries: Vec<Entry> = serde_json::from_slice(&list.document()?)
            .map_err(|source| DockerArchiveError::Malformed { path: path.clone(), source })?;
        let entry = choose(&path, entries, name)?;
        let files = entry.layers.unwrap_or_default();
        // Before anything is hashed: a short list can name a long file many times.
        if files.len() > MOST_LAYERS {
            return Err(DockerArchiveError::TooManyLayers { path, count: files.len() });
        }

        let bytes = file(&entry.config)?.document()?;
        let digest = Digest::of(&bytes);
        let (_, diff_ids) = config::parse(&bytes, &digest, files.len())?;
        let config = described(OCI_CONFIG, digest, bytes.len() as u64);
        let mut image = Self { documents: BTreeMap::new(), layers: BTreeMap::new(), path: path.clone() };
        image.documents.insert(config.digest.clone(), bytes);
        let mut layers = Vec::with_capacity(files.len());
        for (name, diff_id) in files.iter().zip(diff_ids) {
            let section = file(name)?;
            let layer = describe(&section, diff_id)?;
            image.layers.insert(layer.digest.clone(), section);
            layers.push(layer);
        }
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(OCI_MANIFEST.into()),
            artifact_type: None,
            config,
            layers,
        };
        let bytes =
            serde_json::to_vec(&manifest).map_err(|source| DockerArchiveError::Malformed { path, source })?;
        let top = described(OCI_MANIFEST, Digest::of(&bytes), bytes.len() as u64);
        image.documents.insert(top.digest.clone(), bytes);
        Ok((image, top))
    }
}

/// The entry of this name, or the only one.
fn choose(path: &str, mut entries: Vec<Entry>, name: Option<&Remote>) -> Result<Entry, DockerArchiveError> {
    let path = path.to_owned();
    let names: Vec<String> =
        entries.iter().flat_map(|entry| entry.repo_tags.iter().flatten()).cloned().collect();
    let Some(name) = name else {
        return match entries.len() {
            0 => Err(DockerArchiveError::Empty(path)),
            1 => Ok(entries.remove(0)),
            _ => Err(DockerArchiveError::Ambiguous { path, names }),
        };
    };
    let is_meant = |tag: &String| tag.parse::<Remote>().is_ok_and(|tag| tag == *name);
    entries
        .into_iter()
        .find(|entry| entry.repo_tags.iter().flatten().any(is_meant))
        .ok_or_else(|| DockerArchiveError::NoName { path, name: name.to_string(), names })
}

/// What a layer's file is: by its first bytes, since the format doesn't say.
fn describe(section: &Section, diff_id: Digest) -> Result<Descriptor, SectionError> {
    let mut magic = [0; 4];
    section.read_at(&mut magic, 0)?;
    let ending = match magic {
        [0x1f, 0x8b, ..] => "+gzip",
        [0x28, 0xb5, 0x2f, 0xfd] => "+zstd",
        _ => "",
    };
    let digest = if ending.is_empty() { diff_id } else { section.digest()? };
    Ok(described(&format!("{OCI_LAYER}{ending}"), digest, section.length()))
}

fn described(media_type: &str, digest: Digest, size: u64) -> Descriptor {
    Descriptor { media_type: media_type.into(), ..Descriptor::plain(digest, size) }
}

impl DockerArchive {
    fn missing(&self, digest: &Digest) -> BlobError {
        tracing::debug!(path = self.path, %digest, "not in the archive");
        BlobError::Missing(digest.clone())
    }
}

impl Origin for DockerArchive {
    fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>, StoreError> {
        let document = self.documents.get(&descriptor.digest).cloned();
        Ok(document.ok_or_else(|| self.missing(&descriptor.digest))?)
    }

    fn fetch(
        &self,
        blobs: &Blobs,
        descriptor: &Descriptor,
        transfer: &dyn Transfer,
        cancelled: &AtomicBool,
    ) -> Result<(), StoreError> {
        let section = self.layers.get(&descriptor.digest);
        let section = section.ok_or_else(|| self.missing(&descriptor.digest))?;
        Ok(section.ingest(blobs, descriptor, transfer, cancelled)?)
    }

    fn parallel(&self) -> usize {
        2
    }
}

#[cfg(test)]
mod tests;
