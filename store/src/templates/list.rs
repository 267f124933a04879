//! What templates there are, for people: listed, pinned, verified, removed.

use std::fs;
use std::io;
use std::time::SystemTime;

use super::folder::{Folder, Held};
use super::key::{TemplateKey, are_digits};
use super::record::TemplateRecord;
use super::refusal::{Damage, TemplateError};
use super::template::{Look, is_pinned};
use super::working_set::WORKING_SET;
use super::{PINNED, RECORD, Templates};
use crate::printable::Printable;

/// The fewest digits that stand for a key.
const FEWEST: usize = 4;

/// A template, as it is seen without being used.
#[derive(Debug)]
pub struct Listed {
    /// Its key.
    pub key: TemplateKey,
    /// What it says about itself; or why it will be thrown away by the next who wants to use it.
    pub record: Result<TemplateRecord, Damage>,
    /// What it takes of the disk, in bytes.
    pub allocated_bytes: u64,
    /// Bytes of its working set, if it has one.
    pub working_set_bytes: Option<u64>,
    /// When it was last used, or made.
    pub used: SystemTime,
    /// Whether [`Templates::prune`] leaves it alone.
    pub pinned: bool,
}

/// What came of verifying a template.
#[derive(Debug)]
pub struct Verified {
    /// Its key.
    pub key: TemplateKey,
    /// Why it was thrown away, if it was.
    pub damage: Option<Damage>,
}

impl Templates {
    /// The key that begins with these digits, at least 4 of them.
    ///
    /// # Errors
    ///
    /// If no template in the store has such a key, or several have.
    pub fn resolve(&self, digits: &str) -> Result<TemplateKey, TemplateError> {
        let unknown = || TemplateError::Unknown(Printable::new(digits));
        if digits.len() < FEWEST || !are_digits(digits) {
            return Err(unknown());
        }
        let mut found = self.keys()?.into_iter().filter(|key| key.as_str().starts_with(digits));
        match (found.next(), found.next()) {
            (Some(key), None) => Ok(key),
            (Some(_), Some(_)) => Err(TemplateError::Ambiguous(Printable::new(digits))),
            (None, _) => Err(unknown()),
        }
    }

    /// All templates, damaged ones too, the last used first. None counts as used by that. What can't be opened is left out, with a warning in
    /// the log.
    ///
    /// # Errors
    ///
    /// If they can't be read.
    pub fn list(&self) -> Result<Vec<Listed>, TemplateError> {
        let mut all = Vec::new();
        for key in self.keys()? {
            match self.inspect(&key) {
                Ok(listed) => all.extend(listed),
                Err(error) => tracing::warn!(%key, %error, "a template is passed over"),
            }
        }
        all.sort_by(|a, b| b.used.cmp(&a.used).then_with(|| a.key.cmp(&b.key)));
        Ok(all)
    }

    /// One template, if there is one of this key. It does not count as used by that.
    ///
    /// # Errors
    ///
    /// If it can't be read.
    pub fn inspect(&self, key: &TemplateKey) -> Result<Option<Listed>, TemplateError> {
        let (folder, record) = match self.look(key)? {
            Look::Absent => return Ok(None),
            Look::Whole(template) => template.close(),
            Look::Damaged(folder, damage) => (folder, Err(damage)),
        };
        let looked_at = || TemplateError::io("looked at", self.path(key));
        let allocated_bytes = folder.allocated().map_err(looked_at())?;
        let used = last_use(&folder).map_err(looked_at())?;
        let pinned = is_pinned(&folder).map_err(looked_at())?;
        let working_set = folder.file(WORKING_SET).map_err(looked_at())?;
        let working_set = working_set.map(|file| file.metadata()).transpose().map_err(looked_at())?;
        let working_set_bytes = working_set.map(|found| found.len());
        Ok(Some(Listed { key: key.clone(), record, allocated_bytes, working_set_bytes, used, pinned }))
    }

    /// Makes a template stay: `prune` leaves it alone, and `remove` refuses it. A damaged one goes all the same.
    ///
    /// # Errors
    ///
    /// If there is none of this key, or it can't be noted.
    pub fn pin(&self, key: &TemplateKey) -> Result<(), TemplateError> {
        self.change(key, |held| match held.new_file(PINNED) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other.map(drop),
        })
    }

    /// Lets a template go again.
    ///
    /// # Errors
    ///
    /// As [`Templates::pin`].
    pub fn unpin(&self, key: &TemplateKey) -> Result<(), TemplateError> {
        self.change(key, |held| held.remove_file(PINNED))
    }

    /// Changes a template's folder while nobody can take it away.
    fn change(
        &self,
        key: &TemplateKey,
        change: impl FnOnce(&Held) -> io::Result<()>,
    ) -> Result<(), TemplateError> {
        let path = self.path(key);
        let unknown = || TemplateError::Unknown(Printable::new(key.as_str()));
        let folder = Folder::open(&path).map_err(TemplateError::io("opened", &path))?.ok_or_else(unknown)?;
        let held = folder.lock().map_err(TemplateError::io("locked", &path))?;
        if !held.folder().still_named().map_err(TemplateError::io("looked at", &path))? {
            return Err(unknown());
        }
        change(&held).map_err(TemplateError::io("written", path.join(PINNED)))
    }

    /// Removes a template. Clones of it run on, and its disk space is free when the last of them ends.
    ///
    /// # Errors
    ///
    /// If there is none of this key, it is pinned, or it can't be removed.
    pub fn remove(&self, key: &TemplateKey) -> Result<(), TemplateError> {
        let path = self.path(key);
        let unknown = || TemplateError::Unknown(Printable::new(key.as_str()));
        let folder = Folder::open(&path).map_err(TemplateError::io("opened", &path))?.ok_or_else(unknown)?;
        let mut pinned = false;
        let gone = self.take_away(&folder, |folder| {
            pinned = is_pinned(folder)?;
            Ok(!pinned)
        })?;
        match (gone, pinned) {
            (true, _) => Ok(()),
            (false, true) => Err(TemplateError::Pinned(key.clone())),
            (false, false) => Err(unknown()),
        }
    }

    /// Reads all of a template and throws it away if it is damaged. `None` if there is none of this key. It does not count as used by that.
    ///
    /// # Errors
    ///
    /// If it can't be opened, or a damaged one can't be removed.
    pub fn verify(&self, key: &TemplateKey) -> Result<Option<Verified>, TemplateError> {
        let (damage, gone) = match self.look(key)? {
            Look::Absent => return Ok(None),
            Look::Damaged(folder, damage) => {
                let gone = self.discard(&folder, &damage)?;
                (Some(damage), gone)
            }
            Look::Whole(template) => match template.verify() {
                Some(damage) => {
                    let gone = template.discard(&damage)?;
                    (Some(damage), gone)
                }
                None => (None, false),
            },
        };
        if let Some(damage) = damage.as_ref().filter(|_| !gone) {
            tracing::debug!(%key, %damage, "somebody else threw the damaged template away");
        }
        Ok(Some(Verified { key: key.clone(), damage }))
    }

    /// All keys, in order. Foreign names are passed over.
    pub(super) fn keys(&self) -> Result<Vec<TemplateKey>, TemplateError> {
        let mut keys = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(TemplateError::io("read", &self.root))? {
            let name = entry.map_err(TemplateError::io("read", &self.root))?.file_name();
            keys.extend(name.to_str().and_then(|name| name.parse().ok()));
        }
        keys.sort_unstable();
        Ok(keys)
    }
}

/// When a template was last used: the record's mtime; without a record, since when it is without.
pub(super) fn last_use(folder: &Folder) -> io::Result<SystemTime> {
    match folder.file(RECORD)? {
        Some(record) => record.metadata()?.modified(),
        None => folder.modified(),
    }
}
