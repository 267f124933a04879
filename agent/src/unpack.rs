//! Payloads become files: layers and zips, fetched, verified, unpacked below a container's directory.
//!
//! ```text
//!  vsock ─▶ blob (size, digest) ─┬─▶ gzip, zstd, plain ─▶ diff_id, budget ─▶ archive (tar) ─▶ layer ─┐
//!                                └─▶ spool on the disk ─▶ zip ───────────────────────────────────────┤
//!                                                                                                   ▼
//!                                                       rootfs ◀── openat2, from descriptors ── tree
//! ```
//!
//! It happens in a forked process: it blocks, and what it parses is a stranger's. If it dies, its request has failed.

mod archive;
mod blob;
mod decimal;
mod layer;
mod pax;
mod sparse;
mod tree;
mod zipped;

use std::cell::Cell;
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Instant;

use carrel_protocol::agent::{Compression, Failure, Layer, Prepare, Prepared, UnpackLimits};
use rustix::process::{Resource, Rlimit};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::fork::{self, Separate};
use crate::refusal::Refusal;
use crate::socket::{Dialler, Socket};
use blob::Blob;
use carrel_protocol::chain;
use tree::{Links, Tree};

/// Name of a container's root in its directory.
pub(crate) const ROOTFS: &str = "rootfs";
/// Read and written at once.
const CHUNK: usize = 256 << 10;
/// `zstd --long=27`: above it a frame would take more memory for its window than small rooms have.
const ZSTD_WINDOW_LOG: u32 = 27;

/// Why a payload isn't unpacked.
#[derive(Debug, Error)]
pub(crate) enum UnpackError {
    /// A blob is not what was announced.
    #[error("the blob {name} is damaged: {problem}; pull the image again")]
    Blob {
        /// Its digest.
        name: String,
        /// In what way.
        problem: String,
    },
    /// A stream can't be decompressed or isn't an archive.
    #[error("{what} is damaged or not what its media type says")]
    Damaged {
        /// `the layer sha256:…`.
        what: String,
        /// What the decoder says.
        #[source]
        source: io::Error,
    },
    /// An archive asks for something that isn't done.
    #[error("the entry '{entry}' {problem}")]
    Entry {
        /// Its name.
        entry: String,
        /// As a predicate.
        problem: String,
    },
    /// A cap.
    #[error("the payload {0}")]
    TooLarge(String),
    /// The file system refuses an entry.
    #[error("the entry '{entry}' can't be written")]
    Write {
        /// Its name.
        entry: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Anything that isn't the payload's fault.
    #[error("{step} failed")]
    System {
        /// What was being done.
        step: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl UnpackError {
    fn failure(&self) -> Failure {
        let of = |error: &io::Error, otherwise| match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => Failure::DiskFull,
            Some(libc::EFBIG) => Failure::PayloadTooLarge,
            _ => otherwise,
        };
        match self {
            Self::Blob { .. } | Self::Damaged { .. } | Self::Entry { .. } => Failure::BadPayload,
            Self::TooLarge(_) => Failure::PayloadTooLarge,
            Self::Write { source, .. } => of(source, Failure::BadPayload),
            Self::System { source, .. } => of(source, Failure::System),
        }
    }

    fn system(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System { step, source }
    }

    /// A stream couldn't be read on: a cap was reached ([`blob::Plain`] says so as an [`io::Error`]), or it is damaged.
    fn reading(what: &str, source: io::Error) -> Self {
        source.downcast::<Self>().unwrap_or_else(|source| Self::Damaged { what: what.to_owned(), source })
    }

    /// As an entry's own, where it was one of a directory on the way to it.
    fn of_entry(self, entry: &[u8]) -> Self {
        if let Self::Write { source, .. } = self { Self::Write { entry: shown(entry), source } } else { self }
    }

    /// Whether other bytes than were announced could have led to it.
    fn may_come_from_other_bytes(&self) -> bool {
        match self {
            Self::Blob { .. } | Self::Damaged { .. } | Self::Entry { .. } => true,
            Self::TooLarge(_) | Self::Write { .. } | Self::System { .. } => false,
        }
    }
}

/// An entry's name as it can be shown.
fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).escape_debug().take(200).collect()
}

/// What may still be used. Shared by whoever reads and whoever writes.
#[derive(Debug)]
struct Budget {
    limits: UnpackLimits,
    bytes: Cell<u64>,
    entries: Cell<u64>,
}

impl Budget {
    fn new(limits: UnpackLimits) -> Self {
        Self { limits, bytes: Cell::new(0), entries: Cell::new(0) }
    }

    /// Decompressed bytes were read, or a hole was made: what a file's size says counts, not what it takes on the disk.
    fn take_bytes(&self, bytes: u64) -> Result<(), UnpackError> {
        self.bytes.set(self.bytes.get().saturating_add(bytes));
        if self.bytes.get() > self.limits.bytes {
            return Err(UnpackError::TooLarge(format!("unpacks to more than {} bytes", self.limits.bytes)));
        }
        Ok(())
    }

    /// An entry says that so many bytes follow.
    fn expect_bytes(&self, entry: &[u8], bytes: u64) -> Result<(), UnpackError> {
        if self.bytes.get().saturating_add(bytes) > self.limits.bytes {
            let entry = shown(entry);
            let message =
                format!("exceeds {} bytes with the entry '{entry}' of {bytes} bytes", self.limits.bytes);
            return Err(UnpackError::TooLarge(message));
        }
        Ok(())
    }

    /// Something was made.
    fn take_entry(&self) -> Result<(), UnpackError> {
        self.entries.set(self.entries.get().saturating_add(1));
        if self.entries.get() > self.limits.entries {
            return Err(UnpackError::TooLarge(format!("has more than {} entries", self.limits.entries)));
        }
        Ok(())
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Done {
    bytes: u64,
    entries: u64,
}

/// What the child says at its end.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Done(Done),
    Failed { failure: Failure, message: String },
}

/// Makes `folder`/rootfs of the request's payloads.
///
/// # Errors
///
/// Why not. `folder` is removed then.
pub(crate) async fn in_a_child(
    dialler: &Dialler,
    folder: &Path,
    request: &Prepare,
    began: Instant,
) -> Result<Prepared, Refusal> {
    let system = |error: io::Error| Refusal::new(Failure::System, format!("unpacking can't begin: {error}"));
    let (reader, writer) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|e| system(e.into()))?;
    let child = fork::fork(Separate::default(), || {
        fork::close_all_but(&[writer.as_fd()]);
        // Who runs out of memory while unpacking is this process, not the agent.
        let _ = fs::write("/proc/self/oom_score_adj", "500");
        let answer = match run(dialler, folder, request) {
            Ok(done) => Answer::Done(done),
            Err(error) => {
                let _ = fs::remove_dir_all(folder);
                Answer::Failed { failure: error.failure(), message: chain(&error) }
            }
        };
        let answer = serde_json::to_vec(&answer).unwrap_or_default();
        u8::from(rustix::io::write(&writer, &answer).is_err())
    });
    drop(writer);
    let child = child.map_err(system)?;
    let reader = Socket::new(reader).map_err(system)?;
    let mut answer = Vec::new();
    let mut chunk = [0; 4096];
    while let Ok(read @ 1..) = reader.read(&mut chunk).await {
        answer.extend_from_slice(chunk.get(..read).unwrap_or_default());
    }
    let ended = child.wait().await;
    match serde_json::from_slice(&answer) {
        Ok(Answer::Done(Done { bytes, entries })) => {
            let took_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
            Ok(Prepared { container: request.container, bytes, entries, took_us })
        }
        Ok(Answer::Failed { failure, message }) => Err(Refusal::new(failure, message)),
        Err(_) => Err(Refusal::new(
            Failure::System,
            format!("the unpacking process ended early ({ended:?}); give the room more memory"),
        )),
    }
}

fn run(dialler: &Dialler, folder: &Path, request: &Prepare) -> Result<Done, UnpackError> {
    let rootfs = folder.join(ROOTFS);
    fs::create_dir_all(&rootfs).map_err(UnpackError::system("making the container's directory"))?;
    rustix::process::umask(rustix::fs::Mode::empty());
    rustix::fs::chmod(&rootfs, rustix::fs::Mode::from_raw_mode(0o755))
        .map_err(|error| UnpackError::system("making the container's directory")(error.into()))?;
    // One descriptor for each component of the deepest path.
    let descriptors = Rlimit { current: Some(8192), maximum: Some(8192) };
    let _ = rustix::process::setrlimit(Resource::Nofile, descriptors);
    let budget = Budget::new(request.limits);
    let open =
        |links| Tree::open(&rootfs, links).map_err(UnpackError::system("opening the container's directory"));
    let mut tree = open(Links::InsideRoot)?;
    for (number, layer) in request.layers.iter().enumerate() {
        let stream = dialler.open_blocking(&layer.blob.stream);
        let stream = stream.map_err(UnpackError::system("dialling the host for a layer"))?;
        unpack_layer(fs::File::from(stream), layer, number == 0, &mut tree, &budget)?;
    }
    for zip in &request.zips {
        let stream = dialler.open_blocking(&zip.blob.stream);
        let stream = stream.map_err(UnpackError::system("dialling the host for a zip"))?;
        let spool = spool(stream, &zip.blob, folder)?;
        let at = tree.descend(zip.at.as_bytes(), &budget)?;
        zipped::unpack(spool, &mut Tree::from_directory(at, Links::Refused), &budget)?;
    }
    Ok(Done { bytes: budget.bytes.get(), entries: budget.entries.get() })
}

/// One layer from its stream into the tree.
fn unpack_layer(
    stream: impl Read,
    layer: &Layer,
    lowest: bool,
    tree: &mut Tree,
    budget: &Budget,
) -> Result<(), UnpackError> {
    let mut blob = Blob::new(stream, &layer.blob)?;
    let unpacked = decode_layer(&mut blob, layer, lowest, tree, budget);
    // A blob that isn't what it should be explains whatever else is wrong with it.
    match unpacked {
        Ok(()) => blob.finish(),
        Err(error) if error.may_come_from_other_bytes() => blob.finish().and(Err(error)),
        Err(error) => Err(error),
    }
}

fn decode_layer(
    blob: &mut Blob<impl Read>,
    layer: &Layer,
    lowest: bool,
    tree: &mut Tree,
    budget: &Budget,
) -> Result<(), UnpackError> {
    let what = format!("the layer {}", layer.blob.digest);
    let damaged = |source| UnpackError::Damaged { what: what.clone(), source };
    let buffered = io::BufReader::with_capacity(CHUNK, blob);
    let decoder: Box<dyn Read + '_> = match layer.compression {
        Compression::None => Box::new(buffered),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(buffered)),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(buffered).map_err(damaged)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG).map_err(damaged)?;
            Box::new(decoder)
        }
    };
    let mut plain = blob::Plain::new(decoder, layer, budget)?;
    layer::apply(&mut plain, &what, lowest, tree, budget)?;
    plain.finish(&what)
}

/// A zip's directory is at its end, so the blob goes to the disk first, verified, and nameless.
fn spool(
    stream: OwnedFd,
    blob: &carrel_protocol::agent::Blob,
    folder: &Path,
) -> Result<fs::File, UnpackError> {
    let step = UnpackError::system;
    let path = folder.join("spool");
    let mut options = fs::OpenOptions::new();
    let mut file =
        options.read(true).write(true).create_new(true).open(&path).map_err(step("spooling a zip"))?;
    fs::remove_file(&path).map_err(step("spooling a zip"))?;
    let mut blob = Blob::new(fs::File::from(stream), blob)?;
    let mut chunk = vec![0; CHUNK];
    loop {
        let read = blob.read(&mut chunk).map_err(step("receiving a zip"))?;
        if read == 0 {
            break;
        }
        io::Write::write_all(&mut file, chunk.get(..read).unwrap_or_default())
            .map_err(step("spooling a zip"))?;
    }
    blob.finish()?;
    Ok(file)
}

#[cfg(test)]
mod tests;
