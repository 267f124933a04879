//! Admission: how much of the host's memory and CPUs rooms are promised, and when no more is.
//!
//! Two bounds hold at once. What all rooms *may* take, by their limits, is at most so many times what the host has: most rooms never take what they
//! may, and clones share what they don't write. And the host must have some memory left *now*, whatever was promised.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::cgroup::Cgroup;
use crate::launch;
use crate::spec::Machine;

/// Memory that the host must have left when a room begins, bytes.
const RESERVE_BYTES: u64 = 192 << 20;
/// What a room takes in its first moments, which the host's figure doesn't show yet: its VMM, page tables, what its guest writes on its way to the workload. Bytes.
const YOUNG_BYTES: u64 = 24 << 20;
/// How long a room is young.
const YOUTH: Duration = Duration::from_secs(2);

/// The host's memory or CPUs are not to be had, or a factor is none.
#[derive(Debug, Error)]
pub enum OvercommitError {
    /// `/proc/meminfo`.
    #[error("the host's memory can't be read from /proc/meminfo")]
    Memory(#[source] io::Error),
    /// A factor.
    #[error("{0:?} is no factor of overcommitment: give a number from 0.1 to 10000")]
    Factor(String),
}

/// By which factors rooms may be promised more than the host has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Overcommit {
    /// Of the host's memory.
    pub memory: Factor,
    /// Of its CPUs.
    pub cpu: Factor,
}

/// 0.1 to 10000.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Factor(f64);

impl Default for Overcommit {
    fn default() -> Self {
        Self { memory: Factor(16.0), cpu: Factor(100.0) }
    }
}

impl FromStr for Factor {
    type Err = OvercommitError;

    fn from_str(text: &str) -> Result<Self, OvercommitError> {
        let factor = text.parse::<f64>().ok().filter(|factor| (0.1..=10_000.0).contains(factor));
        factor.map(Self).ok_or_else(|| OvercommitError::Factor(text.to_owned()))
    }
}

impl Factor {
    /// So many times this.
    fn of(self, amount: u64) -> u64 {
        // Thousandths: exact enough, and no float becomes an integer.
        let thousandths = format!("{:.0}", self.0 * 1000.0).parse::<u128>().unwrap_or(1000);
        u64::try_from(u128::from(amount) * thousandths / 1000).unwrap_or(u64::MAX)
    }
}

/// Why a room is not admitted.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Promises of memory.
    #[error(
        "it may take {asked} MiB of memory, and {promised} of {limit} MiB are promised to other rooms; end some, or see `carrel pool --memory-overcommit`"
    )]
    Memory {
        /// MiB.
        asked: u64,
        /// MiB.
        promised: u64,
        /// MiB.
        limit: u64,
    },
    /// Promises of CPUs.
    #[error(
        "it may use {asked} thousandths of a CPU, and {promised} of {limit} are promised to other rooms; end some, or see `carrel pool --cpu-overcommit`"
    )]
    Cpu {
        /// Thousandths.
        asked: u64,
        /// Thousandths.
        promised: u64,
        /// Thousandths.
        limit: u64,
    },
    /// What there is.
    #[error("the host has {available} MiB of memory left, and {reserve} must stay; end some rooms")]
    Exhausted {
        /// MiB.
        available: u64,
        /// MiB.
        reserve: u64,
    },
    /// What there is, less what rooms that were just admitted are about to take.
    #[error(
        "rooms that began a moment ago are about to take what the host has left: {available} MiB would stay, and {reserve} must; try again"
    )]
    Crowded {
        /// MiB.
        available: u64,
        /// MiB.
        reserve: u64,
        /// When the first of them has taken it.
        passes: Duration,
    },
}

impl Refusal {
    /// Whether no end of other rooms makes room for this one.
    pub(crate) fn is_for_ever(&self) -> bool {
        match self {
            Self::Memory { asked, limit, .. } | Self::Cpu { asked, limit, .. } => asked > limit,
            Self::Exhausted { .. } | Self::Crowded { .. } => false,
        }
    }
}

/// A promise and its bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) promised: u64,
    pub(crate) limit: u64,
}

impl Account {
    fn has(&self, amount: u64) -> bool {
        self.promised.saturating_add(amount) <= self.limit
    }
}

#[derive(Debug)]
struct Accounts {
    /// Bytes.
    memory: Account,
    /// Thousandths of a CPU.
    cpu: Account,
    /// Each room that was admitted, by a number.
    rooms: BTreeMap<u64, Promised>,
    next: u64,
}

#[derive(Debug)]
struct Promised {
    since: Instant,
    /// Once there is one.
    meter: Option<Cgroup>,
}

impl Accounts {
    /// What rooms that were admitted a moment ago are about to take, and when the first of them has.
    fn pending(&self, now: Instant) -> (u64, Duration) {
        let age = |room: &Promised| now.saturating_duration_since(room.since);
        // Numbers are given in order of time.
        let young = self.rooms.values().rev().map(age).take_while(|age| *age < YOUTH);
        let (count, oldest) = young.fold((0_u64, Duration::ZERO), |(count, _), age| (count + 1, age));
        (count.saturating_mul(YOUNG_BYTES), YOUTH - oldest)
    }
}

/// What rooms are promised.
#[derive(Debug)]
pub(crate) struct Admission(Arc<Mutex<Accounts>>);

/// A room's promise, taken back when this is dropped.
#[derive(Debug)]
pub(crate) struct Admitted {
    accounts: Arc<Mutex<Accounts>>,
    room: u64,
    memory: u64,
    cpu: u64,
}

impl Admission {
    pub(crate) fn new(overcommit: Overcommit) -> Result<Self, OvercommitError> {
        let memory = meminfo("MemTotal:").map_err(OvercommitError::Memory)?;
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let millis = u64::try_from(cpus).unwrap_or(1).saturating_mul(1000);
        Ok(Self::with(overcommit.memory.of(memory), overcommit.cpu.of(millis)))
    }

    fn with(memory: u64, cpu: u64) -> Self {
        let account = |limit| Account { promised: 0, limit };
        Self(Arc::new(Mutex::new(Accounts {
            memory: account(memory),
            cpu: account(cpu),
            rooms: BTreeMap::new(),
            next: 0,
        })))
    }

    /// Promises a room what it may take.
    pub(crate) fn admit(&self, machine: &Machine) -> Result<Admitted, Refusal> {
        self.promise(available(), launch::limits(machine).memory_bytes, u64::from(machine.cpu_millis))
    }

    fn promise(&self, available: u64, memory: u64, cpu: u64) -> Result<Admitted, Refusal> {
        let mut accounts = lock(&self.0);
        let now = Instant::now();
        let reserve = RESERVE_BYTES >> 20;
        if available < RESERVE_BYTES {
            return Err(Refusal::Exhausted { available: available >> 20, reserve });
        }
        let (pending, passes) = accounts.pending(now);
        let available = available.saturating_sub(pending);
        if available < RESERVE_BYTES {
            return Err(Refusal::Crowded { available: available >> 20, reserve, passes });
        }
        let Accounts { memory: of_memory, cpu: of_cpu, rooms, next } = &mut *accounts;
        if !of_memory.has(memory) {
            let Account { promised, limit } = *of_memory;
            return Err(Refusal::Memory {
                asked: memory >> 20,
                promised: promised >> 20,
                limit: limit >> 20,
            });
        }
        if !of_cpu.has(cpu) {
            let Account { promised, limit } = *of_cpu;
            return Err(Refusal::Cpu { asked: cpu, promised, limit });
        }
        of_memory.promised += memory;
        of_cpu.promised += cpu;
        let room = *next;
        *next += 1;
        rooms.insert(room, Promised { since: now, meter: None });
        Ok(Admitted { accounts: Arc::clone(&self.0), room, memory, cpu })
    }

    /// Rooms that were admitted and are not over.
    pub(crate) fn rooms(&self) -> u64 {
        u64::try_from(lock(&self.0).rooms.len()).unwrap_or(u64::MAX)
    }

    /// What rooms take now that nobody else could have instead, bytes: what they wrote of their memory, and the kernel's for them. A template's pages are the page
    /// cache's, and whatever a guest gave back is not in it any more (cgroups(7), `memory.stat`).
    pub(crate) fn taken(&self) -> u64 {
        let meters: Vec<Cgroup> =
            lock(&self.0).rooms.values().filter_map(|room| room.meter.clone()).collect();
        let of = |cgroup: &Cgroup| -> u64 {
            ["anon", "shmem", "kernel"].iter().filter_map(|key| cgroup.keyed("memory.stat", key)).sum()
        };
        meters.iter().map(of).sum()
    }

    /// Memory, bytes, and CPUs, thousandths.
    pub(crate) fn promised(&self) -> (Account, Account) {
        let accounts = lock(&self.0);
        (accounts.memory, accounts.cpu)
    }
}

impl Admitted {
    /// By which what the room takes is known.
    pub(crate) fn meter(&self, cgroup: &Cgroup) {
        if let Some(room) = lock(&self.accounts).rooms.get_mut(&self.room) {
            room.meter = Some(cgroup.clone());
        }
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let mut accounts = lock(&self.accounts);
        accounts.memory.promised = accounts.memory.promised.saturating_sub(self.memory);
        accounts.cpu.promised = accounts.cpu.promised.saturating_sub(self.cpu);
        accounts.rooms.remove(&self.room);
    }
}

/// Sums are whole between two statements, whoever fell over in between.
fn lock(accounts: &Mutex<Accounts>) -> MutexGuard<'_, Accounts> {
    accounts.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the host has left, bytes. Where the kernel doesn't say, the promises alone must do.
fn available() -> u64 {
    meminfo("MemAvailable:").unwrap_or(u64::MAX)
}

/// Whether the host has memory for what nobody has asked for yet.
pub(crate) fn has_memory_to_spare() -> bool {
    available() >= 2 * RESERVE_BYTES
}

/// A line of `/proc/meminfo` (proc(5)), bytes.
fn meminfo(key: &str) -> io::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let kib = line.and_then(|rest| rest.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kib.map(|kib| kib << 10).ok_or_else(|| io::Error::other(format!("there is no {key}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLENTY: u64 = 1 << 40;

    #[test]
    fn who_asks_at_the_same_moment_is_not_promised_the_same_memory() {
        let admission = Admission::with(1 << 40, 1 << 40);
        let available = RESERVE_BYTES + 2 * YOUNG_BYTES + (1 << 20);
        let rooms: Vec<_> = (0..3).map(|_| admission.promise(available, 1, 1).unwrap()).collect();
        let refused = admission.promise(available, 1, 1).unwrap_err();
        let Refusal::Crowded { available: 169, reserve: 192, passes } = refused else {
            panic!("{refused:?}")
        };
        assert!(passes <= YOUTH && !refused.is_for_ever());
        // That they have taken it by then shows in what there is.
        let exhausted = admission.promise(RESERVE_BYTES - 1, 1, 1).unwrap_err();
        assert_eq!(exhausted, Refusal::Exhausted { available: 191, reserve: 192 });
        // What is over takes nothing.
        drop(rooms);
        admission.promise(available, 1, 1).unwrap();
        let later = Instant::now() + YOUTH;
        assert_eq!(lock(&admission.0).pending(later).0, 0);
    }

    #[test]
    fn promises_are_kept_within_their_bounds_and_taken_back() {
        let admission = Admission::with(100 << 20, 1500);
        let first = admission.promise(PLENTY, 60 << 20, 1000).unwrap();
        let refused = admission.promise(PLENTY, 60 << 20, 100).unwrap_err();
        assert_eq!(refused, Refusal::Memory { asked: 60, promised: 60, limit: 100 });
        let refused = admission.promise(PLENTY, 1 << 20, 1000).unwrap_err();
        assert_eq!(refused, Refusal::Cpu { asked: 1000, promised: 1000, limit: 1500 });
        assert_eq!(admission.rooms(), 1);
        assert_eq!(admission.promised().0.promised, 60 << 20, "a refused room is promised nothing");
        drop(first);
        assert_eq!(admission.promised().1, Account { promised: 0, limit: 1500 });
        admission.promise(PLENTY, 100 << 20, 1500).unwrap();
        let refused = [(101, 100), (100, 1501)]
            .map(|(mib, cpu)| admission.promise(PLENTY, mib << 20, cpu).unwrap_err());
        assert!(refused.iter().all(Refusal::is_for_ever));
        let first = admission.promise(PLENTY, 60 << 20, 1000).unwrap();
        assert!(!admission.promise(PLENTY, 100 << 20, 1500).unwrap_err().is_for_ever());
        drop(first);
    }

    #[test]
    fn a_factor_is_a_number_within_reason() {
        for wrong in ["", "x", "0", "-1", "nan", "inf", "10001"] {
            assert!(wrong.parse::<Factor>().is_err(), "{wrong:?}");
        }
        assert_eq!("1.5".parse::<Factor>().unwrap().of(1000), 1500);
        assert_eq!("10000".parse::<Factor>().unwrap().of(u64::MAX), u64::MAX);
    }

    #[test]
    fn this_host_has_memory() {
        let (total, available) = (meminfo("MemTotal:").unwrap(), meminfo("MemAvailable:").unwrap());
        assert!(available > 0 && available <= total, "{available} of {total}");
        assert!(meminfo("Nothing:").is_err());
    }
}
