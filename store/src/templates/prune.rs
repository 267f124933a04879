//! Prune: templates go by their last use, and nobody has to stop for it.
//!
//! ```text
//!   damaged ──────────────────────────────────────▶ goes
//!   pinned ───────────────────────────────────────▶ stays
//!   unused for `older_than`, or any if `all` ─────▶ goes
//!   the rest: longest unused first, while all that stays takes more than `most_bytes` ──▶ goes
//! ```
//!
//! Whoever publishes a template prunes the others by [`TemplateBounds`], so that nobody has to think of it. Then those that somebody uses stay, too.

use std::time::{Duration, SystemTime};

use serde::Serialize;

use super::Templates;
use super::folder::Folder;
use super::key::TemplateKey;
use super::list::{Listed, last_use};
use super::refusal::TemplateError;
use super::template::{is_pinned, is_used};

/// Which templates may go. By default only damaged ones, and what dead makers left.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TemplatePolicy {
    /// Every one that is not pinned; with `older_than`, only if it is that old, too.
    pub all: bool,
    /// Those that were not used for this long.
    pub older_than: Option<Duration>,
    /// The longest unused, until all together take no more of the disk than this, in bytes. Pinned ones count, and stay.
    pub most_bytes: Option<u64>,
    /// Leave those alone that somebody has open, clones included. Others can go any time: their clones run on, but take the disk until they end.
    pub spare_used: bool,
    /// Say what would go, and remove nothing.
    pub dry_run: bool,
}

/// What templates may take without anybody's asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TemplateBounds {
    /// Of the disk, all together, in bytes.
    pub most_bytes: u64,
    /// For how long one stays that nobody uses.
    pub unused_for: Duration,
}

impl Default for TemplateBounds {
    /// 10 GiB and 30 days.
    fn default() -> Self {
        Self { most_bytes: 10 << 30, unused_for: Duration::from_secs(30 * 24 * 3600) }
    }
}

/// A template that went, or would go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PrunedTemplate {
    /// Its key.
    pub key: TemplateKey,
    /// What it took of the disk, in bytes. It is free when the last clone has ended.
    pub bytes: u64,
    /// Whether it went because it was damaged.
    pub damaged: bool,
}

/// What went, or would go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PrunedTemplates {
    /// The templates, the longest unused first.
    pub templates: Vec<PrunedTemplate>,
    /// What that frees, in bytes of disk, what dead makers left included.
    pub bytes: u64,
}

impl Templates {
    /// Removes templates by a policy. A template that is used or pinned while this goes on stays.
    ///
    /// # Errors
    ///
    /// If the templates can't be read, or one can't be removed.
    pub fn prune(&self, policy: &TemplatePolicy) -> Result<PrunedTemplates, TemplateError> {
        let mut pruned = PrunedTemplates { bytes: self.sweep(policy.dry_run)?, ..PrunedTemplates::default() };
        let mut listed = self.list()?;
        listed.reverse();
        if policy.spare_used {
            for template in &mut listed {
                template.pinned |= self.is_used(&template.key);
            }
        }
        for gone in chosen(listed, policy, SystemTime::now()) {
            if policy.dry_run || self.take_unused(&gone)? {
                pruned.bytes = pruned.bytes.saturating_add(gone.allocated_bytes);
                let damaged = gone.record.is_err();
                pruned.templates.push(PrunedTemplate { key: gone.key, bytes: gone.allocated_bytes, damaged });
            }
        }
        Ok(pruned)
    }

    /// Prunes by the bounds. It is nobody's request, so a failure is nobody's either.
    pub(super) fn keep_bounds(&self) {
        let TemplateBounds { most_bytes, unused_for } = self.bounds;
        let policy = TemplatePolicy {
            older_than: Some(unused_for),
            most_bytes: Some(most_bytes),
            spare_used: true,
            ..TemplatePolicy::default()
        };
        match self.prune(&policy) {
            Ok(pruned) if pruned.templates.is_empty() => {}
            Ok(pruned) => {
                tracing::info!(
                    templates = pruned.templates.len(),
                    bytes = pruned.bytes,
                    "templates were pruned"
                );
            }
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(error, "templates were not pruned");
            }
        }
    }

    /// Whether somebody has it open. Whoever can't tell says yes.
    fn is_used(&self, key: &TemplateKey) -> bool {
        match Folder::open(&self.path(key)) {
            Ok(Some(folder)) => is_used(&folder).unwrap_or(true),
            Ok(None) => false,
            Err(_) => true,
        }
    }

    /// Removes a template if it still is as it was listed: not used since, not pinned, and damaged if it was.
    pub(super) fn take_unused(&self, listed: &Listed) -> Result<bool, TemplateError> {
        let path = self.path(&listed.key);
        let Some(folder) = Folder::open(&path).map_err(TemplateError::io("opened", &path))? else {
            return Ok(false);
        };
        let is_damaged = listed.record.is_err();
        self.take_away(&folder, |folder| {
            Ok(last_use(folder)? == listed.used && (is_damaged || !is_pinned(folder)?))
        })
    }
}

/// Which of these go, the longest unused first; `listed` is in that order.
fn chosen(listed: Vec<Listed>, policy: &TemplatePolicy, now: SystemTime) -> Vec<Listed> {
    let old = |used: SystemTime| {
        policy.older_than.is_none_or(|least| now.duration_since(used).is_ok_and(|age| age >= least))
    };
    let by_age = policy.all || policy.older_than.is_some();
    let (mut go, stay): (Vec<Listed>, Vec<Listed>) = listed
        .into_iter()
        .partition(|template| template.record.is_err() || (by_age && !template.pinned && old(template.used)));
    let mut taken = stay.iter().fold(0_u64, |sum, template| sum.saturating_add(template.allocated_bytes));
    for template in stay {
        if policy.most_bytes.is_none_or(|most| taken <= most) {
            break;
        }
        if !template.pinned {
            taken = taken.saturating_sub(template.allocated_bytes);
            go.push(template);
        }
    }
    go.sort_by_key(|template| template.used);
    go
}
