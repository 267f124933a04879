//! Starts a second, with many requested at once.
//!
//! ```text
//!   carrel       shelf: so many ready ─ all requests at once ─▶ each takes one, or waits for one ─▶ ticks
//!                preparers (a thread a CPU): one for each that is taken ─────────────────────────▶ as many ready as before
//!   Firecracker  all requests at once ─▶ a process each: API, load, resume ─▶ ticks
//!                ^ clock                                                      ^ clock
//! ```
//!
//! A wave's clock runs from the moment when all requests are let go until the last guest has ticked and, for carrel, until as many VMMs are ready as at the beginning: what was
//! prepared ahead is paid for in the same wave. A clone that was heard is stopped (SIGSTOP), for its guest would tick on in the others' time, and stays until the clock has
//! stopped; ending it is in nobody's time.

use std::collections::VecDeque;
use std::sync::{Barrier, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};

use super::rooms::{Ready, Side, Started};
use super::{Clones, Template, single};
use crate::engine::Machine;
use crate::{Metric, Sample, Series};

/// What one wave came to.
struct Wave {
    /// Starts a second until all was heard and prepared again.
    rate: f64,
    /// Starts a second until the last tick.
    heard_rate: f64,
    /// Each start's time, ms, sorted.
    each: Vec<f64>,
}

/// VMMs that are ready; `Err` once one could not be prepared.
struct Shelf {
    ready: Mutex<Result<VecDeque<Ready>, String>>,
    changed: Condvar,
}

/// All waves of all sides, in turn.
pub(super) fn measure(clones: &Clones<'_>, guest: &str, machine: &Machine) -> Result<Vec<Metric>> {
    let template = clones.template(machine, true)?;
    let mut series =
        [Side::Prepared, Side::Firecracker, Side::Carrel].map(|side| Series::new(side.name(), side));
    clones.rounds(&mut series, |&side| {
        let wave = wave(clones, side, &template)?;
        let at = |percent: usize| wave.each.get((wave.each.len() - 1) * percent / 100).copied();
        Ok(vec![wave.rate, wave.heard_rate, at(50).unwrap_or(f64::NAN), at(95).unwrap_or(f64::NAN)])
    })?;
    let [prepared, firecracker, carrel] = series.each_ref();
    let n = clones.options.clone.concurrent;
    let column = |series: &Series<Side>, i| -> Vec<Sample> {
        single(series.samples.iter().map(|sample| crate::value(sample, i)))
    };
    let mut metrics = Vec::new();
    for ours in [prepared, carrel] {
        let how = ours.name.trim_start_matches("carrel, ");
        for (i, what, unit) in [
            (0, "starts a second", "1/s"),
            (1, "starts a second until the last tick", "1/s"),
            (2, "request to first tick, the median of a wave", "ms"),
            (3, "request to first tick, a wave's 95th percentile", "ms"),
        ] {
            // From its process's start nothing is prepared: the first two are one.
            if i == 1 && ours.side == Side::Carrel {
                continue;
            }
            let metric = format!("{what}, {n} at once, {guest}, {how}");
            metrics.extend(clones.compare(
                &metric,
                unit,
                &clones.version,
                &column(ours, i),
                &column(firecracker, i),
            ));
        }
    }
    Ok(metrics)
}

fn wave(clones: &Clones<'_>, side: Side, template: &Template) -> Result<Wave> {
    let requests = clones.options.clone.concurrent;
    let (shelf, before) = match side {
        Side::Prepared => (Shelf::new(), clones.options.clone.ready),
        // A command and a folder each: nothing runs yet.
        Side::Carrel | Side::Firecracker | Side::FirecrackerApi => (Shelf::new(), requests),
    };
    let again = if side == Side::Prepared { requests } else { 0 };
    let preparers = u32::try_from(thread::available_parallelism()?.get())?;
    let share = |of: u32, n: u32| of / preparers + u32::from(n < of % preparers);
    let (filled, go, prepared, over) = (
        Barrier::new(usize::try_from(preparers)? + 1),
        Barrier::new(usize::try_from(preparers + requests)? + 1),
        Barrier::new(usize::try_from(preparers)? + 1),
        Barrier::new(usize::try_from(preparers)? + 1),
    );
    let prepare = |count: u32| (0..count).for_each(|_| shelf.put(clones.bed.ready(side, template, &[])));
    thread::scope(|scope| {
        for n in 0..preparers {
            let (filled, go, prepared, over, prepare) = (&filled, &go, &prepared, &over, &prepare);
            scope.spawn(move || {
                prepare(share(before, n));
                filled.wait();
                go.wait();
                prepare(share(again, n));
                prepared.wait();
                // A VMM dies with the thread that prepared it.
                over.wait();
            });
        }
        filled.wait();
        let asked: Vec<_> = (0..requests)
            .map(|_| {
                let (shelf, go) = (&shelf, &go);
                scope.spawn(move || -> Result<Started> {
                    go.wait();
                    // The request: waiting for a VMM that is ready is in its time.
                    let began = Instant::now();
                    let mut started = shelf.take()?.start(template)?;
                    started.took = began.elapsed();
                    started.room.hold();
                    Ok(started)
                })
            })
            .collect();
        go.wait();
        let began = Instant::now();
        let started: Vec<Result<Started>> = asked
            .into_iter()
            .map(|one| one.join().map_err(|_| anyhow!("a request's thread panicked")).flatten())
            .collect();
        let heard = began.elapsed();
        prepared.wait();
        let all = began.elapsed();
        let failed = started.iter().filter(|one| one.is_err()).count();
        let result = started.into_iter().collect::<Result<Vec<Started>>>();
        let ended = result.with_context(|| format!("{failed} of {requests} starts failed")).map(|started| {
            let mut each: Vec<f64> = started.iter().map(|one| one.took.as_secs_f64() * 1e3).collect();
            each.sort_by(f64::total_cmp);
            Wave {
                rate: f64::from(requests) / all.as_secs_f64(),
                heard_rate: f64::from(requests) / heard.as_secs_f64(),
                each,
            }
        });
        shelf.clear();
        over.wait();
        ended
    })
}

impl Shelf {
    fn new() -> Self {
        Self { ready: Mutex::new(Ok(VecDeque::new())), changed: Condvar::new() }
    }

    fn put(&self, one: Result<Ready>) {
        let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        match (one, &mut *ready) {
            (Ok(one), Ok(there)) => there.push_back(one),
            (Err(error), _) => *ready = Err(format!("{error:#}")),
            (Ok(_), Err(_)) => {}
        }
        drop(ready);
        self.changed.notify_all();
    }

    /// The first, or the next that is made.
    fn take(&self) -> Result<Ready> {
        let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match &mut *ready {
                Ok(there) => {
                    if let Some(one) = there.pop_front() {
                        return Ok(one);
                    }
                }
                Err(why) => return Err(anyhow!("no VMM could be prepared: {why}")),
            }
            ready = self.changed.wait(ready).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn clear(&self) {
        if let Ok(there) = &mut *self.ready.lock().unwrap_or_else(PoisonError::into_inner) {
            there.clear();
        }
    }
}
