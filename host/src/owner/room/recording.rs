//! A clone's working set: when its VMM is asked for it.
//!
//! ```text
//!  workload started ─┬─ it exited, or an event was answered ─┬─▶ RecordWorkingSet + file ─▶ Done: whoever made the room keeps the file
//!                    └─ or one second went by ───────────────┘
//! ```
//!
//! Of a clone alone that was handed a file for it, since its template has none; and once: what was touched until the first result is what others will touch.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use carrel_protocol::chain;
use carrel_protocol::vmm::{Descriptor, FromOwner, RecordWorkingSet};

use super::Room;

/// A workload that has come to no result by then has begun at least.
const UNTIL_RECORDED: Duration = Duration::from_secs(1);

impl Room {
    /// The workload runs.
    pub(super) fn await_working_set(&mut self) {
        self.deadlines.record = self.working_set.as_ref().map(|_| Instant::now() + UNTIL_RECORDED);
    }

    /// It has come to a result, or has had the time for it.
    pub(super) fn record_working_set(&mut self) {
        self.deadlines.record = None;
        let Some(file) = self.working_set.take() else { return };
        self.recording = true;
        let request = RecordWorkingSet { file: Descriptor(0) };
        if let Err(error) = self.vmm.send(&FromOwner::from(request), &[file.as_fd()]) {
            tracing::debug!(error = %chain(&error), "no working set is recorded");
        }
    }
}
