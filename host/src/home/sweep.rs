//! Sweeping: what a killed owner left is removed by the next command.
//!
//! ```text
//!   no lock file, or the lock is free and no end recorded
//!        └─▶ kill the VMM's cgroup or process ─▶ remove the cgroup ─┬─ detached: record the end as lost, keep log and record
//!                                                                   └─ else: remove the directory
//!   a room's cgroup that nobody has locked ─▶ kill what is in it, remove it
//! ```

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::process::{Pid, PidfdFlags, Signal};

use super::{Home, HomeError, Order, failed};
use crate::cgroup::{self, Cgroup};
use crate::outcome::Outcome;
use crate::record::{Phase, ProcessMark, Record};
use crate::timestamp::now_ms;

/// How long a killed process may take to be gone.
const GONE: Duration = Duration::from_secs(5);

impl Home {
    /// Clears away what rooms left whose owner is dead. Rooms whose owner lives are not touched.
    pub fn sweep(&self) -> Result<(), HomeError> {
        let dead = {
            // A room that is being made holds this lock until it holds its own.
            let _scanning = self.lock_rooms(FlockOperation::LockShared)?;
            let folder = self.rooms_directory();
            let entries = fs::read_dir(&folder).map_err(failed("read", &folder))?;
            let folders = entries.filter_map(|entry| Some(entry.ok()?.path()));
            folders.filter_map(|room| Some((unclaimed(&room)?, room))).collect::<Vec<_>>()
        };
        for (_lock, room) in dead {
            clear(&room);
        }
        // An owner may be killed before it could record its cgroup, and the doctor records nothing.
        cgroup::sweep();
        Ok(())
    }
}

/// The room's lock, if nobody has it and there is something to clear; held, so that no other command clears it at once.
fn unclaimed(room: &Path) -> Option<Option<File>> {
    let Ok(lock) = File::open(room.join("lock")) else { return Some(None) };
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).ok()?;
    let over = Record::read(&room.join("state.json")).is_some_and(|record| record.phase == Phase::Ended);
    (!over).then_some(Some(lock))
}

fn clear(room: &Path) {
    let record = Record::read(&room.join("state.json"));
    let order: Option<Order> =
        fs::read(room.join("room.json")).ok().and_then(|text| serde_json::from_slice(&text).ok());
    tracing::info!(room = %room.display(), "sweeping up a room whose owner is gone");
    if let Some(record) = &record {
        if let Some(path) = &record.remains.cgroup {
            Cgroup::at(path.clone()).remove();
        }
        if let Some(vmm) = &record.remains.vmm {
            kill(vmm);
        }
    }
    match (order, record) {
        (Some(order), Some(mut record)) if order.spec.detached => {
            record.phase = Phase::Ended;
            record.ended_ms = Some(now_ms());
            record.outcome.get_or_insert(Outcome::Lost);
            record.remains = Default::default();
            let _ = fs::remove_file(room.join("owner.sock"));
            // Where even that can't be written its log stays, and the next sweep tries again.
            if let Err(error) = record.write(&room.join("state.json")) {
                tracing::warn!(%error, room = %room.display(), "a room's end can't be recorded");
            }
        }
        _ => {
            let _ = fs::remove_dir_all(room);
        }
    }
}

/// Kills a process if it is still the one that was marked, and waits until it is gone.
fn kill(mark: &ProcessMark) {
    let Some(pid) = i32::try_from(mark.pid).ok().and_then(Pid::from_raw) else { return };
    // The descriptor is taken first and the mark checked then: from here on the number can't mean another process.
    let Ok(process) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else { return };
    if !mark.is_alive() {
        return;
    }
    let _ = rustix::process::pidfd_send_signal(&process, Signal::KILL);
    let deadline = Instant::now() + GONE;
    while mark.is_alive() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
}
