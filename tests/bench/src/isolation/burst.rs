//! Many starts at once: each one's latency, and how many a second come through.

use std::collections::BTreeMap;
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
    let mut taken = Taken::default();
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
                turn(bench, level, subject, &mut taken);
            }
        }
    }
    progress_end();
}

/// What a room of a subject took of the host in the waves before, MiB.
#[derive(Default)]
struct Taken(BTreeMap<Subject, u64>);

impl Taken {
    /// What so many may take: by what fewer took, half of it again for those that go further before the last begins; without any, what a room may take at all.
    fn by(&self, level: u32, subject: Subject) -> u64 {
        let most = subject.room_mib();
        let each = self.0.get(&subject).map_or(most, |taken| most.min(taken + taken.div_ceil(2)));
        u64::from(level) * each
    }

    /// `all` by so many. Of a few the host's figure says little.
    fn note(&mut self, level: u32, subject: Subject, all: u64) {
        const TELLING: u32 = 4;
        if level >= TELLING {
            let each = all.div_ceil(u64::from(level));
            self.0.entry(subject).and_modify(|most| *most = each.max(*most)).or_insert(each);
        }
    }
}

/// One wave of one subject, if the host has the memory for it.
fn turn(bench: &mut Bench<'_>, level: u32, subject: Subject, taken: &mut Taken) {
    let metrics = bench.metrics(GROUP);
    if bench.results.is_skipped(&metrics, level, subject) {
        return;
    }
    let wanted = taken.by(level, subject) + RESERVE_MIB;
    let available = available_mib().unwrap_or(0);
    if wanted > available {
        let reason = format!("{level} rooms may take {wanted} MiB, and this host has {available} MiB left");
        bench.results.skip(&metrics, Some(level), subject, reason);
        return;
    }
    match wave(bench, level, subject) {
        Err(error) => bench.note_failure(GROUP, Some(level), subject, &error),
        Ok(Wave { latencies, whole, left, failed }) => {
            taken.note(level, subject, available.saturating_sub(left));
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
    /// What the host had left while all were there, MiB.
    left: u64,
    /// The first failure among the others.
    failed: Option<anyhow::Error>,
}

/// Starts so many at once. All are prepared first, and all are there until the last has said its word: none ends in the others' time.
fn wave(bench: &Bench<'_>, level: u32, subject: Subject) -> Result<Wave> {
    let plans = (0..level).map(|_| plan(bench.stage, subject, Work::Stay)).collect::<Result<Vec<_>>>()?;
    let gate = Barrier::new(plans.len() + 1);
    let patience = bench.patience(level);
    let started: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = plans
            .into_iter()
            .map(|plan| {
                let (gate, patience) = (&gate, &patience);
                scope.spawn(move || {
                    gate.wait();
                    let started = plan.start(Work::Stay.expect(), patience);
                    (started, Instant::now())
                })
            })
            .collect();
        let began = Instant::now();
        gate.wait();
        threads.into_iter().filter_map(|thread| thread.join().ok()).map(|(s, at)| (s, at - began)).collect()
    });
    let left = available_mib().unwrap_or(0);
    let mut wave = Wave { latencies: Vec::new(), whole: Duration::ZERO, left, failed: None };
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fewer_took_says_what_more_will_take_and_never_more_than_a_room_may() {
        let mut taken = Taken::default();
        let most = Subject::CarrelPool.room_mib();
        assert_eq!(taken.by(64, Subject::CarrelPool), 64 * most);
        taken.note(1, Subject::CarrelPool, 1);
        assert_eq!(taken.by(64, Subject::CarrelPool), 64 * most, "one room's figure is noise");
        taken.note(8, Subject::CarrelPool, 8 * 20 - 3);
        taken.note(8, Subject::CarrelPool, 8 * 12);
        assert_eq!(taken.by(64, Subject::CarrelPool), 64 * 30);
        taken.note(8, Subject::CarrelPool, 8 * most);
        assert_eq!(taken.by(64, Subject::CarrelPool), 64 * most);
        assert_eq!(taken.by(2, Subject::Firecracker), 2 * Subject::Firecracker.room_mib());
    }
}
