//! Origins: where the documents and blobs of an image come from, once its name is resolved.

use std::sync::atomic::AtomicBool;

use crate::blobs::Blobs;
use crate::document::Descriptor;
use crate::layout::Layout;
use crate::progress::Transfer;
use crate::store::StoreError;

/// A layout, an archive or a registry.
pub(crate) trait Origin: Sync {
    /// A small document, verified against its descriptor.
    fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>, StoreError>;

    /// Brings a blob into the store, verified against its descriptor. Gives up soon after `cancelled` becomes true.
    fn fetch(
        &self,
        blobs: &Blobs,
        descriptor: &Descriptor,
        transfer: &dyn Transfer,
        cancelled: &AtomicBool,
    ) -> Result<(), StoreError>;

    /// How many blobs it pays to fetch at once.
    fn parallel(&self) -> usize;
}

impl Origin for Layout {
    fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>, StoreError> {
        Ok(self.blob(&descriptor.digest)?.verified_document(descriptor)?)
    }

    fn fetch(
        &self,
        blobs: &Blobs,
        descriptor: &Descriptor,
        transfer: &dyn Transfer,
        cancelled: &AtomicBool,
    ) -> Result<(), StoreError> {
        Ok(self.blob(&descriptor.digest)?.ingest(blobs, descriptor, transfer, cancelled)?)
    }

    /// Hashing is what takes the time; the second thread hides reading and the fsync.
    fn parallel(&self) -> usize {
        2
    }
}
