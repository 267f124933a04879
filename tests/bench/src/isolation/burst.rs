//! Many starts at once: each one's latency, and how many a second come through.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::measure::{Bench, progress, progress_end};
use super::metrics::Group;
use super::plans::{Work, plan};
use super::stage::available_mib;
use super::subjects::Subject;

const GROUP: Group = Group::Burst;
/// Fewest waves: the spread of a rate wants some.
const WAVES: u32 = 3;
/// Host memory that is left alone, MiB.
const RESERVE_MIB: u64 = 512;

/// All levels, for all subjects.
pub(crate) fn climb(bench: &mut Bench<'_>) {
    for level in bench.amount.bursts.clone() {
        // As many starts as rounds elsewhere.
        let waves = bench.amount.runs.div_ceil(level).max(WAVES.min(bench.amount.runs));
        for wave in 0..waves {
            let mut subjects = bench.subjects(GROUP);
            let first = usize::try_from(wave).unwrap_or(0) % subjects.len().max(1);
            subjects.rotate_left(first);
            for subject in subjects {
                if bench.is_interrupted() {
                    return;
                }
                progress(
                    GROUP,
                    &format!("{level} at once, wave {} of {waves}, {}", wave + 1, subject.name()),
                );
                turn(bench, level, subject);
            }
        }
    }
    progress_end();
}

/// One wave of one subject, if the host has the memory for it.
fn turn(bench: &mut Bench<'_>, level: u32, subject: Subject) {
    let metrics = bench.metrics(GROUP);
    let wanted = u64::from(level) * subject.room_mib() + RESERVE_MIB;
    let available = available_mib().unwrap_or(0);
    if wanted > available {
        let reason = format!("{level} rooms may take {wanted} MiB, and this host has {available} MiB left");
        bench.results.skip(&metrics, Some(level), subject, reason);
        return;
    }
    match wave(bench, level, subject) {
        Err(error) => bench.note_failure(GROUP, Some(level), subject, &error),
        Ok(Wave { latencies, whole, failed }) => {
            let rate = u32::try_from(latencies.len()).map_or(f64::NAN, f64::from) / whole.as_secs_f64();
            for metric in &metrics {
                let samples = if metric.name == "burst" { &latencies[..] } else { &[rate][..] };
                bench.results.add(metric, Some(level), subject, samples);
            }
            match failed {
                Some(error) => bench.note_failure(GROUP, Some(level), subject, &error),
                None => bench.note_success(GROUP, subject),
            }
        }
    }
}

struct Wave {
    /// Of those that came through, ms.
    latencies: Vec<f64>,
    /// From the first's beginning to the last's output.
    whole: Duration,
    /// The first failure among the others.
    failed: Option<anyhow::Error>,
}

/// Starts so many at once. All are prepared first, and all are there until the last has said its word.
fn wave(bench: &Bench<'_>, level: u32, subject: Subject) -> Result<Wave> {
    let plans = (0..level).map(|_| plan(bench.stage, subject, Work::True)).collect::<Result<Vec<_>>>()?;
    let gate = Barrier::new(plans.len() + 1);
    let patience = bench.patience(level);
    let started: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = plans
            .into_iter()
            .map(|plan| {
                let (gate, patience) = (&gate, &patience);
                scope.spawn(move || {
                    gate.wait();
                    let started = plan.start(Work::True.expect(), patience);
                    (started, Instant::now())
                })
            })
            .collect();
        let began = Instant::now();
        gate.wait();
        threads.into_iter().filter_map(|thread| thread.join().ok()).map(|(s, at)| (s, at - began)).collect()
    });
    let mut wave = Wave { latencies: Vec::new(), whole: Duration::ZERO, failed: None };
    for (started, at) in started {
        match started {
            Ok(started) => {
                wave.latencies.push(started.took.as_secs_f64() * 1e3);
                wave.whole = wave.whole.max(at);
            }
            Err(error) => wave.failed = wave.failed.or(Some(error)),
        }
    }
    match wave.failed {
        Some(error) if wave.latencies.is_empty() => Err(error),
        _ => Ok(wave),
    }
}
