//! Templates: frozen rooms, kept for their clones.
//!
//! ```text
//!   ROOT/templates/
//!   ├── <64 digits of its key>/    state, memory, disk, template.json (0444, never written again), `working-set` once a clone
//!   │                              has left one, and `pinned` if it is
//!   ├── making/<key>/              being made; its maker holds the folder's flock
//!   └── going/<key>-<inode>/       taken away, and not yet unlinked
//!
//!              acquire                       publish: fsync, digests, 0444, fs-verity, record, rename
//!   absent ──────────────▶ making/<key> ───────────────────────────────────────────────────────▶ <key>
//!     ▲                        │ maker dropped, or dead and swept                                  │ remove, prune,
//!     ├────────────────────────┘                                                                   │ discard: rename
//!     └───────────────────────────────────────── going/<key>-<inode> ◀─────────────────────────────┘
//! ```
//!
//! In: keys, and what a maker writes. Out: a [`Template`]: three open files, of which a clone is started.
//!
//! A template appears by one rename and goes by one rename, so a name has all of it or nothing. Its files are unlinked, never truncated or
//! rewritten, and whoever uses it holds them open: clones run on. The lock that makes one maker of a hundred is the folder in `making` itself
//! (flock(2)): it belongs to the kernel, which gives it back when the maker dies, and there is no lock file to be left over.

mod canonical;
mod folder;
mod key;
mod list;
mod maker;
mod prune;
mod record;
mod refusal;
mod sparse;
mod template;
#[cfg(test)]
mod tests;
mod working_set;

use std::fs::{self, DirBuilder};
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

pub use canonical::CanonicalError;
pub use key::{KeyError, TemplateKey};
pub use list::{Listed, Verified};
pub use maker::Maker;
pub use prune::{PrunedTemplate, PrunedTemplates, TemplateBounds, TemplatePolicy};
pub use record::{LARGEST_DESCRIPTION, Part, Point, Published, RecordError, TemplateRecord};
pub use refusal::{Damage, TemplateError};
pub use sparse::{SparseDigest, SparseDigestError};
pub use template::Template;
pub use working_set::LARGEST_WORKING_SET;

use folder::{Folder, Held};
use template::Look;

/// What a record is called.
const RECORD: &str = "template.json";
/// What makes a template stay.
const PINNED: &str = "pinned";
/// Between two looks at whether somebody else has finished: flock(2) has no waiting with an end, and can't be called off.
const SHORTEST: Duration = Duration::from_millis(2);
const LONGEST: Duration = Duration::from_millis(50);

/// The templates of a store. Cheap to clone; any number of processes may use them at once.
#[derive(Clone, Debug)]
pub struct Templates {
    root: PathBuf,
    bounds: TemplateBounds,
}

/// What came of acquiring a template.
#[derive(Debug)]
pub enum Acquired {
    /// It is there.
    Ready(Box<Template>),
    /// It is not, and this caller alone is to make it: all others wait for what becomes of it.
    Make(Maker),
    /// Somebody makes it, and the caller did not want to wait, or no longer.
    Busy,
}

/// For [`Templates::acquire`]: as long as it takes.
pub fn as_long_as_it_takes(_waited: Duration) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// For [`Templates::acquire`]: not at all.
pub fn not_at_all(_waited: Duration) -> ControlFlow<()> {
    ControlFlow::Break(())
}

impl Templates {
    /// Opens the templates of the store at `root`, and creates their folders (mode 0700) if there are none.
    ///
    /// # Errors
    ///
    /// If the folders can't be created.
    pub fn open(root: &Path) -> Result<Self, TemplateError> {
        let templates = Self { root: root.join("templates"), bounds: TemplateBounds::default() };
        for folder in [templates.making(), templates.going()] {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&folder)
                .map_err(TemplateError::io("created", &folder))?;
        }
        Ok(templates)
    }

    /// The same templates, kept within other bounds.
    #[must_use]
    pub fn bounded(self, bounds: TemplateBounds) -> Self {
        Self { bounds, ..self }
    }

    /// The template of this key, if there is a whole one; that is its use, for [`Templates::prune`]. What is seen at a glance is checked: record,
    /// files, their lengths. A damaged template is thrown away here, with a warning in the log, and counts as none.
    ///
    /// # Errors
    ///
    /// If it can't be opened for a reason that is not its own.
    pub fn find(&self, key: &TemplateKey) -> Result<Option<Template>, TemplateError> {
        match self.look(key)? {
            Look::Absent => Ok(None),
            Look::Whole(template) => {
                template.touch();
                template.hold();
                Ok(Some(*template))
            }
            Look::Damaged(folder, damage) => {
                self.discard(&folder, &damage)?;
                Ok(None)
            }
        }
    }

    /// Finds a template, or makes this caller its maker, or waits for whoever is: a thread or a process, it makes no difference. A maker that
    /// fails or dies hands its place to one of those who wait, and not its failure.
    ///
    /// Before each pause `wait` is asked, with the time waited so far, whether to go on; it can give up at once, after a time, or when it is
    /// told to, and say to somebody that it waits. It is asked every 2 to 50 ms. [`as_long_as_it_takes`] and [`not_at_all`] are the ends of
    /// what it can say.
    ///
    /// # Errors
    ///
    /// If the template, or a place to make it in, can't be opened.
    pub fn acquire(
        &self,
        key: &TemplateKey,
        mut wait: impl FnMut(Duration) -> ControlFlow<()>,
    ) -> Result<Acquired, TemplateError> {
        let begun = Instant::now();
        loop {
            if let Some(template) = self.find(key)? {
                return Ok(Acquired::Ready(Box::new(template)));
            }
            if let Some(acquired) = self.claim(key)? {
                return Ok(acquired);
            }
            let waited = begun.elapsed();
            if wait(waited).is_break() {
                return Ok(Acquired::Busy);
            }
            // An eighth of what was waited already, so that a wait is at most that much too long.
            thread::sleep((waited / 8).clamp(SHORTEST, LONGEST));
        }
    }

    /// Makes the caller the maker, if nobody else is.
    fn claim(&self, key: &TemplateKey) -> Result<Option<Acquired>, TemplateError> {
        let path = self.making().join(key.as_str());
        loop {
            let folder = Folder::create(&path).map_err(TemplateError::io("created", &path))?;
            let Some(held) = folder.try_lock().map_err(TemplateError::io("locked", &path))? else {
                return Ok(None);
            };
            if !held.folder().still_named().map_err(TemplateError::io("looked at", &path))? {
                // Its maker published or removed it before we had its lock.
                continue;
            }
            let maker = Maker::new(self.clone(), key.clone(), held)?;
            // Somebody may have published it between our look and our lock; the maker takes its folder away again then.
            return Ok(Some(match self.find(key)? {
                Some(template) => Acquired::Ready(Box::new(template)),
                None => Acquired::Make(maker),
            }));
        }
    }

    /// Removes what dead makers and dead removers left; how much that is, in bytes of disk. [`Store::open`](crate::Store::open) does so too.
    /// With `dry_run` nothing is removed.
    ///
    /// # Errors
    ///
    /// If the folders can't be read. What can't be removed is left for the next, with a warning in the log.
    pub fn sweep(&self, dry_run: bool) -> Result<u64, TemplateError> {
        let mut freed = 0_u64;
        for (parent, is_dead) in [(self.making(), false), (self.going(), true)] {
            for entry in fs::read_dir(&parent).map_err(TemplateError::io("read", &parent))? {
                let path = entry.map_err(TemplateError::io("read", &parent))?.path();
                match sweep(&path, is_dead, dry_run) {
                    Ok(bytes) => freed = freed.saturating_add(bytes),
                    Err(error) => tracing::warn!(path = %path.display(), %error, "a leftover was not swept"),
                }
            }
        }
        Ok(freed)
    }

    /// Throws a damaged template away, if its name still stands for it. Says whether it was this call that did.
    fn discard(&self, folder: &Folder, reason: &Damage) -> Result<bool, TemplateError> {
        let gone = self.take_away(folder, |_| Ok(true))?;
        if gone {
            tracing::warn!(path = %folder.path().display(), %reason, "a damaged template was thrown away");
        }
        Ok(gone)
    }

    /// Takes a template's name away and unlinks its files, if the name still stands for it and, now that nobody else can change that, it
    /// still `may` go. Says whether it went.
    fn take_away(
        &self,
        folder: &Folder,
        may: impl FnOnce(&Folder) -> io::Result<bool>,
    ) -> Result<bool, TemplateError> {
        let failed = || TemplateError::io("removed", folder.path());
        let mut held = folder.lock().map_err(failed())?;
        if !held.folder().still_named().map_err(failed())? || !may(held.folder()).map_err(failed())? {
            return Ok(false);
        }
        self.hide(&mut held).map_err(failed())?;
        if let Err(error) = held.folder().remove() {
            // It is gone as a template. The disk that it takes is the next sweep's to free.
            tracing::warn!(path = %held.folder().path().display(), %error, "a removed template is not swept yet");
        }
        Ok(true)
    }

    /// Takes the name away. Inodes are unique among folders that exist, so no two meet in `going`.
    fn hide(&self, held: &mut Held) -> io::Result<()> {
        let name = held.folder().path().file_name().unwrap_or_default().to_string_lossy().into_owned();
        let hidden = self.going().join(format!("{name}-{}", held.folder().inode()?));
        held.rename(hidden)
    }

    fn path(&self, key: &TemplateKey) -> PathBuf {
        self.root.join(key.as_str())
    }

    fn making(&self) -> PathBuf {
        self.root.join("making")
    }

    fn going(&self) -> PathBuf {
        self.root.join("going")
    }
}

/// Removes one folder, unless its maker lives.
fn sweep(path: &Path, is_dead: bool, dry_run: bool) -> io::Result<u64> {
    let Some(folder) = Folder::open(path)? else { return Ok(0) };
    let held = if is_dead { None } else { folder.try_lock()? };
    if !is_dead && !held.as_ref().is_some_and(|held| held.folder().still_named().unwrap_or(false)) {
        return Ok(0);
    }
    let bytes = folder.allocated()?;
    if !dry_run {
        folder.remove()?;
    }
    Ok(bytes)
}
