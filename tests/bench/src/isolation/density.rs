//! Idle rooms beside each other: what each takes of the host, and how long one more start takes.

use std::time::Duration;

use anyhow::Result;

use super::measure::{Bench, progress, progress_end};
use super::metrics::Group;
use super::plans::{Work, plan};
use super::room::{Expect, Room};
use super::stage::available_mib;
use super::subjects::Subject;
use crate::meter;

const GROUP: Group = Group::Density;
/// Its figure can come out as none: MemAvailable counts what the page cache would give back.
const HOST: &str = "density-host";
/// Host memory that is left alone, MiB.
const RESERVE_MIB: u64 = 512;
/// What was just started comes to rest, and the kernel brings its cgroups' statistics up to date, which it does every 2 s (`FLUSH_TIME` in mm/memcontrol.c): before that a small one
/// may read as 0.
const REST: Duration = Duration::from_secs(5);

/// All subjects, each up to its last level.
pub(crate) fn climb(bench: &mut Bench<'_>) {
    for subject in bench.subjects(GROUP) {
        let (mut rooms, mut weighed) = (Vec::new(), 0);
        // One of each beforehand: what is made once for all rooms is not the first one's.
        drop(one(bench, subject));
        if wants_starts(bench) {
            drop(bench.start(subject, Work::True, 1));
        }
        let before = available_kib();
        for level in bench.amount.densities.clone() {
            if bench.is_interrupted() {
                break;
            }
            let metrics = bench.metrics(GROUP);
            if let Some(reason) = grow(bench, subject, level, &mut rooms) {
                bench.results.skip(&metrics, Some(level), subject, reason);
            }
            let there = u32::try_from(rooms.len()).unwrap_or(u32::MAX);
            if there == weighed || bench.is_interrupted() {
                break;
            }
            std::thread::sleep(REST);
            weighed = there;
            if let Err(error) = weigh(bench, subject, there, &rooms, before) {
                bench.note_failure(GROUP, Some(there), subject, &error);
                break;
            }
            if there < level {
                break;
            }
        }
        progress(GROUP, &format!("{}, ending {}", subject.name(), rooms.len()));
    }
    progress_end();
}

/// Starts rooms until there are `level`; or says what stands in the way.
fn grow(bench: &mut Bench<'_>, subject: Subject, level: u32, rooms: &mut Vec<Room>) -> Option<String> {
    let wanted = usize::try_from(level).unwrap_or(usize::MAX);
    while rooms.len() < wanted {
        if bench.is_interrupted() {
            return Some("interrupted".into());
        }
        let (there, available) = (rooms.len(), available_mib().unwrap_or(0));
        progress(GROUP, &format!("{}, {} of {level}", subject.name(), there + 1));
        if available < RESERVE_MIB + subject.room_mib() {
            return Some(format!("capped at {there} rooms: this host has {available} MiB left"));
        }
        match one(bench, subject) {
            Ok(room) => {
                bench.note_success(GROUP, subject);
                rooms.push(room);
            }
            Err(error) => {
                bench.note_failure(GROUP, Some(level), subject, &error);
                if !bench.subjects(GROUP).contains(&subject) {
                    return Some(format!("capped at {there} rooms: no further one came up: {error:#}"));
                }
            }
        }
    }
    None
}

/// An idle room.
fn one(bench: &Bench<'_>, subject: Subject) -> Result<Room> {
    // A detached carrel room is there when its command has ended.
    let expect = if subject.is_carrel() { Expect::End } else { Work::Idle.expect() };
    Ok(plan(bench.stage, subject, Work::Idle)?.start(expect, &bench.patience(1))?.room)
}

/// Measures the rooms that are there.
fn weigh(bench: &mut Bench<'_>, subject: Subject, level: u32, rooms: &[Room], before: f64) -> Result<()> {
    let (mut pss, mut kernel) = (Vec::new(), Vec::new());
    let parents = meter::parents();
    for room in rooms {
        let processes = room.cgroup().processes(&parents);
        pss.push(number(meter::whole_pss_kib(&processes)?));
        kernel.push(number(room.cgroup().kernel_kib(&processes)?));
    }
    let host = (before - available_kib()) / f64::from(level);
    let starts = if wants_starts(bench) { starts(bench, subject)? } else { Vec::new() };
    for metric in bench.metrics(GROUP) {
        if metric.name == HOST && host <= 0.0 {
            let reason = "the host's page cache gave back more than the rooms took".to_owned();
            bench.results.skip(&[metric], Some(level), subject, reason);
            continue;
        }
        let samples = match metric.name {
            "density-pss" => &pss[..],
            "density-kernel" => &kernel[..],
            "density-start" => &starts[..],
            HOST => &[host][..],
            _ => &[][..],
        };
        bench.results.add(metric, Some(level), subject, samples);
    }
    Ok(())
}

fn wants_starts(bench: &Bench<'_>) -> bool {
    bench.metrics(GROUP).iter().any(|metric| metric.name == "density-start")
}

/// One after the other, ms each.
fn starts(bench: &Bench<'_>, subject: Subject) -> Result<Vec<f64>> {
    let one = |_| Ok(bench.start(subject, Work::True, 1)?.took.as_secs_f64() * 1e3);
    (0..bench.amount.runs).map(one).collect()
}

fn available_kib() -> f64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    meter::field(&text, "MemAvailable:").map_or(f64::NAN, number)
}

fn number(kib: u64) -> f64 {
    u32::try_from(kib).map_or(f64::NAN, f64::from)
}
