//! Withdraw: what came in for one use, and turned out to be unusable, goes again.
//!
//! ```text
//!   before(name) ─▶ acquire, add_file ─▶ … the guest that unpacks it refuses it ─▶ withdraw
//!                      │                                                             └─ what was there before stays
//!                      └─ a part of it is wrong ─▶ withdraw_nameless
//! ```
//!
//! The store checks digests and sizes and unpacks nothing, so a layer that lies about what is in it is found out later, by who unpacks it.

use std::time::{Duration, SystemTime};

use crate::blobs::Stored;
use crate::digest::Digest;
use crate::images::{Image, Record};
use crate::lease::Lease;
use crate::reference::Source;
use crate::store::{Store, StoreError};

/// How far a file's time may lie behind the clock: file systems take the time of the kernel's last tick.
const TICK: Duration = Duration::from_millis(20);

/// What the store knew of a name at a moment.
#[derive(Clone, Debug)]
pub struct Before {
    manifest: Option<Digest>,
    at: SystemTime,
}

impl Store {
    /// What is known of an image's name now. Ask before acquiring it.
    ///
    /// # Errors
    ///
    /// If its record can't be read.
    pub fn before(&self, source: &Source) -> Result<Before, StoreError> {
        let record = self.records.find(&source.to_string())?;
        Ok(Before { manifest: record.map(|record| record.manifest.digest), at: SystemTime::now() - TICK })
    }

    /// Takes an image out again, and further blobs, as far as they came `before` or later, and returns what went. What another image needs
    /// stays. Waits `patience` for other commands to let go of the store.
    ///
    /// # Errors
    ///
    /// If the store stays in use, or a record can't be read. [`Store::prune`] takes what is left then.
    pub fn withdraw(
        &self,
        image: &Image,
        others: &[Digest],
        before: &Before,
        patience: Duration,
    ) -> Result<Vec<Digest>, StoreError> {
        let _lease = Lease::exclusive(self.root(), patience)?;
        if before.manifest.as_ref() != Some(&image.digest)
            && self.records.find(&image.name)?.is_some_and(|now| now.manifest.digest == image.digest)
        {
            self.records.remove(&image.name)?;
        }
        let layers = image.layers.iter().map(|layer| &layer.digest);
        let documents = [&image.digest, &image.config_digest];
        let parts: Vec<&Digest> = layers.chain(documents).chain(others).collect();
        self.remove_since(before, |digest| parts.contains(&digest))
    }

    /// Takes out every blob that came `before` or later and that no image needs: what an image that could not be acquired left behind.
    /// Waits `patience` for other commands to let go of the store.
    ///
    /// # Errors
    ///
    /// As [`Store::withdraw`].
    pub fn withdraw_nameless(&self, before: &Before, patience: Duration) -> Result<Vec<Digest>, StoreError> {
        let _lease = Lease::exclusive(self.root(), patience)?;
        self.remove_since(before, |_| true)
    }

    /// The caller has the store to itself.
    fn remove_since(
        &self,
        before: &Before,
        mut asked: impl FnMut(&Digest) -> bool,
    ) -> Result<Vec<Digest>, StoreError> {
        let stay: Vec<Record> = self.records.all()?.into_iter().collect::<Result<_, _>>()?;
        let needed = self.needed(&stay, &Default::default())?;
        let mut gone = Vec::new();
        for Stored { digest, since, .. } in self.blobs.all()? {
            if asked(&digest) && since >= before.at && !needed.contains(&digest) {
                self.blobs.remove(&digest)?;
                gone.push(digest);
            }
        }
        Ok(gone)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::testing::{Sample, acquire, blob_name, store};

    const SOON: Duration = Duration::from_millis(50);

    /// An image of these layers in a layout of this name, and what was known of it before it was acquired.
    fn acquired(store: &Store, folder: &std::path::Path, name: &str, layers: &[&[u8]]) -> (Before, Image) {
        let name = Sample::new("amd64", layers).write(&folder.join(name));
        let before = store.before(&name.parse().unwrap()).unwrap();
        (before, acquire(store, &name).unwrap())
    }

    #[test]
    fn what_came_for_nothing_goes_and_what_others_share_stays() {
        let (folder, store) = store();
        let (_, good) = acquired(&store, folder.path(), "good", &[b"shared"]);
        let (before, bad) = acquired(&store, folder.path(), "bad", &[b"shared", b"lies"]);
        let mut zip = tempfile::tempfile().unwrap();
        zip.write_all(b"zip").unwrap();
        let (zip, _) = store.add_file(&mut zip).unwrap();
        let gone = store.withdraw(&bad, std::slice::from_ref(&zip), &before, SOON).unwrap();
        assert_eq!(gone.len(), 4, "manifest, configuration, its own layer and the zip: {gone:?}");
        assert!(gone.contains(&bad.layers[1].digest) && gone.contains(&zip));
        assert_eq!(store.images().unwrap().iter().map(|image| &image.name).collect::<Vec<_>>(), [&good.name]);
        store.blob(&good.layers[0].digest).unwrap();
    }

    #[test]
    fn of_an_image_with_a_wrong_part_nothing_stays() {
        let (folder, store) = store();
        let (_, good) = acquired(&store, folder.path(), "good", &[b"shared"]);
        std::thread::sleep(TICK * 2);
        let name = Sample::new("amd64", &[b"shared", b"fine", b"wrong"]).write(&folder.path().join("bad"));
        std::fs::write(folder.path().join("bad").join(blob_name(&Digest::of(b"wrong"))), b"gnorw").unwrap();
        let before = store.before(&name.parse().unwrap()).unwrap();
        acquire(&store, &name).unwrap_err();
        store.withdraw_nameless(&before, SOON).unwrap();
        let left = store.blobs.all().unwrap().len();
        assert_eq!(left, 2 + good.layers.len(), "manifest, configuration and layer of the good one");
        store.blob(&good.layers[0].digest).unwrap();
    }

    #[test]
    fn what_was_there_before_stays() {
        let (folder, store) = store();
        let (_, image) = acquired(&store, folder.path(), "old", &[b"layer"]);
        std::thread::sleep(TICK * 2);
        let (before, again) = acquired(&store, folder.path(), "old", &[b"layer"]);
        assert_eq!(store.withdraw(&again, &[], &before, SOON).unwrap(), []);
        assert_eq!(store.images().unwrap().len(), 1);
        // Without a name it would be nobody's, and yet it did not come with this use.
        store.remove(&image.name).unwrap();
        assert_eq!(store.withdraw(&again, &[], &before, SOON).unwrap(), []);
        store.blob(&image.layers[0].digest).unwrap();
    }

    #[test]
    fn nothing_goes_while_another_command_may_be_about_to_use_it() {
        let (folder, store) = store();
        let (before, bad) = acquired(&store, folder.path(), "bad", &[b"lies"]);
        let lease = store.lease().unwrap();
        assert!(store.withdraw(&bad, &[], &before, SOON).is_err());
        assert_eq!(store.images().unwrap().len(), 1);
        drop(lease);
        store.withdraw(&bad, &[], &before, SOON).unwrap();
        assert!(store.images().unwrap().is_empty());
    }
}
