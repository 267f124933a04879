//! Registries (OCI distribution-spec 1.1, "Pull"; Docker's HTTP API V2): names to documents and blobs, over HTTP.
//!
//! ```text
//!   resolve: tag or digest ─▶ manifest or index     client.rs       proof, redirects, failures (challenge.rs, credentials.rs)
//!   document: descriptor ───▶ verified bytes        download.rs     a blob in as many pieces as the connection breaks into
//! ```
//!
//! All that comes is capped by what was announced and checked against its digest; what a registry says about itself is shown, never believed.

use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

use ureq::http::StatusCode;
use ureq::http::header::{ACCEPT, CONTENT_TYPE};

use crate::blobs::{BlobError, Blobs};
use crate::digest::Digest;
use crate::document::{ACCEPTED, Descriptor, LARGEST_DOCUMENT, is_manifest_type};
use crate::images;
use crate::options::{Patience, PullOptions};
use crate::origin::Origin;
use crate::progress::Transfer;
use crate::reference::Remote;
use crate::section::verify;
use crate::store::StoreError;

mod challenge;
mod client;
pub mod credentials;
mod download;
pub(crate) mod refusal;

use client::{Answer, Client};
pub use refusal::RegistryError;

/// The longest pause between two tries. A registry that asks for more is not waited for.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

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
