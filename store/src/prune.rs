//! Prune: mark what names and rooms need, sweep the rest.
//!
//! ```text
//!   exclusive lease ─▶ records that go ─▶ needed = blobs of the records that stay, and what the caller keeps
//!                                            └─▶ every other blob goes; so does what dead processes left on its way in
//! ```
//!
//! Records go first: a prune that is killed leaves blobs without a name, which the next one takes, and never a name without blobs.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use serde::Serialize;

use crate::blobs::Stored;
use crate::digest::Digest;
use crate::document::{Document, LARGEST_DOCUMENT};
use crate::images::{ImageError, Record};
use crate::ingest;
use crate::lease::Lease;
use crate::store::{Store, StoreError};

/// What may go.
#[derive(Clone, Debug)]
pub struct PruneOptions {
    /// Also images, not just what belongs to none.
    pub all: bool,
    /// Only what was not used for this long: images by their last use, blobs without an image by their arrival.
    pub older_than: Option<Duration>,
    /// Say what would go, and remove nothing.
    pub dry_run: bool,
    /// Manifests and blobs that rooms use. Their images stay, and so does what they consist of, named or not.
    pub keep: BTreeSet<Digest>,
    /// How long to wait for other commands to let go of the store.
    pub patience: Duration,
}

impl Default for PruneOptions {
    fn default() -> Self {
        let patience = Duration::from_secs(10);
        Self { all: false, older_than: None, dry_run: false, keep: BTreeSet::new(), patience }
    }
}

/// What went, or would go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Pruned {
    /// The images' names.
    pub images: Vec<String>,
    /// The blobs.
    pub blobs: Vec<Digest>,
    /// What that frees, in bytes, interrupted downloads included.
    pub bytes: u64,
}

impl Store {
    /// Removes what nobody needs. Waits for leases to end, up to [`PruneOptions::patience`].
    ///
    /// # Errors
    ///
    /// If the store stays in use, or a record can't be read: what a record that we don't understand needs is not known.
    pub fn prune(&self, options: &PruneOptions) -> Result<Pruned, StoreError> {
        let _lease =
            if options.dry_run { self.lease()? } else { Lease::exclusive(self.root(), options.patience)? };
        let now = SystemTime::now();
        let old = |since: SystemTime| {
            options.older_than.is_none_or(|least| now.duration_since(since).is_ok_and(|age| age >= least))
        };
        let records: Vec<Record> = self.records.all()?.into_iter().collect::<Result<_, _>>()?;
        let (go, stay): (Vec<Record>, Vec<Record>) = records.into_iter().partition(|record| {
            options.all && !options.keep.contains(&record.manifest.digest) && old(record.used)
        });
        let needed = self.needed(&stay, &options.keep)?;
        let mut pruned =
            Pruned { images: go.into_iter().map(|record| record.name).collect(), ..Pruned::default() };
        if !options.dry_run {
            for name in &pruned.images {
                self.records.remove(name)?;
            }
            self.records.sweep()?;
        }
        for Stored { digest, size, since } in self.blobs.all()? {
            if needed.contains(&digest) || !old(since) {
                continue;
            }
            if !options.dry_run {
                self.blobs.remove(&digest)?;
            }
            pruned.bytes = pruned.bytes.saturating_add(size);
            pruned.blobs.push(digest);
        }
        if !options.dry_run {
            self.sweep_made()?;
        }
        let downloads = options.older_than.is_none();
        let swept = ingest::sweep(&self.blobs, now, downloads, options.dry_run)?;
        pruned.bytes = pruned.bytes.saturating_add(swept);
        Ok(pruned)
    }

    /// All blobs that these records and these digests stand for.
    pub(crate) fn needed(
        &self,
        records: &[Record],
        keep: &BTreeSet<Digest>,
    ) -> Result<BTreeSet<Digest>, StoreError> {
        let mut needed = keep.clone();
        for record in records {
            match record.blobs(&self.blobs) {
                Ok(blobs) => needed.extend(blobs),
                // Broken already: what is left of it helps nobody until it is pulled again.
                Err(error @ (ImageError::Incomplete { .. } | ImageError::Document(_))) => {
                    tracing::warn!(%error, "a broken image keeps nothing");
                }
                Err(error) => return Err(error.into()),
            }
        }
        for digest in keep {
            needed.extend(self.parts(digest)?);
        }
        Ok(needed)
    }

    /// What a manifest that lost its name consists of; nothing if the blob is no manifest.
    fn parts(&self, digest: &Digest) -> Result<Vec<Digest>, StoreError> {
        let Some(size) = self.blobs.size(digest)?.filter(|size| *size <= LARGEST_DOCUMENT) else {
            return Ok(Vec::new());
        };
        let descriptor = crate::document::Descriptor::plain(digest.clone(), size);
        let bytes = crate::images::document(&self.blobs, &descriptor)?;
        Ok(match Document::parse(&bytes, "", digest) {
            Ok(Document::Manifest(manifest)) => {
                manifest.layers.into_iter().chain([manifest.config]).map(|part| part.digest).collect()
            }
            Ok(Document::Index(_)) | Err(_) => Vec::new(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::testing::{Sample, acquire, sentence, store};

    fn run(store: &Store, change: impl FnOnce(&mut PruneOptions)) -> Pruned {
        let mut options = PruneOptions::default();
        change(&mut options);
        store.prune(&options).unwrap()
    }

    /// Two images that share a layer, named in this order.
    fn two(store: &Store, folder: &std::path::Path) -> [crate::Image; 2] {
        [("one", b"1"), ("two", b"2")].map(|(name, own)| {
            let name = Sample::new("amd64", &[b"shared", own]).write(&folder.join(name));
            acquire(store, &name).unwrap()
        })
    }

    #[test]
    fn blobs_go_with_their_last_image_and_shared_ones_stay() {
        let (folder, store) = store();
        let [one, two] = two(&store, folder.path());
        assert_eq!(run(&store, |_| ()), Pruned::default(), "all are needed");
        store.remove(&one.name).unwrap();
        let pruned = run(&store, |_| ());
        assert!(pruned.images.is_empty());
        assert_eq!(pruned.blobs.len(), 3, "manifest, configuration and its own layer: {pruned:?}");
        assert!(pruned.blobs.contains(&one.layers[1].digest));
        assert_eq!(store.images().unwrap().len(), 1);
        store.blob(&two.layers[0].digest).unwrap();
    }

    #[test]
    fn all_takes_images_too_and_a_dry_run_takes_nothing() {
        let (folder, store) = store();
        let [one, two] = two(&store, folder.path());
        let would = run(&store, |options| (options.all, options.dry_run) = (true, true));
        assert_eq!(store.images().unwrap().len(), 2);
        let did = run(&store, |options| options.all = true);
        assert_eq!(did, would);
        assert_eq!(did.images, [one.name, two.name]);
        assert_eq!(did.blobs.len(), 7);
        assert!(store.images().unwrap().is_empty() && store.blobs.all().unwrap().is_empty());
    }

    #[test]
    fn what_rooms_use_stays_even_without_a_name() {
        let (folder, store) = store();
        let [one, two] = two(&store, folder.path());
        store.remove(&one.name).unwrap();
        let keep = BTreeSet::from([one.digest.clone()]);
        let pruned = run(&store, |options| (options.all, options.keep) = (true, keep));
        assert_eq!(pruned.images, [two.name]);
        assert_eq!(pruned.blobs.len(), 3, "{pruned:?}");
        for layer in &one.layers {
            store.blob(&layer.digest).unwrap();
        }
    }

    #[test]
    fn age_counts_from_the_last_use() {
        let (folder, store) = store();
        let [one, two] = two(&store, folder.path());
        let hour = Duration::from_secs(3600);
        store.records.touch(&one.name, SystemTime::now() - 2 * hour);
        let pruned = run(&store, |options| (options.all, options.older_than) = (true, Some(hour)));
        assert_eq!(pruned.images, [one.name]);
        assert_eq!(store.images().unwrap()[0].name, two.name);
    }

    #[test]
    fn nothing_is_collected_under_a_lease_and_the_sentence_says_why() {
        let (_folder, store) = store();
        let lease = store.lease().unwrap();
        let options = PruneOptions { patience: Duration::from_millis(50), ..PruneOptions::default() };
        assert!(sentence(store.prune(&options)).contains("in use"));
        drop(lease);
        store.prune(&options).unwrap();
    }

    #[test]
    fn a_record_that_is_not_understood_stops_the_collector_but_not_the_list() {
        let (folder, store) = store();
        two(&store, folder.path());
        fs::write(store.root().join("images/future.json"), r#"{"version":9}"#).unwrap();
        assert_eq!(store.images().unwrap().len(), 2);
        assert!(sentence(store.prune(&PruneOptions::default())).contains("future.json"));
    }

    #[test]
    fn interrupted_downloads_and_half_written_records_go() {
        let (_folder, store) = store();
        fs::write(store.root().join("ingest/sha256-1.part"), b"half").unwrap();
        fs::write(store.root().join("images/x.new-1-0"), b"{").unwrap();
        assert_eq!(run(&store, |_| ()).bytes, 4);
        assert_eq!(fs::read_dir(store.root().join("ingest")).unwrap().count(), 0);
        assert_eq!(fs::read_dir(store.root().join("images")).unwrap().count(), 0);
    }
}
