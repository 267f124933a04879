//! An image, and what a room is made of: from the store's words to the host's.

use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Context, Result};
use carrel_host::Outcome;
use carrel_host::Patience;
use carrel_host::archive::ArchiveReader;
use carrel_host::image::ImageDefaults;
use carrel_host::spec::{LayerSpec, Part};
use carrel_protocol::agent::{self, Failure};
use carrel_store::progress::Bars;
use carrel_store::{
    Before, Compression, Digest, Image, Lease, Policy, PullOptions, Source, Store, StoreError,
};

use crate::arguments::run::Pull;

/// How an image is to be had.
#[derive(Clone, Debug)]
pub(crate) struct Wanted<'a> {
    /// Any of its forms.
    pub(crate) image: &'a str,
    /// When a registry is asked.
    pub(crate) pull: Pull,
    /// For another platform than this machine's.
    pub(crate) platform: Option<&'a str>,
    /// Plain HTTP with any registry.
    pub(crate) insecure: bool,
    /// Parts of the confinement that a reader of archives does without.
    pub(crate) without: Vec<Part>,
    /// By what their time is stretched.
    pub(crate) patience: Patience,
}

/// How long other commands are waited for before what was refused is left to `carrel prune`.
const SOON: Duration = Duration::from_secs(2);

/// What a room is made of, and what of it is to go if its guest refuses it.
#[derive(Debug)]
pub(crate) struct Acquired {
    /// The image.
    pub(crate) image: Image,
    /// The blob of a function's code.
    pub(crate) zip: Option<Digest>,
    before: Before,
}

impl Acquired {
    /// Finds an image, fetching it if need be. While the lease lives, its blobs stay in the store.
    pub(crate) fn find(store: &Store, wanted: &Wanted<'_>) -> Result<(Self, Lease)> {
        let lease = store.lease()?;
        let before = store.before(&wanted.image.parse()?)?;
        match acquire(store, wanted) {
            Ok(image) => Ok((Self { image, zip: None, before }, lease)),
            Err(error) => {
                drop(lease);
                // What a registry did not finish is gone on with the next time.
                if !matches!(error.downcast_ref(), Some(StoreError::Registry(_))) {
                    told(store.withdraw_nameless(&before, SOON));
                }
                Err(error)
            }
        }
    }

    /// The room is over. If its guest found the payload damaged, hostile or too large, what came into the store for this room alone goes
    /// again; the caller holds no lease any more.
    pub(crate) fn settle(&self, store: &Store, outcome: &Outcome) {
        let Outcome::Refused { failure: Failure::BadPayload | Failure::PayloadTooLarge, .. } = outcome else {
            return;
        };
        told(store.withdraw(&self.image, self.zip.as_slice(), &self.before, SOON));
    }
}

fn told(withdrawn: Result<Vec<Digest>, StoreError>) {
    match withdrawn {
        Ok(gone) => tracing::debug!(blobs = gone.len(), "what was refused is no longer kept"),
        Err(error) => {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "what was refused is still in the store; see `carrel prune`");
        }
    }
}

fn acquire(store: &Store, wanted: &Wanted<'_>) -> Result<Image> {
    let source: Source = wanted.image.parse()?;
    let mut options = PullOptions {
        policy: match wanted.pull {
            Pull::Always => Policy::Always,
            Pull::Missing => Policy::Missing,
            Pull::Never => Policy::Never,
        },
        insecure: wanted.insecure,
        ..PullOptions::default()
    };
    if let Some(platform) = wanted.platform {
        options.platform =
            platform.parse().with_context(|| format!("The platform '{platform}' is wrong."))?;
    }
    let archives = ArchiveReader::of_this_program(wanted.without.clone(), wanted.patience);
    Ok(store.acquire(&source, &options, &archives, &*Bars::stderr())?)
}

/// An image's layers, as a room's specification names them, and each opened.
pub(crate) fn layers(store: &Store, image: &Image) -> Result<(Vec<LayerSpec>, Vec<OwnedFd>)> {
    let mut specs = Vec::new();
    let mut files = Vec::new();
    for layer in &image.layers {
        specs.push(LayerSpec {
            digest: layer.digest.to_string(),
            size: layer.size,
            compression: match layer.compression {
                Compression::None => agent::Compression::None,
                Compression::Gzip => agent::Compression::Gzip,
                Compression::Zstd => agent::Compression::Zstd,
            },
            diff_id: layer.diff_id.to_string(),
        });
        files.push(store.blob(&layer.digest)?.into());
    }
    Ok((specs, files))
}

/// What an image says about what runs in it.
pub(crate) fn defaults(image: &Image) -> ImageDefaults {
    let config = &image.config;
    ImageDefaults {
        entrypoint: config.entrypoint.clone(),
        cmd: config.cmd.clone(),
        environment: config.env.clone(),
        working_directory: config.working_dir.clone(),
        user: config.user.clone(),
    }
}
