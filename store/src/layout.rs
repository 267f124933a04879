//! OCI layouts (OCI image-spec 1.1, image-layout.md): a folder, or a tar of one, with `oci-layout`, `index.json` and `blobs/`.
//!
//! In: the folder or the opened archive, and a tag. Out: the descriptor of the image that is meant, and its blobs as sections.

use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::archive::{Archive, ArchiveError};
use crate::digest::Digest;
use crate::document::{Descriptor, Index};
use crate::platform::Platform;
use crate::printable::Printable;
use crate::section::{Section, SectionError};

/// Why an image can't be read from a layout.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// Nothing there.
    #[error("There is no OCI layout at {0}: that path does not exist.")]
    Absent(String),
    /// Something else is there.
    #[error("{0} is no OCI layout: it has no file {1:?}.")]
    NoLayout(String, &'static str),
    /// `oci-layout` or `index.json` is not what it should be.
    #[error("{path} is no OCI layout: its {file} can't be understood.")]
    Malformed {
        /// The layout.
        path: String,
        /// Which document.
        file: &'static str,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// Not 1.x.
    #[error("{path} is an OCI layout of version {version:?}, and 1 is understood.")]
    Version {
        /// The layout.
        path: String,
        /// What it says.
        version: Printable,
    },
    /// Its index is empty.
    #[error("The OCI layout {0} holds no image.")]
    Empty(String),
    /// No image of that name.
    #[error("The OCI layout {path} has no image tagged {tag:?}; it has {}.", list(.tags))]
    NoTag {
        /// The layout.
        path: String,
        /// What was asked for.
        tag: Printable,
        /// What there is.
        tags: Vec<String>,
    },
    /// Several, and no tag was asked for.
    #[error("The OCI layout {path} holds several images: add one of their tags, {}.", list(.tags))]
    Ambiguous {
        /// The layout.
        path: String,
        /// What there is.
        tags: Vec<String>,
    },
    /// A descriptor without its blob.
    #[error("The OCI layout {path} lacks the blob {digest}: copy the image again.")]
    NoBlob {
        /// The layout.
        path: String,
        /// What is missing.
        digest: Digest,
    },
    /// A file of it can't be read.
    #[error(transparent)]
    Section(#[from] SectionError),
    /// The tar around it is broken.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
}

/// `"a", "b" and 3 more`.
fn list(tags: &[String]) -> String {
    const SHOWN: usize = 10;
    let names: Vec<String> =
        tags.iter().take(SHOWN).map(|tag| format!("{:?}", Printable::new(tag))).collect();
    match tags.len() {
        0 => "no tags at all".into(),
        count if count > SHOWN => format!("{} and {} more", names.join(", "), count - SHOWN),
        _ => names.join(", "),
    }
}

/// Where a layout's files are.
#[derive(Debug)]
pub(crate) enum Layout {
    /// In a folder.
    Folder(PathBuf),
    /// In a tar.
    Archive(Archive),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Marker {
    image_layout_version: String,
}

/// What a tag names: one manifest or index, or several manifests, of which the platform decides.
#[derive(Debug)]
pub(crate) enum Top {
    /// One document.
    One(Descriptor),
    /// The layout's own index, so to speak.
    Several(Index),
}

impl Layout {
    /// Finds what a tag names, or the only image of the layout.
    pub(crate) fn top(&self, tag: Option<&str>) -> Result<Top, LayoutError> {
        let path = self.path();
        if let Self::Folder(folder) = self
            && !folder.exists()
        {
            return Err(LayoutError::Absent(path));
        }
        let marker: Marker = self.document("oci-layout")?;
        if !marker.image_layout_version.starts_with("1.") {
            let version = Printable::new(&marker.image_layout_version);
            return Err(LayoutError::Version { path, version });
        }
        let index: Index = self.document("index.json")?;
        if index.manifests.is_empty() {
            return Err(LayoutError::Empty(path));
        }
        let mut tags: Vec<String> = index.manifests.iter().filter_map(name).map(str::to_owned).collect();
        tags.dedup();
        let mut meant: Vec<Descriptor> = match tag {
            Some(tag) => index.manifests.into_iter().filter(|entry| is_called(entry, tag)).collect(),
            None => index.manifests,
        };
        meant.dedup();
        match (meant.len(), tag) {
            (0, tag) => Err(LayoutError::NoTag { path, tag: Printable::new(tag.unwrap_or_default()), tags }),
            (1, _) => Ok(Top::One(meant.remove(0))),
            // One image for several platforms, listed flat; several names would be several images.
            _ if tags.len() <= 1 && meant.iter().all(|entry| entry.platform.is_some()) => {
                Ok(Top::Several(Index { manifests: meant }))
            }
            _ => Err(LayoutError::Ambiguous { path, tags }),
        }
    }

    /// A blob, not yet verified.
    pub(crate) fn blob(&self, digest: &Digest) -> Result<Section, LayoutError> {
        let name = format!("blobs/{}/{}", digest.algorithm().name(), digest.digits());
        self.file(&name)?.ok_or_else(|| LayoutError::NoBlob { path: self.path(), digest: digest.clone() })
    }

    fn document<T: for<'de> Deserialize<'de>>(&self, file: &'static str) -> Result<T, LayoutError> {
        let section = self.file(file)?.ok_or_else(|| LayoutError::NoLayout(self.path(), file))?;
        serde_json::from_slice(&section.document()?).map_err(|source| LayoutError::Malformed {
            path: self.path(),
            file,
            source,
        })
    }

    fn file(&self, name: &str) -> Result<Option<Section>, LayoutError> {
        match self {
            Self::Folder(folder) => match Section::open(&folder.join(name)) {
                Ok(section) => Ok(Some(section)),
                Err(SectionError::Read { source, .. })
                    if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
                {
                    Ok(None)
                }
                Err(error) => Err(error.into()),
            },
            Self::Archive(archive) => Ok(archive.file(name)),
        }
    }

    fn path(&self) -> String {
        match self {
            Self::Folder(folder) => Path::display(folder).to_string(),
            Self::Archive(archive) => archive.path().to_owned(),
        }
    }
}

fn name(entry: &Descriptor) -> Option<&str> {
    entry.annotations.as_ref()?.ref_name.as_deref()
}

/// By its own tag, or by the full name that containerd and BuildKit write beside it.
fn is_called(entry: &Descriptor, tag: &str) -> bool {
    entry.annotations.as_ref().is_some_and(|annotations| {
        annotations.ref_name.as_deref() == Some(tag) || annotations.image_name.as_deref() == Some(tag)
    })
}

impl Top {
    /// The document to go on with.
    pub(crate) fn choose(self, wanted: &Platform) -> Result<Descriptor, Vec<Platform>> {
        match self {
            Self::One(descriptor) => Ok(descriptor),
            Self::Several(index) => index.choose(wanted).cloned(),
        }
    }
}
