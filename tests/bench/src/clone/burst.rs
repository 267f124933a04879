//! Starts a second, with many requested at once.
//!
//! ```text
//!                all requests at once                                                    the last tick                          as many ready as before
//!   carrel       shelf: so many ready ─▶ each takes one, or starts one itself ─▶ ticks ────────┤ as many are prepared again ────────────┤
//!   Firecracker  a process each: API, load, resume ────────────────────────────▶ ticks ────────┤
//!                ^ clock                                                                       ^ a burst's rate                         ^ the rate that lasts
//! ```
//!
//! That is what the resident owner does: who finds none ready doesn't wait for one, and those that were taken are replaced when nothing starts. The clock runs from the moment when the first of
//! the requests was let go. A clone that was heard stays until the clock has stopped; ending it is in nobody's time.

use std::collections::VecDeque;
use std::sync::{Barrier, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result};

use super::rooms::{Room, Side};
use super::{Clones, InTurn, Template, single};
use crate::engine::Machine;
use crate::{Metric, Sample, Series};

/// What one wave came to.
struct Wave {
    /// Starts a second until the last tick.
    rate: f64,
    /// The same until as much was ready as before.
    lasting_rate: f64,
    /// Each request's time, ms, sorted.
    each: Vec<f64>,
}

/// All waves of all sides, in turn.
pub(super) fn measure(clones: &Clones<'_>, guest: &str, machine: &Machine) -> Result<Vec<Metric>> {
    let templates = clones.templates(machine)?;
    let mut series = [Side::Prepared, Side::Firecracker, Side::Carrel]
        .map(|side| Series::new(side.name(), (side, InTurn::of(&templates))));
    clones.rounds(&mut series, |(side, templates)| {
        let wave = wave(clones, *side, templates.next()?)?;
        let at = |percent: usize| wave.each.get((wave.each.len() - 1) * percent / 100).copied();
        Ok(vec![wave.rate, wave.lasting_rate, at(50).unwrap_or(f64::NAN), at(95).unwrap_or(f64::NAN)])
    })?;
    let [prepared, firecracker, carrel] = series.each_ref();
    let n = clones.options.clone.concurrent;
    let column = |series: &Series<(Side, InTurn<'_>)>, i| -> Vec<Sample> {
        single(series.samples.iter().map(|sample| crate::value(sample, i)))
    };
    let mut metrics = Vec::new();
    for ours in [prepared, carrel] {
        let how = ours.name.trim_start_matches("carrel, ");
        for (i, what, unit) in [
            (0, "starts a second", "1/s"),
            (1, "starts a second that last", "1/s"),
            (2, "request to first tick, the median of a wave", "ms"),
            (3, "request to first tick, a wave's 95th percentile", "ms"),
        ] {
            // From its process's start nothing is prepared: the first two are one.
            if i == 1 && ours.side.0 == Side::Carrel {
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
    let ready = match side {
        Side::Prepared => clones.options.clone.ready,
        // A command and a folder each: nothing runs yet.
        Side::Carrel | Side::Firecracker | Side::FirecrackerApi => requests,
    };
    let shelf = Mutex::new(clones.bed.several(side, template, ready)?);
    let go = Barrier::new(usize::try_from(requests)?);
    // A VMM dies with the thread that started it.
    let over = Barrier::new(usize::try_from(requests)? + 1);
    let request = || -> (Instant, Result<(Instant, Room)>) {
        go.wait();
        let began = Instant::now();
        let taken = shelf.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let started = match taken {
            Some(ready) => ready.start(template),
            None => clones.bed.start(side, template),
        };
        (began, started.map(|started| (Instant::now(), started.room)))
    };
    let (told, tell) = mpsc::channel();
    thread::scope(|scope| {
        for _ in 0..requests {
            let (request, over, told) = (&request, &over, told.clone());
            scope.spawn(move || {
                // Sent before any other thing: who counts them waits for each.
                let _ = told.send(request());
                over.wait();
            });
        }
        drop(told);
        let mut began = Vec::new();
        let mut started = Vec::new();
        for (first, result) in tell.iter().take(usize::try_from(requests)?) {
            began.push(first);
            started.push(result);
        }
        let again = match side {
            Side::Prepared => clones.bed.several(side, template, ready),
            Side::Carrel | Side::Firecracker | Side::FirecrackerApi => Ok(VecDeque::new()),
        };
        let all = Instant::now();
        over.wait();
        again?;
        let failed = started.iter().filter(|one| one.is_err()).count();
        let started: Vec<(Instant, Room)> = started
            .into_iter()
            .collect::<Result<_>>()
            .with_context(|| format!("{failed} of {requests} starts failed"))?;
        let begun = began.into_iter().min().context("there are requests")?;
        let mut each: Vec<f64> =
            started.iter().map(|(heard, _)| (*heard - begun).as_secs_f64() * 1e3).collect();
        each.sort_by(f64::total_cmp);
        let last = each.last().context("there are requests")? / 1e3;
        Ok(Wave {
            rate: f64::from(requests) / last,
            lasting_rate: f64::from(requests) / (all - begun).as_secs_f64(),
            each,
        })
    })
}
