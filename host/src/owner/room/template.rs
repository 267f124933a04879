//! How a room becomes a template: its payload in place, and its workload ready if it is to be initialised, it is frozen, paused, saved, and ended.
//!
//! ```text
//!   Preparing ─Prepared─┬──────────────────────────────────────▶ Freezing ─Frozen─▶ Saving: Pause ─Done─▶ Snapshot ─Snapshotted─▶ Ending (Saved)
//!                       └─▶ Starting ─Started─▶ Initialising ─Ready─▲   │              │ Exited
//!                                                    │ Exited, overdue  └──────────────┴───────▶ Ending (the workload's own end)
//!                                                    └─▶ Draining, Ending
//! ```
//!
//! A clone of an initialised one is told its streams where another is told its workload: Attach in place of Start, and Attached for Started.

use std::os::fd::AsFd;
use std::time::Duration;

use carrel_protocol::agent::Freeze;
use carrel_protocol::chain;
use carrel_protocol::vmm::{
    Descriptor, DeviceStopReason, DeviceStopped, FromOwner, Pause, Snapshot, SnapshotKind, Snapshotted,
};

use super::Room;
use crate::home::Task;
use crate::launch::{self, Saved};
use crate::outcome::{Outcome, Step, clean};
use crate::record::Phase;
use crate::timestamp::mark;

impl Room {
    /// Whether this becomes a template whose workload runs.
    pub(super) fn initialises(&self) -> bool {
        self.own.task == Task::Template && self.own.spec.initialised
    }

    /// Whether this is a clone of such a one.
    pub(super) fn attaches(&self) -> bool {
        self.own.task == Task::Clone && self.own.spec.initialised
    }

    /// The workload runs, towards the point where it is ready.
    pub(super) fn initialise(&mut self) {
        let function = self.own.spec.function.as_ref();
        let time = function.map_or_else(
            || self.own.patience.initialise(),
            |function| Duration::from_millis(function.init_timeout_ms.into()),
        );
        self.enter(Phase::Initialising, Some((Step::Initialise, time)));
        if self.said_ready {
            self.freeze();
        }
    }

    /// It is ready; perhaps so quickly that its start is told later.
    pub(super) fn ready(&mut self) {
        self.said_ready = true;
        if self.record.phase == Phase::Initialising {
            self.note(mark("workload ready"));
            self.freeze();
        }
    }

    /// What is to be cloned comes to rest.
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

    /// The VMM refuses what it was asked. A saving that fails ends the room; a balloon that can't be had doesn't.
    pub(super) fn not_saved(&mut self, reason: &str) {
        if self.record.phase == Phase::Saving {
            self.give_up(Outcome::OwnerFailed {
                message: format!("the guest was not saved: {}", clean(reason)),
            });
        }
    }

    /// A device failed its guest. What a guest that is to be saved could not write would be missing in each of its clones, and what it could not read too,
    /// whatever the guest itself makes of that: it is not saved.
    pub(super) fn spoil(&mut self, stopped: &DeviceStopped) {
        if self.own.task != Task::Template {
            return;
        }
        let why = match stopped.reason {
            DeviceStopReason::HostDiskFull => "the host has no space left for its disk".to_owned(),
            DeviceStopReason::HostIo | DeviceStopReason::DriverFault => {
                format!("its {} failed", clean(&stopped.device))
            }
        };
        self.give_up(Outcome::OwnerFailed { message: format!("the guest was not saved: {why}") });
    }

    /// A room whose VMM can't be told what it must do ends.
    pub(super) fn tell_vmm(&mut self, request: &FromOwner, files: Option<&Saved>) {
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
