//! What a prepared VMM's start depends on, or should not: the template's size, and the rooms that are there already.

use std::time::Duration;

use anyhow::{Context, Result};

use super::rooms::{Room, Side};
use super::{Clones, MEMORY_MIB, Template};
use crate::engine::Machine;
use crate::isolation::stage::available_mib;
use crate::{Metric, Series};

/// Sizes of templates, MiB; the first is what the others are compared with.
const SIZES: [(&str, u32); 5] =
    [("64 MiB", 64), ("128 MiB", 128), ("256 MiB", 256), ("512 MiB", 512), ("1024 MiB", 1024)];
/// Rooms that are there, as far as `--clones` goes.
const LEVELS: [u32; 7] = [10, 50, 100, 500, 1000, 2000, 4000];
/// How long idle rooms are watched.
const WATCHED: Duration = Duration::from_secs(5);
/// Host memory that is left alone, MiB.
const RESERVE_MIB: u64 = 512;

/// Request to first tick against the template's size, all sizes in turn.
pub(super) fn sizes(clones: &Clones<'_>) -> Result<Vec<Metric>> {
    let mut series = Vec::new();
    for (name, size) in SIZES {
        let template = clones.template(&clones.linux(size)?, false)?;
        series.push(Series::new(name, template));
    }
    clones.rounds(&mut series, |template| clones.one(Side::Prepared, template))?;
    let Some((first, others)) = series.split_first() else { return Ok(Vec::new()) };
    let peer = format!("carrel, a template of {}", first.name);
    let rows = others.iter().flat_map(|series| {
        let metric = format!("request to first tick, Linux, prepared, a template of {}", series.name);
        clones.compare(&metric, "ms", &peer, &series.samples, &first.samples)
    });
    Ok(rows.collect())
}

/// Request to first tick against the rooms that are there, level by level. Idle guests of a few instructions take no time of their own; Linux ones have timers.
pub(super) fn rooms(clones: &Clones<'_>, guest: &str, machine: &Machine) -> Result<Vec<Metric>> {
    let template = clones.template(machine, false)?;
    let none = level(clones, &template)?;
    let mut there: Vec<Room> = Vec::new();
    let mut metrics = Vec::new();
    let before = available_mib()?;
    let most = clones.options.clone.clones;
    for rooms in LEVELS.into_iter().filter(|level| *level <= most) {
        while there.len() < usize::try_from(rooms)? {
            if available_mib()? < RESERVE_MIB + u64::from(MEMORY_MIB) {
                eprintln!("rooms: there is memory for {} of {rooms}", there.len());
                return Ok(metrics);
            }
            there.push(clones.bed.ready(Side::Prepared, &template, &[])?.start(&template)?.room);
        }
        std::thread::sleep(super::weight::REST);
        let taken = before.saturating_sub(available_mib()?) * 1024 / u64::from(rooms);
        let busy = busy(WATCHED)?;
        eprintln!(
            "rooms: {rooms} are there; the host has {taken} KiB less for each, and its CPUs are busy for {busy:.1} % of the time while nothing is asked"
        );
        let measured = level(clones, &template)?;
        let metric = format!("request to first tick, {guest}, prepared, beside {rooms} rooms");
        metrics.extend(clones.compare(
            &metric,
            "ms",
            "carrel, no room there",
            &measured.samples,
            &none.samples,
        ));
    }
    Ok(metrics)
}

/// Which part of their time the host's CPUs are busy, in the next moments, % (proc(5), `/proc/stat`).
fn busy(watched: Duration) -> Result<f64> {
    let before = times()?;
    std::thread::sleep(watched);
    let after = times()?;
    let [all, idle] = [after.0 - before.0, after.1 - before.1];
    Ok(100.0 * (all - idle) / all)
}

/// All time of all CPUs, and what of it they were idle, ticks.
fn times() -> Result<(f64, f64)> {
    let text = std::fs::read_to_string("/proc/stat")?;
    let line = text.lines().next().and_then(|line| line.strip_prefix("cpu ")).context("/proc/stat is odd")?;
    // What a guest took is in user and nice already.
    let fields: Vec<f64> = line.split_whitespace().take(8).filter_map(|word| word.parse().ok()).collect();
    let idle: f64 = fields.iter().skip(3).take(2).sum();
    Ok((fields.iter().sum(), idle))
}

fn level(clones: &Clones<'_>, template: &Template) -> Result<Series<Side>> {
    let mut series = [Series::new(Side::Prepared.name(), Side::Prepared)];
    clones.rounds(&mut series, |&side| clones.one(side, template))?;
    let [series] = series;
    Ok(series)
}
