//! A template's working set: which pages of its memory the first clone touched, added after the template was published, once, or never.
//!
//! In: bytes that a VMM wrote. Out: a file that VMMs read. What they mean is the VMM's business, which believes none of them unchecked; a template is whole
//! without them, and goes with them.

use std::fs::{File, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;

use super::refusal::TemplateError;
use super::template::Template;

/// What its file is called.
pub(super) const WORKING_SET: &str = "working-set";
/// While it is written; what a killed writer left is written over.
const UNFINISHED: &str = "working-set.unfinished";
/// No working set is longer, in bytes.
pub const LARGEST_WORKING_SET: usize = 192 << 10;

impl Template {
    /// Its working set, read-only, if it has one. What else may lie in its place is none.
    #[must_use]
    pub fn working_set(&self) -> Option<File> {
        let file = self.folder().file(WORKING_SET).ok()??;
        let found = file.metadata().ok()?;
        let largest = u64::try_from(LARGEST_WORKING_SET).unwrap_or(u64::MAX);
        (found.is_file() && found.len() <= largest).then_some(file)
    }

    /// Adds a working set, if the template has none and is still there. Says whether it was this call that did; of many that try, one does.
    ///
    /// # Errors
    ///
    /// If it is longer than [`LARGEST_WORKING_SET`], or can't be written.
    pub fn add_working_set(&self, bytes: &[u8]) -> Result<bool, TemplateError> {
        let failed = || TemplateError::io("written", self.folder().path().join(WORKING_SET));
        if bytes.len() > LARGEST_WORKING_SET {
            return Err(failed()(std::io::ErrorKind::FileTooLarge.into()));
        }
        // While this is held nobody takes the template away, or adds another.
        let held = self.folder().lock().map_err(failed())?;
        let folder = held.folder();
        if !folder.still_named().map_err(failed())? || folder.file(WORKING_SET).map_err(failed())?.is_some() {
            return Ok(false);
        }
        held.remove_file(UNFINISHED).map_err(failed())?;
        let mut file = held.new_file(UNFINISHED).map_err(failed())?;
        let written = file
            .write_all(bytes)
            .and_then(|()| file.set_permissions(Permissions::from_mode(0o444)))
            .and_then(|()| file.sync_all())
            .and_then(|()| held.rename_file(UNFINISHED, WORKING_SET))
            .and_then(|()| folder.sync());
        if written.is_err() {
            // A full disk, mostly: what is there of it is only in the way.
            let _ = held.remove_file(UNFINISHED);
        }
        written.map_err(failed()).map(|()| true)
    }
}
