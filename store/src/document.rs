//! Manifests and indexes: the small JSON documents that say what an image is made of.
//!
//! In: bytes whose digest was checked, from a registry, a layout or an archive. Out: [`Index`] or [`Manifest`], of which we know
//! that it is an image, that every layer is of a kind that guests unpack, and that counts and sizes are sane. OCI image-spec 1.1
//! (image-index.md, manifest.md, layer.md) and Docker's image manifest version 2, schema 2, which differ in media types alone.

use serde::{Deserialize, Serialize};

use crate::config::or_default;
use crate::digest::Digest;
use crate::platform::Platform;
use crate::printable::Printable;

/// The largest document that is read, in bytes: distribution-spec 1.1, "Pushing manifests", has registries accept 4 MiB.
pub const LARGEST_DOCUMENT: u64 = 4 << 20;
/// The most layers of an image. Docker stops at 127.
pub const MOST_LAYERS: usize = 128;
/// The most entries of an index.
const MOST_MANIFESTS: usize = 4096;

/// OCI's image manifest.
pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// OCI's image index.
pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// OCI's image configuration.
pub(crate) const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// OCI's plain layer; with `+gzip` and `+zstd` its compressed forms.
pub(crate) const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";
/// Schema 1, signed or not, was given up by Docker in 2019.
const DOCKER_SCHEMA_1: &str = "application/vnd.docker.distribution.manifest.v1+";

/// What we can read, for a registry's `Accept`.
pub(crate) const ACCEPTED: [&str; 4] = [OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST];

/// Whether a descriptor leads to a manifest or an index, which registries keep apart from blobs.
pub(crate) fn is_manifest_type(media_type: &str) -> bool {
    ACCEPTED.contains(&media_type) || media_type.starts_with(DOCKER_SCHEMA_1)
}

/// How documents come that nobody typed.
const UNTYPED: [&str; 4] = ["", "application/json", "application/octet-stream", "text/plain"];

/// Why a document is not an image that can run.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// Not JSON, or a field that has to be there is missing or of another type.
    #[error("The {what} {digest} is not what its media type says.")]
    Malformed {
        /// `manifest`, `index`, `configuration`.
        what: &'static str,
        /// The document.
        digest: Digest,
        /// Which field.
        #[source]
        source: serde_json::Error,
    },
    /// Over [`LARGEST_DOCUMENT`].
    #[error("The {what} {digest} is too large: {size} bytes, and 4 MiB is the most that is read.")]
    TooLarge {
        /// `manifest`, `index`, `configuration`.
        what: &'static str,
        /// The document.
        digest: Digest,
        /// What its descriptor says, in bytes.
        size: u64,
    },
    /// A manifest of something that we don't know.
    #[error("The document {digest} has the unknown media type {media_type:?}: no image that can run.")]
    UnknownManifest {
        /// The document.
        digest: Digest,
        /// What it says that it is.
        media_type: Printable,
    },
    /// Docker's first format.
    #[error(
        "The manifest {0} is in Docker's schema 1, which was given up in 2019: push the image again with a current tool."
    )]
    Schema1(Digest),
    /// A Helm chart, a signature, a WebAssembly module…
    #[error("{digest} is an artifact of the type {kind:?}, not an image that can run.")]
    Artifact {
        /// The manifest.
        digest: Digest,
        /// Its `artifactType`, or its configuration's media type.
        kind: Printable,
    },
    /// Something else than a tar, a gzipped tar or a zstd-compressed tar.
    #[error("The layer {digest} has the unknown media type {media_type:?}.")]
    UnknownLayer {
        /// The layer.
        digest: Digest,
        /// What the manifest says that it is.
        media_type: Printable,
    },
    /// Windows base layers, which their licence keeps out of registries.
    #[error("The layer {0} may not be distributed (a foreign layer), so the image can't be run here.")]
    ForeignLayer(Digest),
    /// Over [`MOST_LAYERS`].
    #[error("The image {digest} has {count} layers, and {MOST_LAYERS} is the most that is read.")]
    TooManyLayers {
        /// The manifest.
        digest: Digest,
        /// How many it has.
        count: usize,
    },
    /// Over 4096.
    #[error("The index {digest} has {count} entries, and {MOST_MANIFESTS} is the most that is read.")]
    TooManyManifests {
        /// The index.
        digest: Digest,
        /// How many it has.
        count: usize,
    },
    /// `subject` documents and the like, or an index of nothing.
    #[error("The image {image} is not made for {wanted}, only for {}.", list(.found))]
    NoPlatform {
        /// The image.
        image: Printable,
        /// What was asked for.
        wanted: Platform,
        /// What there is.
        found: Vec<Platform>,
    },
    /// Indexes in indexes in indexes.
    #[error("The image {0} is an index within indexes, more than 4 deep.")]
    TooDeep(Printable),
}

/// `linux/arm64, linux/s390x`.
fn list(platforms: &[Platform]) -> String {
    let mut names: Vec<String> =
        platforms.iter().map(|p| Printable::new(&p.to_string()).to_string()).collect();
    names.dedup();
    if names.is_empty() { "no platform at all".into() } else { names.join(", ") }
}

/// Points at a blob (OCI descriptor.md). Fields that we don't know are left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    /// What it is.
    #[serde(default)]
    pub(crate) media_type: String,
    /// What it is called.
    pub(crate) digest: Digest,
    /// How long it is, in bytes.
    pub(crate) size: u64,
    /// What it is for, in an index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) platform: Option<Platform>,
    /// Names, in a layout's index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) annotations: Option<Annotations>,
}

/// The annotations that name an image; all others are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Annotations {
    /// OCI image-layout.md, "index.json".
    #[serde(rename = "org.opencontainers.image.ref.name", default, skip_serializing_if = "Option::is_none")]
    pub(crate) ref_name: Option<String>,
    /// What containerd and BuildKit write beside it.
    #[serde(rename = "io.containerd.image.name", default, skip_serializing_if = "Option::is_none")]
    pub(crate) image_name: Option<String>,
    /// BuildKit's `attestation-manifest`: provenance, listed like an image.
    #[serde(rename = "vnd.docker.reference.type", default, skip_serializing_if = "Option::is_none")]
    pub(crate) reference_type: Option<String>,
}

/// A list of manifests, of which one fits this host.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Index {
    /// In the order of preference. Go writes an empty list as `null`.
    #[serde(deserialize_with = "or_default")]
    pub(crate) manifests: Vec<Descriptor>,
}

/// An image's configuration and layers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Manifest {
    pub(crate) schema_version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) media_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) artifact_type: Option<String>,
    pub(crate) config: Descriptor,
    /// Lowest first; `null` where there are none.
    #[serde(deserialize_with = "or_default")]
    pub(crate) layers: Vec<Descriptor>,
}

/// What a document turned out to be.
pub(crate) enum Document {
    /// One of several.
    Index(Index),
    /// An image.
    Manifest(Box<Manifest>),
}

/// How a layer's tar is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// A plain tar.
    None,
    /// RFC 1952.
    Gzip,
    /// RFC 8878; zstd:chunked too, whose table is in skippable frames.
    Zstd,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Kind {
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    schema_version: Option<u32>,
    #[serde(default)]
    manifests: Option<serde::de::IgnoredAny>,
}

impl Document {
    /// Reads a manifest or an index. `said` is the media type by which it came: the document's own wins.
    pub(crate) fn parse(bytes: &[u8], said: &str, digest: &Digest) -> Result<Self, DocumentError> {
        let malformed =
            |what| move |source| DocumentError::Malformed { what, digest: digest.clone(), source };
        let kind: Kind = serde_json::from_slice(bytes).map_err(malformed("manifest"))?;
        let media_type = match kind.media_type.as_deref() {
            Some(own) if !own.is_empty() => own,
            _ if ACCEPTED.contains(&said) => said,
            _ if kind.schema_version == Some(1) => return Err(DocumentError::Schema1(digest.clone())),
            // Some registries and tools say neither; both formats have their fields apart.
            _ if kind.manifests.is_some() => OCI_INDEX,
            _ if UNTYPED.contains(&said) => OCI_MANIFEST,
            _ => said,
        };
        match media_type {
            OCI_INDEX | DOCKER_LIST => {
                let index: Index = serde_json::from_slice(bytes).map_err(malformed("index"))?;
                let count = index.manifests.len();
                if count > MOST_MANIFESTS {
                    return Err(DocumentError::TooManyManifests { digest: digest.clone(), count });
                }
                Ok(Self::Index(index))
            }
            OCI_MANIFEST | DOCKER_MANIFEST => {
                let manifest: Manifest = serde_json::from_slice(bytes).map_err(malformed("manifest"))?;
                manifest.check(digest)?;
                Ok(Self::Manifest(Box::new(manifest)))
            }
            other if other.starts_with(DOCKER_SCHEMA_1) => Err(DocumentError::Schema1(digest.clone())),
            other => Err(DocumentError::UnknownManifest {
                digest: digest.clone(),
                media_type: Printable::new(other),
            }),
        }
    }
}

impl Index {
    /// The entry that suits a platform best, or what there is instead. The first of equals wins.
    pub(crate) fn choose(&self, wanted: &Platform) -> Result<&Descriptor, Vec<Platform>> {
        let mut found = Vec::new();
        let mut best: Option<(u8, &Descriptor)> = None;
        for entry in self.manifests.iter().filter(|entry| !entry.is_attestation()) {
            // Without a platform, only the configuration can tell.
            let Some(platform) = &entry.platform else {
                if best.is_none() {
                    best = Some((0, entry));
                }
                continue;
            };
            found.push(platform.clone());
            if let Some(score) = platform.suits(wanted)
                && best.is_none_or(|(other, _)| score > other)
            {
                best = Some((score, entry));
            }
        }
        best.map(|(_, entry)| entry).ok_or(found)
    }
}

impl Descriptor {
    /// Of something whose kind is known without being said.
    pub(crate) fn plain(digest: Digest, size: u64) -> Self {
        Self { media_type: String::new(), digest, size, platform: None, annotations: None }
    }

    fn is_attestation(&self) -> bool {
        self.annotations.as_ref().is_some_and(|annotations| annotations.reference_type.is_some())
    }

    /// Refuses documents that would be too large to read.
    pub(crate) fn check_document(&self, what: &'static str) -> Result<(), DocumentError> {
        if self.size > LARGEST_DOCUMENT {
            return Err(DocumentError::TooLarge { what, digest: self.digest.clone(), size: self.size });
        }
        Ok(())
    }

    /// How this layer is packed, if it is one that guests unpack.
    pub(crate) fn compression(&self) -> Result<Compression, DocumentError> {
        let media_type = self.media_type.as_str();
        if media_type.contains(".nondistributable.") || media_type.contains(".foreign.") {
            return Err(DocumentError::ForeignLayer(self.digest.clone()));
        }
        let packed = media_type.strip_prefix(OCI_LAYER).or_else(|| media_type.strip_prefix(DOCKER_LAYER));
        match packed {
            Some("") => Ok(Compression::None),
            Some("+gzip" | ".gzip") => Ok(Compression::Gzip),
            Some("+zstd" | ".zstd") => Ok(Compression::Zstd),
            Some(_) | None => Err(DocumentError::UnknownLayer {
                digest: self.digest.clone(),
                media_type: Printable::new(media_type),
            }),
        }
    }
}

impl Manifest {
    fn check(&self, digest: &Digest) -> Result<(), DocumentError> {
        if self.schema_version == 1 {
            return Err(DocumentError::Schema1(digest.clone()));
        }
        if self.config.media_type != OCI_CONFIG && self.config.media_type != DOCKER_CONFIG {
            let kind = self.artifact_type.as_deref().unwrap_or(&self.config.media_type);
            return Err(DocumentError::Artifact { digest: digest.clone(), kind: Printable::new(kind) });
        }
        if self.layers.len() > MOST_LAYERS {
            let count = self.layers.len();
            return Err(DocumentError::TooManyLayers { digest: digest.clone(), count });
        }
        for layer in &self.layers {
            layer.compression()?;
        }
        self.config.check_document("configuration")
    }
}

#[cfg(test)]
mod tests;
