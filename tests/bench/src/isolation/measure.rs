//! Carries out a group of metrics: rounds in which every subject has its turn, or levels that climb as far as the host's memory goes.
//!
//! ```text
//!  rounds:   warm-ups, then runs; in each every subject once, another one first each time, on memory that was just written
//!  bursts:   for each level, waves; in each every subject once
//!  density:  each subject by itself, up the levels (memory does not jitter)
//!  surface:  each subject once (counts)
//! ```

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::metrics::{Group, METRICS, Metric, named};
use super::plans::{Work, bare, plan, tiny};
use super::results::Results;
use super::room::{Expect, Patience, Plan, Started};
use super::stage::Stage;
use super::subjects::Subject;
use super::surface::SourceFolders;
use super::{burst, density, surface};
use crate::engine::try_connect;
use crate::vsock;

/// So many failures in a row, and a subject is left out of a group: what hangs would cost a deadline in each round.
const GIVE_UP: u32 = 3;

/// How much is done.
#[derive(Clone, Debug)]
pub(crate) struct Amount {
    /// Counted rounds.
    pub(crate) runs: u32,
    /// Rounds before.
    pub(crate) warm_ups: u32,
    /// Starts at once.
    pub(crate) bursts: Vec<u32>,
    /// Idle rooms at once.
    pub(crate) densities: Vec<u32>,
    /// How long anything may take.
    pub(crate) deadline: Duration,
}

/// A bench under way.
pub(crate) struct Bench<'a> {
    pub(crate) stage: &'a Stage,
    pub(crate) amount: &'a Amount,
    pub(crate) chosen: &'a [&'static Metric],
    pub(crate) sources: &'a SourceFolders,
    pub(crate) results: Results,
    /// Failures in a row, for each group and subject.
    failures: BTreeMap<(Group, Subject), u32>,
    /// What is started now isn't counted.
    warming_up: bool,
}

impl<'a> Bench<'a> {
    /// Nothing done yet.
    pub(crate) fn new(
        stage: &'a Stage,
        amount: &'a Amount,
        chosen: &'a [&'static Metric],
        sources: &'a SourceFolders,
        results: Results,
    ) -> Self {
        Self { stage, amount, chosen, sources, results, failures: BTreeMap::new(), warming_up: false }
    }

    /// Everything that was chosen, group by group. Returns early when interrupted, with what there is.
    pub(crate) fn run(&mut self) {
        let mut groups: Vec<Group> = self.chosen.iter().map(|metric| metric.group).collect();
        groups.sort_unstable();
        groups.dedup();
        for group in groups {
            match group {
                Group::Instruction
                | Group::True
                | Group::Python
                | Group::Imports
                | Group::Inside
                | Group::Vsock => self.rounds(group),
                Group::Burst => burst::climb(self),
                Group::Density => density::climb(self),
                Group::Surface => surface::count(self),
            }
        }
    }

    /// Whether to stop.
    pub(crate) fn is_interrupted(&self) -> bool {
        self.stage.interrupted.load(Ordering::Relaxed)
    }

    /// The chosen metrics of a group.
    pub(crate) fn metrics(&self, group: Group) -> Vec<&'static Metric> {
        self.chosen.iter().copied().filter(|metric| metric.group == group).collect()
    }

    /// Who is there and has not been given up, of those for whom a group has a meaning.
    pub(crate) fn subjects(&self, group: Group) -> Vec<Subject> {
        let metrics = self.metrics(group);
        let there = self.stage.present.keys().copied();
        there
            .filter(|subject| metrics.iter().any(|metric| metric.subjects.contains(subject)))
            .filter(|subject| self.failures.get(&(group, *subject)).is_none_or(|&failed| failed < GIVE_UP))
            .collect()
    }

    /// The deadline, from now on, of so many things at once.
    pub(crate) fn patience(&self, at_once: u32) -> Patience {
        if self.warming_up {
            // The first may make a template: a boot, an unpacking, the workload's own way to where it is ready, and the saving.
            return Patience::new(self.amount.deadline * 10, &self.stage.interrupted);
        }
        // They take turns on the host's CPUs.
        let share = self.amount.deadline / 8 * at_once.saturating_sub(1);
        Patience::new(self.amount.deadline + share, &self.stage.interrupted)
    }

    /// Keeps count of a failure, says it, and gives up after some in a row.
    pub(crate) fn note_failure(
        &mut self,
        group: Group,
        level: Option<u32>,
        subject: Subject,
        error: &anyhow::Error,
    ) {
        if self.is_interrupted() {
            return;
        }
        progress_end();
        eprintln!("bench: {}: {error:#}", subject.name());
        let metrics = self.metrics(group);
        for metric in &metrics {
            self.results.failed(metric, level, subject);
        }
        let failures = self.failures.entry((group, subject)).or_default();
        *failures += 1;
        if *failures == GIVE_UP {
            let reason = format!("failed {GIVE_UP} times in a row, at last: {error:#}");
            self.results.skip(&metrics, level, subject, reason);
        }
    }

    /// A success ends a row of failures.
    pub(crate) fn note_success(&mut self, group: Group, subject: Subject) {
        self.failures.remove(&(group, subject));
    }

    fn rounds(&mut self, group: Group) {
        let rounds = self.amount.warm_ups + self.amount.runs;
        for round in 0..rounds {
            let mut subjects = self.subjects(group);
            // Another one begins each time: what one leaves to be done meets another.
            let first = usize::try_from(round).unwrap_or(0) % subjects.len().max(1);
            subjects.rotate_left(first);
            for subject in subjects {
                if self.is_interrupted() {
                    return;
                }
                progress(group, &format!("round {} of {rounds}, {}", round + 1, subject.name()));
                crate::scrub();
                self.warming_up = round < self.amount.warm_ups;
                match self.sample(group, subject) {
                    Ok(values) => {
                        self.note_success(group, subject);
                        let counted = if self.warming_up { &[][..] } else { &values };
                        for &(name, value) in counted {
                            if let Some(metric) = self.chosen.iter().find(|metric| metric.name == name) {
                                self.results.add(metric, None, subject, &[value]);
                            }
                        }
                    }
                    Err(error) => self.note_failure(group, None, subject, &error),
                }
            }
        }
        self.warming_up = false;
        progress_end();
    }

    /// One turn of one subject.
    fn sample(&self, group: Group, subject: Subject) -> Result<Vec<(&'static str, f64)>> {
        let ms = |started: &Started| started.took.as_secs_f64() * 1e3;
        match group {
            Group::Instruction => {
                let started = tiny(self.stage, subject)?.start(Expect::Ready, &self.patience(1))?;
                Ok(vec![("first-instruction", ms(&started))])
            }
            Group::True => {
                let started = self.start(subject, Work::True, 1)?;
                Ok(vec![("start-true", ms(&started))])
            }
            Group::Python => {
                let started = self.start(subject, Work::Python, 1)?;
                Ok(vec![("start-python", ms(&started))])
            }
            Group::Imports => {
                let started = self.start(subject, Work::Imports, 1)?;
                Ok(vec![("start-imports", ms(&started))])
            }
            Group::Inside => inside(&self.start(subject, Work::Inside, 1)?.said),
            Group::Vsock => {
                let plan: Plan = bare(self.stage, subject, Work::Serve)?;
                let patience = self.patience(1);
                let room = plan.start(Expect::Ready, &patience)?.room;
                let connect = || {
                    loop {
                        match try_connect(&room.folder().join("vsock"), vsock::PORT) {
                            Ok(stream) => return Ok(stream),
                            Err(error) if patience.check().is_err() => return Err(error),
                            Err(_) => std::thread::sleep(Duration::from_millis(20)),
                        }
                    }
                };
                Ok(vec![
                    ("vsock-in", vsock::into_guest(connect()?)?),
                    ("vsock-out", vsock::out_of_guest(connect()?)?),
                    ("vsock-round-trip", vsock::round_trip(connect()?)?),
                ])
            }
            Group::Burst | Group::Density | Group::Surface => unreachable_group(group),
        }
    }

    /// Starts one room, and returns it when it has said what it should.
    pub(crate) fn start(&self, subject: Subject, work: Work, at_once: u32) -> Result<Started> {
        plan(self.stage, subject, work)?.start(work.expect(), &self.patience(at_once))
    }
}

/// Groups with a measurement of their own have no turn in rounds.
fn unreachable_group(group: Group) -> Result<Vec<(&'static str, f64)>> {
    anyhow::bail!("{group:?} is not measured in rounds")
}

/// What a room measured from inside: `name value` lines among whatever else its console says.
fn inside(said: &[u8]) -> Result<Vec<(&'static str, f64)>> {
    let text = String::from_utf8_lossy(said);
    let mut values = Vec::new();
    for line in text.lines() {
        let Some((name, value)) = line.trim().split_once(' ') else { continue };
        let metric = named(name).filter(|metric| metric.group == Group::Inside);
        if let (Some(metric), Ok(value)) = (metric, value.parse()) {
            values.push((metric.name, value));
        }
    }
    ensure!(!values.is_empty(), "the room measured nothing, but said: {text:?}");
    Ok(values)
}

/// Says on a terminal what is being done now.
pub(crate) fn progress(group: Group, what: &str) {
    let mut to = std::io::stderr();
    if to.is_terminal() {
        let titles: Vec<&str> =
            METRICS.iter().filter(|metric| metric.group == group).map(|metric| metric.name).collect();
        let title = titles.first().copied().unwrap_or_default();
        // Progress is a courtesy: what can't be shown is not shown.
        let _ = write!(to, "\r\x1b[K{title}: {what}");
        let _ = to.flush();
    }
}

/// The line of progress has had its time.
pub(crate) fn progress_end() {
    let mut to = std::io::stderr();
    if to.is_terminal() {
        let _ = write!(to, "\r\x1b[K");
        let _ = to.flush();
    }
}

/// A chosen metric by name, or why not.
pub(crate) fn wanted(name: &str) -> Result<&'static Metric> {
    named(name).with_context(|| {
        let names: Vec<&str> = METRICS.iter().map(|metric| metric.name).collect();
        format!("there is no metric '{name}', just {}", names.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rooms_lines_are_found_among_its_consoles() {
        let said = b"[    0.1] clocksource: x 1\r\ncpu 12.5\r\nsyscalls 300\r\nmemory much\r\n\xa5";
        assert_eq!(inside(said).unwrap(), [("cpu", 12.5), ("syscalls", 300.0)]);
        assert!(inside(b"start-true 1\n").is_err(), "no measurement from inside");
    }

    #[test]
    fn a_wrong_name_is_told_the_right_ones() {
        assert!(wanted("start").unwrap_err().to_string().contains("start-true"));
    }
}
