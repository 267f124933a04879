//! What stands between a pull and a registry's image, each with its sentence.

use std::error::Error;

use super::credentials::CredentialsError;
use crate::digest::Digest;
use crate::printable::Printable;

/// Why a registry did not give what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// No such name there.
    #[error("The registry {host} has no image {image}: {said}.")]
    NotFound {
        /// The registry.
        host: String,
        /// What was asked for.
        image: String,
        /// Its own words.
        said: Printable,
    },
    /// It has the manifest, and not what the manifest names.
    #[error("The registry {host} lacks {digest}, a part of the image: push the image again.")]
    NoBlob {
        /// The registry.
        host: String,
        /// What is missing.
        digest: Digest,
    },
    /// It wants somebody else, or anybody at all.
    #[error(
        "The registry {host} denies access to {repository} ({said}): it does not exist, or `docker login {host}` is needed."
    )]
    Denied {
        /// The registry.
        host: String,
        /// The repository.
        repository: String,
        /// Its own words.
        said: Printable,
    },
    /// Another failure of its own.
    #[error("The registry {host} failed: {said}.")]
    Failed {
        /// The registry.
        host: String,
        /// Its own words.
        said: Printable,
    },
    /// No connection.
    #[error("{host} can't be reached: check {what}.")]
    Unreachable {
        /// Host and port.
        host: Printable,
        /// What may be wrong, by how it was spoken to.
        what: &'static str,
        /// Why.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// A connection over which nothing comes.
    #[error("{0} does not answer: nothing came for too long.")]
    Stalled(Printable),
    /// A blob that never comes to its end.
    #[error(
        "{digest} comes truncated from the registry {host}: {there} of {size} bytes, after several tries. What came is kept for the next pull."
    )]
    Truncated {
        /// The registry.
        host: String,
        /// Which blob.
        digest: Digest,
        /// How many bytes came.
        there: u64,
        /// How many its manifest says.
        size: u64,
        /// What happened the last time.
        #[source]
        source: Option<Box<dyn Error + Send + Sync>>,
    },
    /// A redirect to plain HTTP, to nowhere, or with a password in it.
    #[error("The registry {host} redirects to {to:?}, which is not followed.")]
    BadRedirect {
        /// The registry.
        host: String,
        /// Where to.
        to: Printable,
    },
    /// A circle.
    #[error("The registry {0} redirects again and again.")]
    Redirects(String),
    /// A token service that must not be told a password.
    #[error(
        "The registry {host} wants a token from {realm:?}, which is not asked: it would have to speak HTTPS."
    )]
    BadRealm {
        /// The registry.
        host: String,
        /// Its token service.
        realm: Printable,
    },
    /// An answer without a token.
    #[error("The token service of the registry {0} gave no token that can be used.")]
    BadToken(String),
    /// Too long a manifest.
    #[error("The manifest of {0} is too large: 4 MiB is the most that is read.")]
    TooLarge(String),
    /// Another part of the image failed.
    #[error("{0} was not fetched to its end, because another part of the image failed.")]
    Cancelled(Digest),
    /// Credentials are there and can't be read.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
}
