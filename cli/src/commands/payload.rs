//! An image, and what a room is made of: from the store's words to the host's.

use std::os::fd::OwnedFd;

use anyhow::{Context, Result};
use carrel_host::archive::ArchiveReader;
use carrel_host::image::ImageDefaults;
use carrel_host::spec::{LayerSpec, Part};
use carrel_protocol::agent;
use carrel_store::progress::Bars;
use carrel_store::{Compression, Image, Policy, PullOptions, Source, Store};

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
}

/// Finds an image, fetching it if need be. The caller holds a lease.
pub(crate) fn acquire(store: &Store, wanted: &Wanted<'_>) -> Result<Image> {
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
    let archives = ArchiveReader::of_this_program(wanted.without.clone());
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
