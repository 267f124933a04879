//! The shelf: VMMs that are ready before anybody asks. Each is a confined process in its own namespaces and cgroup whose VM and vCPUs are made, and which
//! waits to be told what to go on from.
//!
//! A VMM that was taken is replaced when no room is starting, or beside those that are once they had their time ([`Starts`]). Of each kind there are as many as were lately asked for
//! at once ([`Demand`]).

use std::collections::VecDeque;
use std::fs;
use std::num::NonZero;
use std::ops::RangeInclusive;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use carrel_protocol::chain;
use carrel_protocol::units::{MemoryMib, VcpuCount};
use serde::{Deserialize, Serialize};

use super::admission;
use super::demand::Demand;
use super::starts::{Number, Starts};
use crate::home::{self, Order};
use crate::launch::{self, LaunchError, Prepared};
use crate::spec::Part;

/// Kinds of machines that VMMs are kept for at once: those that were asked for last.
const MOST_SHAPES: usize = 4;
/// A kind that nobody asked for in this time has no VMMs ready any more, unless it is the last that anybody asked for.
const FORGOTTEN: Duration = Duration::from_secs(600);
/// From a VMM that could not be prepared to the next attempt.
const AGAIN: Duration = Duration::from_secs(5);

/// A file as it was when it was executed: another one at its path is another program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> Option<Self> {
        let found = fs::metadata(path).ok()?;
        let changed = (found.ctime(), found.ctime_nsec());
        Some(Self { device: found.dev(), inode: found.ino(), size: found.len(), changed })
    }
}

/// What a VMM has to be like before it knows its room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    vmm: PathBuf,
    stamp: Option<Stamp>,
    vcpus: VcpuCount,
    memory_mib: MemoryMib,
    without: Vec<Part>,
}

impl Shape {
    fn plain(vmm: PathBuf, (vcpus, memory_mib): (VcpuCount, MemoryMib)) -> Self {
        Self { stamp: Stamp::of(&vmm), vmm, vcpus, memory_mib, without: Vec::new() }
    }

    /// What this order's clone needs.
    pub(crate) fn of(order: &Order) -> Self {
        let machine = &order.spec.machine;
        let plain = Self::plain(order.assets.vmm.clone(), (machine.vcpus, machine.memory_mib));
        Self { without: order.spec.without.clone(), ..plain }
    }
}

/// VMMs of one kind that are ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// Their vCPUs.
    pub vcpus: u8,
    /// Their guests' memory, MiB.
    pub memory_mib: u32,
    /// How many there are.
    pub count: usize,
}

#[derive(Debug)]
struct Kind {
    shape: Shape,
    ready: VecDeque<Prepared>,
    asked: Instant,
    demand: Demand,
}

#[derive(Debug)]
struct Kinds {
    /// The last asked for first.
    kinds: Vec<Kind>,
    /// Rooms whose workloads do not run yet.
    starts: Starts,
    closed: bool,
}

#[derive(Debug)]
struct State {
    kinds: Mutex<Kinds>,
    changed: Condvar,
}

impl State {
    /// Counts are whole between two statements, whoever fell over in between.
    fn lock(&self) -> MutexGuard<'_, Kinds> {
        self.kinds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The VMMs that are ready.
#[derive(Debug)]
pub(crate) struct Shelf {
    state: Arc<State>,
    /// How many of each kind.
    bounds: RangeInclusive<usize>,
}

/// A room is starting for as long as this lives.
#[derive(Debug)]
pub(crate) struct Starting {
    state: Arc<State>,
    number: Number,
}

impl Drop for Starting {
    fn drop(&mut self) {
        self.state.lock().starts.end(self.number);
        self.state.changed.notify_all();
    }
}

impl Starting {
    /// Waits for the room's turn, on the thread that had it begin.
    pub(crate) fn wait_for_its_turn(&self) {
        loop {
            // The lock is free before the wait.
            let taken = self.state.lock().starts.take_turn(self.number, Instant::now());
            match taken {
                Ok(()) => return,
                Err(Duration::MAX) => thread::park(),
                Err(wait) => thread::park_timeout(wait),
            }
        }
    }
}

impl Shelf {
    /// One that is to have so many VMMs of each kind, and the fewest of the usual one from the beginning on.
    pub(crate) fn new(bounds: RangeInclusive<usize>, vmm: PathBuf, usual: (VcpuCount, MemoryMib)) -> Self {
        let cpus = thread::available_parallelism().map_or(1, NonZero::get);
        let kinds = Kinds {
            kinds: vec![Kind::new(Shape::plain(vmm, usual))],
            starts: Starts::new(cpus, Instant::now()),
            closed: false,
        };
        Self { state: Arc::new(State { kinds: Mutex::new(kinds), changed: Condvar::new() }), bounds }
    }

    /// A room begins to start.
    pub(crate) fn starting(&self) -> Starting {
        let number = self.state.lock().starts.begin(Instant::now());
        Starting { state: Arc::clone(&self.state), number }
    }

    /// Rooms whose workloads do not run yet.
    pub(crate) fn being_started(&self) -> u64 {
        self.state.lock().starts.under_way()
    }

    /// Takes a VMM of this kind, if one is ready, and has others of the kind prepared from now on.
    pub(crate) fn take(&self, shape: &Shape) -> Option<Prepared> {
        let mut kinds = self.state.lock();
        let at = kinds.kinds.iter().position(|kind| kind.shape == *shape);
        let mut kind = match at {
            Some(at) => kinds.kinds.remove(at),
            None => Kind::new(shape.clone()),
        };
        kind.asked = Instant::now();
        kind.demand.asked(kind.asked);
        let (taken, broken) = kind.take();
        kinds.kinds.insert(0, kind);
        let most = MOST_SHAPES.min(kinds.kinds.len());
        let gone = kinds.kinds.split_off(most);
        self.state.changed.notify_all();
        // Killing takes its time.
        drop(kinds);
        drop((broken, gone));
        taken
    }

    /// What is ready.
    pub(crate) fn ready(&self) -> Vec<Ready> {
        let kinds = self.state.lock();
        let ready = |kind: &Kind| Ready {
            vcpus: kind.shape.vcpus.get(),
            memory_mib: kind.shape.memory_mib.get(),
            count: kind.ready.len(),
        };
        kinds.kinds.iter().map(ready).collect()
    }

    /// Nothing is prepared any more, and what is ready goes.
    pub(crate) fn close(&self) {
        let mut kinds = self.state.lock();
        kinds.closed = true;
        let gone = std::mem::take(&mut kinds.kinds);
        self.state.changed.notify_all();
        drop(kinds);
        drop(gone);
    }

    /// Keeps the shelf full until it is closed. VMMs die with the thread that started them (PR_SET_PDEATHSIG), so this one must live as long as its process.
    pub(crate) fn keep(&self) {
        while let Some(shape) = self.next_wanted() {
            // Rooms that were asked for come first.
            if !admission::has_memory_to_spare() {
                self.rest(AGAIN);
                continue;
            }
            match prepare(&shape) {
                Ok(prepared) => self.put(&shape, prepared),
                Err(error) => {
                    tracing::warn!(error = %chain(&error), "no VMM can be prepared");
                    self.rest(AGAIN);
                }
            }
        }
    }

    /// Waits for a kind that lacks a VMM; `None` at the end.
    fn next_wanted(&self) -> Option<Shape> {
        let mut kinds = self.state.lock();
        loop {
            if kinds.closed {
                return None;
            }
            let now = Instant::now();
            let forgotten = kinds.forget(now, &self.bounds);
            if !forgotten.is_empty() {
                drop(kinds);
                drop(forgotten);
                kinds = self.state.lock();
                continue;
            }
            let lacking = kinds.kinds.iter().find(|kind| kind.ready.len() < kind.demand.wanted(&self.bounds));
            let wait = match (lacking, kinds.starts.pause(now)) {
                (Some(kind), None) => return Some(kind.shape.clone()),
                (Some(_), Some(pause)) => pause,
                (None, _) => FORGOTTEN,
            };
            kinds = self.state.changed.wait_timeout(kinds, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn put(&self, shape: &Shape, prepared: Prepared) {
        let mut kinds = self.state.lock();
        let closed = kinds.closed;
        match kinds.kinds.iter_mut().find(|kind| kind.shape == *shape && !closed) {
            Some(kind) => {
                kind.ready.push_back(prepared);
                kind.demand.has(kind.ready.len(), &self.bounds);
            }
            None => {
                drop(kinds);
                drop(prepared);
            }
        }
    }

    /// Waits for so long, or for the end.
    fn rest(&self, time: Duration) {
        let kinds = self.state.lock();
        let open = |kinds: &mut Kinds| !kinds.closed;
        let _ = self.state.changed.wait_timeout_while(kinds, time, open);
    }
}

impl Kind {
    fn new(shape: Shape) -> Self {
        let now = Instant::now();
        Self { shape, ready: VecDeque::new(), asked: now, demand: Demand::new(now) }
    }

    /// A VMM that is ready, or else one that is about to be; and those that are none any more.
    fn take(&mut self) -> (Option<Prepared>, Vec<Prepared>) {
        let (mut late, mut broken) = (None, Vec::new());
        while let Some(mut prepared) = self.ready.pop_front() {
            match prepared.look() {
                Ok(true) => {
                    self.ready.extend(late);
                    return (Some(prepared), broken);
                }
                Ok(false) if late.is_none() => late = Some(prepared),
                // Those behind it are younger still.
                Ok(false) => {
                    self.ready.push_front(prepared);
                    break;
                }
                Err(error) => {
                    tracing::warn!(error = %chain(&error), "a VMM that was prepared is none any more");
                    broken.push(prepared);
                }
            }
        }
        (late, broken)
    }

    /// Nobody asked for it lately.
    fn is_old(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.asked) >= FORGOTTEN
    }

    /// Its program was replaced.
    fn is_outdated(&self) -> bool {
        self.shape.stamp != Stamp::of(&self.shape.vmm)
    }
}

impl Kinds {
    /// Takes out what nobody will ask for any more.
    fn forget(&mut self, now: Instant, bounds: &RangeInclusive<usize>) -> Vec<Prepared> {
        let all = std::mem::take(&mut self.kinds).into_iter().enumerate();
        let (gone, kept): (Vec<_>, Vec<_>) = all
            .map(|(at, kind)| ((at > 0 && kind.is_old(now)) || kind.is_outdated(), kind))
            .partition(|(gone, _)| *gone);
        self.kinds = kept.into_iter().map(|(_, kind)| kind).collect();
        let too_many = self.kinds.iter_mut().flat_map(|kind| {
            kind.demand.forget(now);
            let wanted = kind.demand.wanted(bounds).min(kind.ready.len());
            kind.ready.split_off(wanted)
        });
        let too_many: Vec<Prepared> = too_many.collect();
        gone.into_iter().flat_map(|(_, kind)| kind.ready).chain(too_many).collect()
    }
}

fn prepare(shape: &Shape) -> Result<Prepared, LaunchError> {
    // Its cgroup has this name and its user comes from it; the room that it becomes has an id of its own.
    let id = home::fresh_id()?;
    let limits = launch::limits_of(shape.vcpus, shape.memory_mib);
    launch::prepare(&id, &shape.without, &shape.vmm, limits, shape.vcpus, shape.memory_mib)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn every_one_of_many_has_its_turn_as_soon_as_others_end() {
        let usual = (VcpuCount::try_from(1).unwrap(), MemoryMib::try_from(128).unwrap());
        let shelf = Shelf::new(0..=0, "/nonexistent".into(), usual);
        let cpus = thread::available_parallelism().map_or(1, NonZero::get);
        let (at_once, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let begun = Instant::now();
        thread::scope(|scope| {
            for _ in 0..100 {
                scope.spawn(|| {
                    let starting = shelf.starting();
                    starting.wait_for_its_turn();
                    most.fetch_max(at_once.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    thread::sleep(Duration::from_millis(1));
                    at_once.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        // A wakeup that is lost would cost a whole turn's time.
        assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
        assert!(most.load(Ordering::SeqCst) <= cpus * 2, "{most:?} on {cpus} CPUs");
        assert_eq!(shelf.being_started(), 0);
    }
}
