//! What a Docker archive is refused for, each with its sentence.

use crate::archive::ArchiveError;
use crate::config::ConfigError;
use crate::document::MOST_LAYERS;
use crate::printable::Printable;
use crate::section::SectionError;

/// Why an image can't be read from a Docker archive.
#[derive(Debug, thiserror::Error)]
pub enum DockerArchiveError {
    /// Another kind of tar.
    #[error(
        "{0} is no Docker archive: it has no manifest.json. If it has an index.json, it is an oci-archive."
    )]
    NoManifest(String),
    /// `manifest.json` is not what it should be.
    #[error("The manifest.json of {path} can't be understood.")]
    Malformed {
        /// The archive.
        path: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// No image of that name.
    #[error("The archive {path} has no image called {name}; it has {}.", list(.names))]
    NoName {
        /// The archive.
        path: String,
        /// What was asked for.
        name: String,
        /// What there is.
        names: Vec<String>,
    },
    /// Several, and none was asked for.
    #[error("The archive {path} holds several images: add one of their names, {}.", list(.names))]
    Ambiguous {
        /// The archive.
        path: String,
        /// What there is.
        names: Vec<String>,
    },
    /// It holds nothing.
    #[error("The archive {0} holds no image.")]
    Empty(String),
    /// `manifest.json` names a file that isn't there.
    #[error("The archive {path} lacks {file:?}, which its manifest.json names: save the image again.")]
    NoFile {
        /// The archive.
        path: String,
        /// What is missing.
        file: Printable,
    },
    /// More than an image may have.
    #[error(
        "The image in the archive {path} has {count} layers, and {MOST_LAYERS} is the most that is read."
    )]
    TooManyLayers {
        /// The archive.
        path: String,
        /// How many it has.
        count: usize,
    },
    /// The tar is broken.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// The file can't be read.
    #[error(transparent)]
    Section(#[from] SectionError),
    /// The configuration is not what it should be.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

fn list(names: &[String]) -> String {
    const SHOWN: usize = 10;
    if names.is_empty() {
        return "none that has a name".into();
    }
    let shown: Vec<String> = names.iter().take(SHOWN).map(|name| Printable::new(name).to_string()).collect();
    let more = if names.len() > SHOWN { " and more" } else { "" };
    format!("{}{more}", shown.join(", "))
}
