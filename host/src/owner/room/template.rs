//! How a room becomes a template: its payload in place, it is frozen, paused, saved, and ended.
//!
//! ```text
//!   Preparing ─Prepared─▶ Freezing ─Frozen─▶ Saving: Pause ─Done─▶ Snapshot ─Snapshotted─▶ Ending (Saved)
//! ```

use std::os::fd::AsFd;

use carrel_protocol::agent::Freeze;
use carrel_protocol::chain;
use carrel_protocol::vmm::{Descriptor, FromOwner, Pause, Snapshot, SnapshotKind, Snapshotted};

use super::Room;
use crate::launch::{self, Saved};
use crate::outcome::{Outcome, Step, clean};
use crate::record::Phase;
use crate::timestamp::mark;

impl Room {
    /// Nothing runs in the guest but its agent, and that is to come to rest.
    pub(super) fn freeze(&mut self) {
        let time = self.own.patience.freeze();
        self.enter(Phase::Freezing, Some((Step::Freeze, time)));
        self.tell_agent(Freeze {});
    }

    /// The agent rests.
    pub(super) fn frozen(&mut self) {
        self.note(mark("frozen"));
        let time = self.own.patience.save(self.own.spec.machine.memory_mib.bytes());
        self.enter(Phase::Saving, Some((Step::Save, time)));
        self.tell_vmm(&Pause {}.into(), None);
    }

    /// The VMM stands still.
    pub(super) fn paused(&mut self) {
        if self.record.phase != Phase::Saving {
            return;
        }
        // Closed once they are sent: the VMM alone has them then, and nobody once that is gone.
        let Some(saved) = self.saved.take() else { return };
        let request = Snapshot {
            kvm: Descriptor(0),
            state: Descriptor(1),
            memory: Descriptor(2),
            kind: SnapshotKind::Full,
        };
        self.tell_vmm(&request.into(), Some(&saved));
    }

    pub(super) fn saved(&mut self, snapshotted: &Snapshotted) {
        if self.record.phase != Phase::Saving {
            return;
        }
        self.note(mark("saved"));
        let Snapshotted { state_bytes, memory_bytes, .. } = *snapshotted;
        self.give_up(Outcome::Saved { state_bytes, memory_bytes });
    }

    /// The VMM refuses what it was asked. Nothing but a saving asks it for anything that it may refuse.
    pub(super) fn not_saved(&mut self, reason: &str) {
        if self.record.phase == Phase::Saving {
            self.give_up(Outcome::OwnerFailed {
                message: format!("the guest was not saved: {}", clean(reason)),
            });
        }
    }

    fn tell_vmm(&mut self, request: &FromOwner, files: Option<&Saved>) {
        let sent = match files {
            None => self.vmm.send(request, &[]).map_err(|e| chain(&e)),
            Some(Saved { state, memory }) => launch::open_kvm().map_err(|e| chain(&e)).and_then(|kvm| {
                let files = [kvm.as_fd(), state.as_fd(), memory.as_fd()];
                self.vmm.send(request, &files).map_err(|e| chain(&e))
            }),
        };
        if let Err(message) = sent {
            self.give_up(Outcome::OwnerFailed { message });
        }
    }
}
