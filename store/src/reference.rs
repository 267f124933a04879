//! References: what the user calls an image, parsed once at the edge.
//!
//! ```text
//!   oci:DIR[:TAG]              an OCI layout in a folder
//!   oci-archive:FILE[:TAG]     the same in a tar
//!   docker-archive:FILE[:REF]  what `docker save` writes
//!   docker://NAME              an image in a registry, said at length
//!   NAME                       the same: [HOST[:PORT]/]PATH[:TAG][@DIGEST], completed as Docker completes it
//! ```
//!
//! As in containers-transports(5), the first colon after the transport ends the path: a path can't hold one, a tag can.

use std::fmt::{self, Display, Formatter};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::digest::{Digest, DigestError};
use crate::printable::Printable;

/// The registry that is meant when none is named.
const DOCKER_HUB: &str = "docker.io";
/// distribution/reference's cap on host and path together, in bytes.
const LONGEST_NAME: usize = 255;
/// distribution-spec 1.1, "Pulling manifests": a tag has at most 128 characters.
const LONGEST_TAG: usize = 128;

/// Why words name no image.
#[derive(Debug, thiserror::Error)]
pub enum ReferenceError {
    /// Nothing at all.
    #[error("The image's name is empty: give one such as debian:12 or oci:FOLDER.")]
    Empty,
    /// A transport without its path.
    #[error("{0:?} names no file: write {1}.")]
    NoPath(Printable, &'static str),
    /// The current folder is gone, so a relative path means nothing.
    #[error("The path in {0:?} is relative, and the current folder can't be found: give an absolute one.")]
    NoFolder(Printable, #[source] std::io::Error),
    /// A transport of other tools.
    #[error(
        "Images can't be read from {0:?}: oci:, oci-archive:, docker-archive: and docker:// are understood."
    )]
    UnknownTransport(Printable),
    /// Against the grammar of distribution/reference.
    #[error(
        "{0:?} is no image name: lower-case letters, digits and single . _ - between them, parts divided by /."
    )]
    BadName(Printable),
    /// Against distribution-spec.
    #[error("{0:?} has a bad tag: letters, digits, . _ - and at most 128 of them.")]
    BadTag(Printable),
    /// Not HOST or HOST:PORT.
    #[error("{0:?} has a bad registry: write HOST or HOST:PORT.")]
    BadHost(Printable),
    /// More than 255 bytes.
    #[error("The image name {0:?} is longer than 255 characters.")]
    TooLong(Printable),
    /// After the `@`.
    #[error("{0:?} has a bad digest after its @.")]
    BadDigest(Printable, #[source] DigestError),
    /// Docker reserves these for image ids.
    #[error("{0:?} looks like an image's digest: write sha256: in front of it to name an image by digest.")]
    LooksLikeDigest(Printable),
}

/// Where an image comes from. Displayed as its canonical name, by which the store remembers it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// `oci:DIR[:TAG]`; the path is absolute.
    Layout {
        /// The layout's folder.
        folder: PathBuf,
        /// `org.opencontainers.image.ref.name`; without one, the layout's only image is meant.
        tag: Option<String>,
    },
    /// `oci-archive:FILE[:TAG]`; the path is absolute.
    OciArchive {
        /// The tar.
        file: PathBuf,
        /// As in a layout.
        tag: Option<String>,
    },
    /// `docker-archive:FILE[:REF]`; the path is absolute.
    DockerArchive {
        /// The tar.
        file: PathBuf,
        /// One of its `RepoTags`; without one, its only image is meant.
        tag: Option<Remote>,
    },
    /// An image in a registry.
    Registry(Remote),
}

/// An image's name in a registry, complete.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Remote {
    /// `docker.io`, `127.0.0.1:5000`, `[::1]:5000`.
    pub host: String,
    /// `library/debian`.
    pub path: String,
    /// `latest` where nothing was said; `None` only beside a digest.
    pub tag: Option<String>,
    /// What the content must be; wins over the tag.
    pub digest: Option<Digest>,
}

impl Remote {
    /// Whether the registry runs on this machine: `localhost`, 127.0.0.0/8 or `::1`.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        is_loopback(&self.host)
    }
}

/// Whether HOST or HOST:PORT is this machine by its very name. Names are not looked up: DNS may lie.
pub(crate) fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => host.split(':').next().unwrap_or(host),
    };
    name == "localhost"
        || name.parse::<Ipv4Addr>().is_ok_and(|address| address.is_loopback())
        || name.parse::<Ipv6Addr>().is_ok_and(|address| address.is_loopback())
}

impl FromStr for Source {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        if text.is_empty() {
            return Err(ReferenceError::Empty);
        }
        if let Some(rest) = text.strip_prefix("docker://") {
            return rest.parse().map(Self::Registry);
        }
        let Some((transport, rest)) = text.split_once(':') else {
            return text.parse().map(Self::Registry);
        };
        match transport {
            "oci" => {
                let (folder, tag) = file(text, rest, "oci:FOLDER or oci:FOLDER:TAG")?;
                Ok(Self::Layout { folder, tag: tag.map(str::to_owned) })
            }
            "oci-archive" => {
                let (file, tag) = file(text, rest, "oci-archive:FILE or oci-archive:FILE:TAG")?;
                Ok(Self::OciArchive { file, tag: tag.map(str::to_owned) })
            }
            "docker-archive" => {
                let (file, tag) = file(text, rest, "docker-archive:FILE or docker-archive:FILE:NAME:TAG")?;
                Ok(Self::DockerArchive { file, tag: tag.map(str::parse).transpose()? })
            }
            // A port can't start with a slash, and a tag can't hold one before another part.
            _ if rest.starts_with('/') => Err(ReferenceError::UnknownTransport(Printable::new(text))),
            "dir" | "containers-storage" | "docker-daemon" | "ostree" | "sif" | "docker" => {
                Err(ReferenceError::UnknownTransport(Printable::new(text)))
            }
            _ => text.parse().map(Self::Registry),
        }
    }
}

/// Path and tag of `PATH[:TAG]`.
fn file<'a>(
    whole: &str,
    rest: &'a str,
    form: &'static str,
) -> Result<(PathBuf, Option<&'a str>), ReferenceError> {
    let (path, tag) = rest.split_once(':').map_or((rest, None), |(path, tag)| (path, Some(tag)));
    if path.is_empty() {
        return Err(ReferenceError::NoPath(Printable::new(whole), form));
    }
    if tag.is_some_and(|tag| tag.is_empty() || tag.len() > LONGEST_NAME || tag.chars().any(char::is_control))
    {
        return Err(ReferenceError::BadTag(Printable::new(whole)));
    }
    let path = std::path::absolute(Path::new(path))
        .map_err(|error| ReferenceError::NoFolder(Printable::new(whole), error))?;
    // `DIR/` and `DIR` are one image.
    Ok((path.components().collect(), tag))
}

impl FromStr for Remote {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let shown = || Printable::new(text);
        if text.is_empty() {
            return Err(ReferenceError::Empty);
        }
        if text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(ReferenceError::LooksLikeDigest(shown()));
        }
        let (name, digest) = match text.split_once('@') {
            Some((name, digest)) => {
                let digest = digest.parse().map_err(|error| ReferenceError::BadDigest(shown(), error))?;
                (name, Some(digest))
            }
            None => (text, None),
        };
        let (host, rest) = match name.split_once('/') {
            Some((host, rest)) if is_host(host) => (host, rest),
            _ => (DOCKER_HUB, name),
        };
        // With the host gone, a colon can only start the tag.
        let (path, tag) = match rest.split_once(':') {
            Some((path, tag)) if is_tag(tag) => (path, Some(tag.to_owned())),
            Some(_) => return Err(ReferenceError::BadTag(shown())),
            None => (rest, None),
        };
        if path.is_empty() || !path.split('/').all(is_component) {
            return Err(ReferenceError::BadName(shown()));
        }
        if !valid_host(host) {
            return Err(ReferenceError::BadHost(shown()));
        }
        let host = if host == "index.docker.io" { DOCKER_HUB } else { host };
        let path = if host == DOCKER_HUB && !path.contains('/') {
            format!("library/{path}")
        } else {
            path.to_owned()
        };
        if host.len() + 1 + path.len() > LONGEST_NAME {
            return Err(ReferenceError::TooLong(shown()));
        }
        let tag = tag.or_else(|| digest.is_none().then(|| "latest".to_owned()));
        Ok(Self { host: host.to_owned(), path, tag, digest })
    }
}

/// Docker's rule for telling a registry from the first part of a path.
fn is_host(word: &str) -> bool {
    word == "localhost" || word.contains(['.', ':']) || word.bytes().any(|byte| byte.is_ascii_uppercase())
}

fn valid_host(host: &str) -> bool {
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => {
            let Some((address, after)) = rest.split_once(']') else { return false };
            if address.parse::<Ipv6Addr>().is_err() {
                return false;
            }
            return after.is_empty() || after.strip_prefix(':').is_some_and(valid_port);
        }
        None => host.split_once(':').map_or((host, None), |(name, port)| (name, Some(port))),
    };
    let label = |label: &str| {
        let bytes = label.as_bytes();
        !label.is_empty()
            && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'-')
            && bytes[0] != b'-'
            && bytes[bytes.len() - 1] != b'-'
    };
    name.split('.').all(label) && port.is_none_or(valid_port)
}

fn valid_port(port: &str) -> bool {
    port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port > 0)
}

/// distribution/reference's `path-component`: `[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*`.
fn is_component(word: &str) -> bool {
    let alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = word.as_bytes();
    if !(bytes.first().is_some_and(alphanumeric) && bytes.last().is_some_and(alphanumeric)) {
        return false;
    }
    bytes.split(alphanumeric).all(|separator| match separator {
        b"" | b"." | b"_" | b"__" => true,
        other => other.iter().all(|byte| *byte == b'-'),
    })
}

fn is_tag(tag: &str) -> bool {
    let mut bytes = tag.bytes();
    tag.len() <= LONGEST_TAG
        && bytes.next().is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

impl Display for Remote {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.path)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        self.digest.as_ref().map_or(Ok(()), |digest| write!(f, "@{digest}"))
    }
}

impl Display for Source {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut file = |transport: &str, path: &Path, tag: Option<&dyn Display>| {
            write!(f, "{transport}:{}", path.display())?;
            tag.map_or(Ok(()), |tag| write!(f, ":{tag}"))
        };
        match self {
            Self::Layout { folder, tag } => file("oci", folder, tag.as_ref().map(|tag| tag as &dyn Display)),
            Self::OciArchive { file: path, tag } => {
                file("oci-archive", path, tag.as_ref().map(|tag| tag as &dyn Display))
            }
            Self::DockerArchive { file: path, tag } => {
                file("docker-archive", path, tag.as_ref().map(|tag| tag as &dyn Display))
            }
            Self::Registry(remote) => remote.fmt(f),
        }
    }
}

impl Serialize for Source {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Source {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests;
