//! A blob over connections that break: every try goes on where the one before stopped (RFC 9110 §14, "Range Requests").
//!
//! ```text
//!             ┌──────────────── broken: pause, longer each time nothing came ───────────────┐
//!             ▼                                                                             │
//!   ask for bytes=N- ─ 206 from N ─▶ append ─▶ all there? ─ no ─────────────────────────────┤
//!             │                                    └─ yes ─▶ commit ─ wrong digest, and begun by an earlier pull ─▶ once from 0
//!             ├─ 200 ───────────────▶ from 0: it knows no ranges                            │
//!             └─ 429, 5xx, 416, a redirect that has expired ────────────────────────────────┘
//! ```

use std::error::Error;
use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ureq::http::StatusCode;
use ureq::http::header::{CONTENT_RANGE, RANGE};

use super::client::{self, Answer};
use super::refusal::RegistryError;
use super::{Registry, is_passing};
use crate::blobs::{BlobError, Blobs};
use crate::document::Descriptor;
use crate::ingest::{Ingest, Kind};
use crate::progress::Transfer;
use crate::store::StoreError;

/// How much is read at a time, in bytes: progress is told and cancelling is looked at this often.
const PIECE: usize = 128 << 10;
/// A blob may come in this many pieces, so that a registry that sends a byte a connection comes to an end.
const MOST_TRIES: u32 = 200;

/// Why a try ended before the blob did.
enum Broken {
    /// The next may do better, after this long.
    Passing { source: Option<Box<dyn Error + Send + Sync>>, asked: Option<Duration> },
    /// It won't.
    Final(Box<StoreError>),
}

impl<E: Into<StoreError>> From<E> for Broken {
    fn from(error: E) -> Self {
        Self::Final(Box::new(error.into()))
    }
}

impl Registry {
    /// Brings a blob into the store, in as many tries as it takes.
    pub(super) fn download(
        &self,
        blobs: &Blobs,
        descriptor: &Descriptor,
        transfer: &dyn Transfer,
        cancelled: &AtomicBool,
    ) -> Result<(), StoreError> {
        loop {
            let (digest, size) = (&descriptor.digest, descriptor.size);
            let Some(mut ingest) = Ingest::named(blobs, digest, size, Kind::Download)? else {
                return Ok(());
            };
            let inherited = ingest.written();
            transfer.advanced(inherited);
            self.complete(&mut ingest, descriptor, transfer, cancelled)?;
            match ingest.commit() {
                Ok(_) => return Ok(()),
                // What an earlier pull left may have been torn by a power cut. It is gone now.
                Err(BlobError::WrongDigest { .. }) if inherited > 0 => transfer.restarted(),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Tries until all bytes are there.
    fn complete(
        &self,
        ingest: &mut Ingest<'_>,
        descriptor: &Descriptor,
        transfer: &dyn Transfer,
        cancelled: &AtomicBool,
    ) -> Result<(), StoreError> {
        let mut in_vain = 0;
        let mut tries = 0;
        while ingest.written() < descriptor.size {
            let before = ingest.written();
            let (source, asked) = match self.attempt(ingest, descriptor, transfer, cancelled) {
                Ok(()) => (None, None),
                Err(Broken::Passing { source, asked }) => (source, asked),
                Err(Broken::Final(error)) => return Err(*error),
            };
            if ingest.written() >= descriptor.size {
                break;
            }
            tries += 1;
            in_vain = if ingest.written() > before { 0 } else { in_vain + 1 };
            let pause = self.pause(in_vain, asked);
            let Some(pause) = pause.filter(|_| in_vain <= self.patience.retries && tries <= MOST_TRIES)
            else {
                return Err(RegistryError::Truncated {
                    host: self.client.host().to_owned(),
                    digest: descriptor.digest.clone(),
                    there: ingest.written(),
                    size: descriptor.size,
                    source,
                }
                .into());
            };
            tracing::debug!(digest = %descriptor.digest, there = ingest.written(), tries, "the download broke off");
            wait(pause, cancelled);
        }
        Ok(())
    }

    /// One request, and what comes of it.
    fn attempt(
        &self,
        ingest: &mut Ingest<'_>,
        descriptor: &Descriptor,
        transfer: &dyn Transfer,
        cancelled: &AtomicBool,
    ) -> Result<(), Broken> {
        if cancelled.load(Ordering::Relaxed) {
            return Err(RegistryError::Cancelled(descriptor.digest.clone()).into());
        }
        let range = format!("bytes={}-", ingest.written());
        let headers: &[(&str, &str)] =
            if ingest.written() > 0 { &[(RANGE.as_str(), range.as_str())] } else { &[] };
        let answer = match self.client.get(&format!("blobs/{}", descriptor.digest), headers) {
            Ok(answer) => answer,
            Err(error @ (RegistryError::Unreachable { .. } | RegistryError::Stalled(_))) => {
                return Err(Broken::Passing { source: Some(Box::new(error)), asked: None });
            }
            Err(error) => return Err(error.into()),
        };
        let answer = self.usable(answer, ingest, descriptor, transfer)?;
        let mut body = answer.response.into_body().into_reader();
        let mut piece = vec![0; PIECE];
        loop {
            if cancelled.load(Ordering::Relaxed) {
                return Err(RegistryError::Cancelled(descriptor.digest.clone()).into());
            }
            match body.read(&mut piece) {
                Ok(0) => return Ok(()),
                Ok(count) => {
                    ingest.write(&piece[..count])?;
                    transfer.advanced(count as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Broken::Passing { source: Some(Box::new(error)), asked: None }),
            }
        }
    }

    /// An answer whose body goes on where the ingest is.
    fn usable(
        &self,
        answer: Answer,
        ingest: &mut Ingest<'_>,
        descriptor: &Descriptor,
        transfer: &dyn Transfer,
    ) -> Result<Answer, Broken> {
        let status = answer.response.status();
        let restart = |ingest: &mut Ingest<'_>| {
            transfer.restarted();
            ingest.restart()
        };
        match status {
            StatusCode::OK => {
                if ingest.written() > 0 {
                    restart(ingest)?;
                }
                self.check_length(answer.response.body().content_length(), descriptor)?;
                Ok(answer)
            }
            StatusCode::PARTIAL_CONTENT => {
                let header = answer.response.headers().get(CONTENT_RANGE);
                let range = header.and_then(|value| value.to_str().ok()).and_then(content_range);
                match range {
                    Some((start, total)) if start == ingest.written() => {
                        self.check_length(total, descriptor)?;
                        Ok(answer)
                    }
                    // Not what we asked for: without a range it can't be misunderstood.
                    _ => {
                        restart(ingest)?;
                        Err(Broken::Passing { source: None, asked: None })
                    }
                }
            }
            StatusCode::RANGE_NOT_SATISFIABLE => {
                restart(ingest)?;
                Err(Broken::Passing { source: None, asked: None })
            }
            StatusCode::NOT_FOUND if !answer.redirected => {
                let (host, digest) = (self.client.host().to_owned(), descriptor.digest.clone());
                Err(RegistryError::NoBlob { host, digest }.into())
            }
            // A signed URL that has expired: the registry writes a new one.
            status if is_passing(status) || answer.redirected => {
                let asked = client::retry_after(&answer.response);
                let (host, said) = (self.client.host().to_owned(), client::said(answer.response));
                let source: Box<dyn Error + Send + Sync> = Box::new(RegistryError::Failed { host, said });
                Err(Broken::Passing { source: Some(source), asked })
            }
            _ => Err(match self.successful(answer) {
                // 204 and the like: a success without content is no blob.
                Ok(answer) => {
                    let (host, said) = (self.client.host().to_owned(), client::said(answer.response));
                    RegistryError::Failed { host, said }.into()
                }
                Err(error) => error.into(),
            }),
        }
    }

    /// A registry that announces another length than the manifest is wrong from the first byte.
    fn check_length(&self, announced: Option<u64>, descriptor: &Descriptor) -> Result<(), BlobError> {
        match announced {
            Some(actual) if actual != descriptor.size => {
                tracing::debug!(host = self.client.host(), "the announced length is not the manifest's");
                let (digest, expected) = (descriptor.digest.clone(), descriptor.size);
                Err(BlobError::WrongSize { digest, expected, actual })
            }
            _ => Ok(()),
        }
    }
}

/// Start and whole length of `bytes START-END/LENGTH`; the length may be `*`.
fn content_range(value: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = value.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (start, _) = range.split_once('-')?;
    let total = if total == "*" { None } else { Some(total.parse().ok()?) };
    Some((start.parse().ok()?, total))
}

/// Sleeps, unless nobody wants the blob any more.
fn wait(pause: Duration, cancelled: &AtomicBool) {
    const STEP: Duration = Duration::from_millis(100);
    let until = Instant::now() + pause;
    while !cancelled.load(Ordering::Relaxed) {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        thread::sleep(left.min(STEP));
    }
}
