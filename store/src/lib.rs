//! The store: images and templates on disk, by content.
//!
//! ```text
//!   oci:DIR  oci-archive:FILE  docker-archive:FILE  docker://NAME
//!      └──────────┴──────┬──────────┴─────────────────┘
//!                        ▼ reference: what the user says, parsed once
//!                     acquire ─▶ origin: top document ─▶ index* ─▶ manifest ─▶ configuration, layers
//!                        │                 digests and sizes are checked on the way in
//!                        ▼
//!     ROOT/ingest ─▶ ROOT/blobs ◀─ ROOT/images (names)         lease: nothing is collected meanwhile
//!                        │                                      prune: what nobody names goes
//!                        ▼
//!                     Image: configuration, and layers to be opened read-only
//! ```
//!
//! Beside the images lie [`templates`]: frozen rooms, made from them by the host, whose clones start quicker than an image is unpacked.
//!
//! Everything blocks; parallel downloads are threads of a call's own. Many processes may use one store at once: there is no daemon
//! behind it, only locks that die with their holders. Layers are hashed and never looked into: they are unpacked inside a guest.

#![forbid(unsafe_code)]

pub mod archive;
pub mod blobs;
pub mod config;
pub mod digest;
pub mod docker_archive;
pub mod document;
pub mod images;
pub mod layout;
pub mod lease;
pub mod platform;
pub mod printable;
pub mod progress;
pub mod prune;
pub mod reference;
pub mod registry;
pub mod section;
pub mod templates;

mod acquire;
#[cfg(test)]
mod hostile;
mod ingest;
mod made;
mod options;
mod origin;
mod store;
#[cfg(test)]
mod testing;
mod withdraw;

pub use config::ImageConfig;
pub use digest::Digest;
pub use document::Compression;
pub use images::{Image, LayerBlob};
pub use lease::Lease;
pub use made::{Made, Written};
pub use options::{Patience, Policy, PullOptions};
pub use platform::Platform;
pub use prune::{PruneOptions, Pruned};
pub use reference::Source;
pub use store::{Store, StoreError};
pub use templates::{Template, TemplateKey, Templates};
pub use withdraw::Before;
