//! Registries (OCI distribution-spec 1.1, "Pull"; Docker's HTTP API V2): names to documents and blobs, over HTTP.
//!
//! ```text
//!   resolve: tag or digest ─▶ manifest or index     client.rs       proof, redirects, failures (challenge.rs, credentials.rs)
//!   document: descriptor ───▶ verified bytes        download.rs     a blob in as many pieces as the connection breaks into
//! ```
//!
//! All that comes is capped by what was announced and checked against its digest; what a registry says about itself is shown, never believed.

use std::error::Error;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

use ureq::http::StatusCode;
use ureq::http::header::{ACCEPT, CONTENT_TYPE};

use crate::acquire::PullOptions;
use crate::blobs::{BlobError, Blobs};
use crate::digest::Digest;
use crate::document::{ACCEPTED, Descriptor, LARGEST_DOCUMENT, is_manifest_type};
use crate::images;
use crate::origin::Origin;
use crate::printable::Printable;
use crate::progress::Transfer;
use crate::reference::Remote;
use crate::section::verify;
use crate::store::StoreError;

mod challenge;
mod client;
pub mod credentials;
mod download;

use client::{Answer, Client};
use credentials::CredentialsError;

/// The longest pause between two tries. A registry that asks for more is not waited for.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// How long a registry is waited for, and how often it is asked again.
#[derive(Clone, Debug)]
pub struct Patience {
    /// For its name to be found, and for a connection.
    pub connect: Duration,
    /// For an answer to begin, and for each next piece of it.
    pub stall: Duration,
    /// How many tries in a row may bring nothing before a blob is given up.
    pub retries: u32,
    /// Before the first repetition; doubled for each after it, up to 30 s.
    pub pause: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(15),
            stall: Duration::from_secs(30),
            retries: 5,
            pause: Duration::from_millis(300),
        }
    }
}

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
    #[error(
        "{host} can't be reached: check its name and the network, and whether it speaks plain HTTP (--insecure)."
    )]
    Unreachable {
        /// Host and port.
        host: Printable,
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

/// A repository of a registry.
pub(crate) struct Registry {
    client: Client,
    name: String,
    blobs: Blobs,
    patience: Patience,
    parallel: usize,
}

impl Registry {
    pub(crate) fn new(remote: &Remote, options: &PullOptions, blobs: &Blobs) -> Self {
        Self {
            client: Client::new(remote, options),
            name: remote.to_string(),
            blobs: blobs.clone(),
            patience: options.patience.clone(),
            parallel: options.parallel.max(1),
        }
    }

    /// Fetches the document that a tag or a digest names.
    pub(crate) fn resolve(&self, remote: &Remote) -> Result<(Descriptor, Vec<u8>), StoreError> {
        let digest = remote.digest.as_ref().map(Digest::to_string);
        let reference = digest.as_deref().or(remote.tag.as_deref()).unwrap_or("latest");
        let answer = self.ask(&format!("manifests/{reference}"), &ACCEPTED.join(", "))?;
        let status = answer.response.status();
        if status == StatusCode::NOT_FOUND {
            let (host, image) = (self.client.host().to_owned(), self.name.clone());
            return Err(RegistryError::NotFound { host, image, said: client::said(answer.response) }.into());
        }
        let answer = self.successful(answer)?;
        let header = |name: &str| answer.response.headers().get(name).and_then(|value| value.to_str().ok());
        let media_type =
            header(CONTENT_TYPE.as_str()).and_then(|value| value.split(';').next()).unwrap_or("");
        let media_type = media_type.trim().to_owned();
        // A mirror that mixes things up: the digest is its own claim, so it at least has to be true.
        let claimed: Option<Digest> = header("docker-content-digest").and_then(|value| value.parse().ok());
        let bytes = self.body(answer)?;
        for expected in remote.digest.iter().chain(&claimed) {
            verify(&bytes, expected)?;
        }
        let digest = remote.digest.clone().unwrap_or_else(|| Digest::of(&bytes));
        let descriptor = Descriptor { media_type, ..Descriptor::plain(digest, bytes.len() as u64) };
        Ok((descriptor, bytes))
    }

    /// Asks until there is an answer that is worth something, a few times at most.
    fn ask(&self, what: &str, accept: &str) -> Result<Answer, RegistryError> {
        let mut tries = 0;
        loop {
            let answer = self.client.get(what, &[(ACCEPT.as_str(), accept)])?;
            if tries >= self.patience.retries || !is_passing(answer.response.status()) {
                return Ok(answer);
            }
            let Some(pause) = self.pause(tries, client::retry_after(&answer.response)) else {
                return Ok(answer);
            };
            drop(answer);
            thread::sleep(pause);
            tries += 1;
        }
    }

    /// Tries again when the connection fails: for what comes after the first answer, when we know that there is a registry.
    fn persist<T>(&self, attempt: impl Fn() -> Result<T, RegistryError>) -> Result<T, RegistryError> {
        let mut tries = 0;
        loop {
            match attempt() {
                Err(RegistryError::Unreachable { .. } | RegistryError::Stalled(_))
                    if tries < self.patience.retries => {}
                outcome => return outcome,
            }
            thread::sleep(self.pause(tries, None).unwrap_or(LONGEST_PAUSE));
            tries += 1;
        }
    }

    /// How long to wait before trying again: what the registry asks for, or twice as long as the last time. `None` if it asks
    /// for more than anybody waits.
    fn pause(&self, tries: u32, asked: Option<Duration>) -> Option<Duration> {
        let doubled = self.patience.pause.saturating_mul(1 << tries.min(10)).min(LONGEST_PAUSE);
        Some(asked.unwrap_or(doubled)).filter(|pause| *pause <= LONGEST_PAUSE)
    }

    /// Sorts out failures.
    fn successful(&self, answer: Answer) -> Result<Answer, RegistryError> {
        let status = answer.response.status();
        if status.is_success() {
            return Ok(answer);
        }
        let (host, repository) = (self.client.host().to_owned(), self.name.clone());
        let said = client::said(answer.response);
        Err(match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if !answer.redirected => {
                RegistryError::Denied { host, repository, said }
            }
            _ => RegistryError::Failed { host, said },
        })
    }

    /// The whole of a document.
    fn body(&self, answer: Answer) -> Result<Vec<u8>, RegistryError> {
        let body = answer.response.into_body().into_with_config().limit(LARGEST_DOCUMENT).read_to_vec();
        body.map_err(|error| {
            if matches!(error, ureq::Error::BodyExceedsLimit(_)) {
                return RegistryError::TooLarge(self.name.clone());
            }
            self.client.unreachable(&format!("https://{}", self.client.host()), error)
        })
    }
}

/// Whether a failure may be over when we ask again.
fn is_passing(status: StatusCode) -> bool {
    status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error()
}

impl Origin for Registry {
    fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>, StoreError> {
        if self.blobs.has(&descriptor.digest, descriptor.size)? {
            return Ok(images::document(&self.blobs, descriptor)?);
        }
        let what = if is_manifest_type(&descriptor.media_type) { "manifests" } else { "blobs" };
        let bytes = self.persist(|| {
            let answer = self.ask(&format!("{what}/{}", descriptor.digest), "*/*")?;
            if answer.response.status() == StatusCode::NOT_FOUND {
                let (host, digest) = (self.client.host().to_owned(), descriptor.digest.clone());
                return Err(RegistryError::NoBlob { host, digest });
            }
            self.body(self.successful(answer)?)
        })?;
        let actual = bytes.len() as u64;
        if actual != descriptor.size {
            let (digest, expected) = (descriptor.digest.clone(), descriptor.size);
            return Err(BlobError::WrongSize { digest, expected, actual }.into());
        }
        verify(&bytes, &descriptor.digest)?;
        Ok(bytes)
    }

    fn fetch(
        &self,
        blobs: &Blobs,
        descriptor: &Descriptor,
        transfer: &dyn Transfer,
        cancelled: &AtomicBool,
    ) -> Result<(), StoreError> {
        self.download(blobs, descriptor, transfer, cancelled)
    }

    fn parallel(&self) -> usize {
        self.parallel
    }
}

#[cfg(test)]
mod tests;
