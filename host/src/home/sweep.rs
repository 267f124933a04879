//! Sweeping: what a killed owner left is removed by the next command, or by the one after it if one has just swept.
//!
//! ```text
//!   no lock file, or the lock is free and no end recorded
//!        └─▶ kill the VMM's cgroup or process ─▶ remove the cgroup ─┬─ detached: record the end as lost, keep log and record
//!                                                                   └─ else: remove the directory
//!   a detached room's torn record is written anew
//!   a room's cgroup that nobody has locked ─▶ kill what is in it, remove it
//! ```

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::FlockOperation;
use rustix::process::{Pid, PidfdFlags, Signal};

use super::{Home, HomeError, Order, failed};
use crate::cgroup::{self, Cgroup};
use crate::outcome::Outcome;
use crate::record::{Phase, ProcessMark, Record};
use crate::timestamp::now_ms;

/// How often starts sweep at most: what one costs doesn't grow with the rooms that are there.
const EVERY: Duration = Duration::from_secs(1);

/// How long a killed process may take to be gone.
const GONE: Duration = Duration::from_secs(5);

impl Home {
    /// Clears away what rooms left whose owner is dead. Rooms whose owner lives are not touched. It looks at each room.
    pub fn sweep(&self) -> Result<(), HomeError> {
        let dead = {
            // A room that is being made holds this lock until it holds its own.
            let scanning = self.lock_rooms(FlockOperation::LockShared)?;
            // Of when it begins: an owner that dies meanwhile may be missed.
            scanning.set_modified(SystemTime::now()).map_err(failed("written", &self.rooms_lock()))?;
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

    /// The same, unless a command has just done it.
    pub(super) fn sweep_if_due(&self) -> Result<(), HomeError> {
        let last = fs::metadata(self.rooms_lock()).and_then(|lock| lock.modified());
        // One that is in the future was of another clock.
        let just = last.is_ok_and(|last| last.elapsed().is_ok_and(|ago| ago < EVERY));
        if just { Ok(()) } else { self.sweep() }
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
    // A record that is there and can't be read was torn: written over on a full disk by an owner that was killed meanwhile. Its log is whole.
    let torn = || room.join("state.json").exists().then(|| Record::new(made_ms(room)));
    match (order, record.or_else(torn)) {
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

/// When a room was made, by its directory's oldest file, the order.
fn made_ms(room: &Path) -> u64 {
    let made = fs::metadata(room.join("room.json")).and_then(|order| order.modified()).ok();
    let since = made.and_then(|made| made.duration_since(SystemTime::UNIX_EPOCH).ok()).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::home::Assets;
    use crate::patience::Patience;
    use crate::spec::{RoomSpec, testing};

    /// A room whose owner is dead, as it would lie there with this record.
    fn left(rooms: &Path, id: &str, detached: bool, record: Option<&str>) {
        let room = rooms.join(id);
        fs::create_dir_all(&room).unwrap();
        let nowhere = Path::new("/nowhere").to_owned();
        let order = Order {
            spec: RoomSpec { id: Some(id.parse().unwrap()), detached, ..testing::room() },
            assets: Assets {
                kernel: nowhere.clone(),
                initramfs: nowhere.clone(),
                scratch: nowhere.clone(),
                vmm: nowhere,
            },
            patience: Patience::default(),
            task: crate::home::Task::Run,
            extras: Default::default(),
        };
        fs::write(room.join("room.json"), serde_json::to_vec(&order).unwrap()).unwrap();
        fs::write(room.join("lock"), "").unwrap();
        fs::write(room.join("log"), "what it wrote").unwrap();
        if let Some(text) = record {
            fs::write(room.join("state.json"), text).unwrap();
        }
    }

    #[test]
    fn a_detached_room_whose_record_is_torn_is_recorded_as_lost_with_its_log() {
        let root = tempfile::tempdir().unwrap();
        let rooms = root.path().join("rooms");
        let (torn, attached, unbegun) = ("00000000000a", "00000000000b", "00000000000c");
        left(&rooms, torn, true, Some(r#"{"phase":"running","created_ms":17}g":null"#));
        left(&rooms, attached, false, Some("{"));
        left(&rooms, unbegun, true, None);
        let assets = {
            let order = fs::read(rooms.join(torn).join("room.json")).unwrap();
            serde_json::from_slice::<Order>(&order).unwrap().assets
        };
        let home = Home::open(root.path(), assets, Patience::default()).unwrap();
        let room = home.find(torn).unwrap();
        let record = room.record();
        assert_eq!((record.phase, record.outcome), (Phase::Ended, Some(Outcome::Lost)));
        assert!(record.created_ms > 0 && record.created_ms <= now_ms());
        assert_eq!(fs::read(room.directory().join("log")).unwrap(), b"what it wrote");
        assert!(!rooms.join(attached).exists(), "nobody can ask for an attached one");
        assert!(!rooms.join(unbegun).exists(), "it had not begun");
    }
}
