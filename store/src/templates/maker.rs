//! Making a template: files that nobody sees, and one moment in which all see them.
//!
//! ```text
//!   Make(Maker) ── state(), memory(n), disk(n): written by the VMM ──▶ publish ──▶ Template
//!        └──────────────── dropped, or its process killed ──▶ nothing, now or after the next sweep
//! ```
//!
//! While it lives, all others who want this template wait for it.

use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::SystemTime;

use composefs_ioctls::fsverity::{EnableVerityError, fs_ioc_enable_verity};
use serde_json::Value;

use super::folder::{Folder, Held};
use super::key::TemplateKey;
use super::record::{LARGEST_DESCRIPTION, Part, Point, Published, TemplateRecord};
use super::refusal::{TemplateError, is_full};
use super::sparse::SparseDigest;
use super::template::{Look, Template};
use super::{RECORD, Templates};

/// `FS_VERITY_HASH_ALG_SHA256`, and the block size that every file system with fs-verity has (Linux, filesystems/fsverity.rst).
const VERITY_SHA256: u8 = 1;
const VERITY_BLOCK: u32 = 4096;

/// The right to make one template, and the place for it.
#[derive(Debug)]
pub struct Maker {
    templates: Templates,
    key: TemplateKey,
    held: Held,
    /// What memory and disk were made with, in bytes.
    lengths: [Option<u64>; 2],
    published: bool,
}

impl Maker {
    pub(super) fn new(templates: Templates, key: TemplateKey, held: Held) -> Result<Self, TemplateError> {
        let maker = Self { templates, key, held, lengths: [None; 2], published: false };
        maker.held.clear().map_err(TemplateError::io("emptied", maker.held.folder().path()))?;
        Ok(maker)
    }

    /// Whose place this is.
    #[must_use]
    pub fn key(&self) -> &TemplateKey {
        &self.key
    }

    /// An empty file for the VMM's state, to read and write.
    ///
    /// # Errors
    ///
    /// If it can't be created. Asked for a second time, it begins anew; what was handed out before leads nowhere.
    pub fn state(&mut self) -> Result<File, TemplateError> {
        self.create(Part::State, 0)
    }

    /// A file of so many bytes for the guest's memory, to read and write: one hole, which takes nothing of the disk until it is written.
    ///
    /// # Errors
    ///
    /// As [`Maker::state`], and if the file system has no files of that length.
    pub fn memory(&mut self, bytes: u64) -> Result<File, TemplateError> {
        self.lengths[0] = Some(bytes);
        self.create(Part::Memory, bytes)
    }

    /// The same for the disk that clones will share.
    ///
    /// # Errors
    ///
    /// As [`Maker::memory`].
    pub fn disk(&mut self, bytes: u64) -> Result<File, TemplateError> {
        self.lengths[1] = Some(bytes);
        self.create(Part::Disk, bytes)
    }

    fn create(&self, part: Part, bytes: u64) -> Result<File, TemplateError> {
        let failed = || self.failed("created", part.name());
        self.held.remove_file(part.name()).map_err(failed())?;
        let file = self.held.new_file(part.name()).map_err(failed())?;
        file.set_len(bytes).map_err(failed())?;
        Ok(file)
    }

    /// Publishes the template: all of it, on the disk, immutable, for everybody at once. Whoever wrote its files must be done: every
    /// descriptor and mapping that could still write to them closed, the VMM's too. (Where there is fs-verity it is an error if one
    /// isn't; elsewhere nobody notices.)
    ///
    /// # Errors
    ///
    /// If a file is missing or has another length than it was made with, is still open for writing, or the disk is full. Nothing is left then.
    pub fn publish(mut self, point: Point, description: Value) -> Result<Template, TemplateError> {
        let text = serde_json::to_vec(&description).map_err(|_| TemplateError::Description)?;
        if text.len() > LARGEST_DESCRIPTION {
            return Err(TemplateError::Description);
        }
        let parts = [self.seal(Part::State)?, self.seal(Part::Memory)?, self.seal(Part::Disk)?];
        let record = TemplateRecord::new(self.key.clone(), point, SystemTime::now(), parts, description);
        let text = record.seal().map_err(|_| TemplateError::Description)?;
        // What could not be read back would be damage, and made again for ever.
        TemplateRecord::parse(&text, &self.key).map_err(|_| TemplateError::Description)?;
        self.write_record(&text, record.created()).map_err(self.failed("written", RECORD))?;
        self.held.folder().sync().map_err(self.failed("synchronised", RECORD))?;
        self.show()?;
        let template = match self.templates.look(&self.key)? {
            Look::Whole(template) => template,
            // Under our lock nobody has taken it away; so somebody who heeds no lock has.
            Look::Absent | Look::Damaged(..) => {
                return Err(self.failed("opened", RECORD)(io::ErrorKind::NotFound.into()));
            }
        };
        // It stays, whatever it takes.
        template.hold();
        let templates = self.templates.clone();
        // Its lock, which whoever prunes asks for.
        drop(self);
        templates.keep_bounds();
        Ok(*template)
    }

    /// Makes one file what it will be for ever.
    fn seal(&self, part: Part) -> Result<Published, TemplateError> {
        let opened = self.held.folder().file(part.name()).map_err(self.failed("opened", part.name()))?;
        let file = opened.ok_or(TemplateError::Unmade(part))?;
        let looked_at = || self.failed("looked at", part.name());
        let actual = file.metadata().map_err(looked_at())?.len();
        let expected = match part {
            Part::State if actual == 0 => return Err(TemplateError::Unmade(part)),
            Part::State => actual,
            Part::Memory => self.lengths[0].unwrap_or(0),
            Part::Disk => self.lengths[1].unwrap_or(0),
        };
        if actual != expected {
            return Err(TemplateError::Resized { part, expected, actual });
        }
        file.set_permissions(Permissions::from_mode(0o444)).map_err(self.failed("protected", part.name()))?;
        file.sync_all().map_err(self.failed("synchronised", part.name()))?;
        // Before it is hashed: from here on the file system itself holds off writers.
        let verity = self.verity(&file, part)?;
        let digest = SparseDigest::of(&file, actual).map_err(self.failed("read", part.name()))?;
        let allocated_bytes = file.metadata().map_err(looked_at())?.blocks().saturating_mul(512);
        Ok(Published { bytes: actual, allocated_bytes, digest, verity })
    }

    /// Has the file system check what is read from now on, if it can.
    fn verity(&self, file: &File, part: Part) -> Result<bool, TemplateError> {
        match fs_ioc_enable_verity(file, VERITY_SHA256, VERITY_BLOCK) {
            Ok(()) | Err(EnableVerityError::AlreadyEnabled) => Ok(true),
            Err(EnableVerityError::FilesystemNotSupported) => Ok(false),
            Err(EnableVerityError::FileOpenedForWrite) => Err(TemplateError::StillWritten(part)),
            Err(EnableVerityError::Io(error)) if is_full(&error) => {
                Err(self.failed("protected", part.name())(error))
            }
            Err(error @ (EnableVerityError::Io(_) | EnableVerityError::SignatureVerificationFailed)) => {
                tracing::debug!(key = %self.key, %part, %error, "fs-verity is done without");
                Ok(false)
            }
        }
    }

    /// Writes it, last used when it was made.
    fn write_record(&self, text: &[u8], now: SystemTime) -> io::Result<()> {
        self.held.remove_file(RECORD)?;
        let mut file = self.held.new_file(RECORD)?;
        file.write_all(text)?;
        file.set_modified(now)?;
        file.set_permissions(Permissions::from_mode(0o444))?;
        file.sync_all()
    }

    /// Gives the folder its name. rename(2) replaces no folder that has files in it, and a published one always has.
    fn show(&mut self) -> Result<(), TemplateError> {
        let (from, to) = (self.templates.making(), self.templates.path(&self.key));
        self.held.rename(to.clone()).map_err(TemplateError::io("published", &to))?;
        self.published = true;
        for parent in [&self.templates.root, &from] {
            let synced =
                Folder::open(parent).and_then(|folder| folder.map_or(Ok(()), |folder| folder.sync()));
            if let Err(error) = synced {
                // Not sure to survive a power cut, so it is taken back.
                self.published = false;
                self.templates.hide(&mut self.held).map_err(TemplateError::io("removed", &to))?;
                return Err(TemplateError::io("synchronised", parent)(error));
            }
        }
        Ok(())
    }

    fn failed(&self, doing: &'static str, name: &str) -> impl FnOnce(io::Error) -> TemplateError + use<> {
        TemplateError::io(doing, self.held.folder().path().join(name))
    }
}

impl Drop for Maker {
    fn drop(&mut self) {
        if !self.published
            && let Err(error) = self.held.folder().remove()
        {
            tracing::warn!(key = %self.key, %error, "an unfinished template is left for the next sweep");
        }
    }
}
