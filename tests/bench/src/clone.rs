//! Clones: guests that go on from a snapshot, in carrel's VMM and in Firecracker, side by side.
//!
//! ```text
//!  part ──> template(s), saved once by each VMM ──> rounds, interleaved, or waves, or rooms beside each other ──> rows: carrel, peer, ratio
//! ```
//!
//! Same kernel, initramfs, command line and machine on both sides, and the same sign: a byte on the serial port. What each side may have ready before it is
//! asked is in [`rooms`]. What a whole start through the pool costs, with an image and an agent, is `carrel bench`'s.

mod burst;
mod curves;
mod rooms;
mod template;
mod weight;

use std::cell::Cell;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::engine::Machine;
use crate::{
    Bench, COMMAND_LINE, MORE_RUNS, MOST_RUNS, Metric, RUNS, Sample, Series, WIDE, guest_images, print_table,
    progress, rows, scrub, stage, stats, value, version, whole_pairs, write_json,
};
use rooms::{Bed, Side};
use template::Template;

/// The template that all but the sizes' curve clone, MiB.
const MEMORY_MIB: u32 = 128;
/// Of one machine, for starts that are compared with another VMM's.
const TEMPLATES: usize = 5;

/// What a clone's figures need beyond the other benches'.
#[derive(Args)]
pub(crate) struct Options {
    /// These parts of clone alone [default: all; those of the tiny guest without --kernel]
    #[arg(long, value_enum, value_name = "PART", value_delimiter = ',')]
    parts: Vec<Part>,
    /// A directory for clone's templates, on a disk with room for 2 GiB [default: the temporary one]
    #[arg(long, value_name = "DIR")]
    work: Option<PathBuf>,
    /// Idle clones beside each other that are weighed, and up to how many the curve goes [default: 100, or what memory allows]
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    clones: u32,
    /// Restores at once in a wave
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1000))]
    concurrent: u32,
    /// VMMs that are ready when a wave begins, and again when it ends; the default is what a pool has after a wave
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1000))]
    ready: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Request to first tick of a guest of a few instructions
    Tiny,
    /// Request to first tick of a Linux guest's init, 128 MiB
    Linux,
    /// Memory of idle clones beside each other
    Memory,
    /// Starts a second, many of Linux guests at once
    Burst,
    /// The same with guests of a few instructions
    TinyBurst,
    /// A start's time against the template's size
    Sizes,
    /// A start's time against the rooms that are there
    Rooms,
    /// The same with guests of a few instructions
    TinyRooms,
}

/// What all parts are told.
struct Clones<'a> {
    options: &'a crate::Options,
    bed: Bed,
    /// Firecracker's, as it calls itself.
    version: String,
    /// Where copies are.
    folder: PathBuf,
    /// Where templates are.
    work: PathBuf,
}

/// Measures the parts and prints what came out.
pub(crate) fn run(options: &crate::Options) -> Result<()> {
    // A clone that stays has a handful of descriptors here.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    let folder = tempfile::tempdir()?;
    let binary = stage(&options.carrel_vmm, folder.path(), "carrel-vmm")?;
    let firecracker = stage(&options.firecracker, folder.path(), "firecracker")?;
    let clones = Clones {
        options,
        version: version(&firecracker)?,
        bed: Bed::new(binary, firecracker)?,
        folder: folder.path().to_owned(),
        work: options.clone.work.clone().unwrap_or_else(std::env::temp_dir),
    };
    let mut metrics = Vec::new();
    for part in options.clone.parts(options.kernel.is_some()) {
        eprintln!("part {part:?}");
        match clones.measure(part) {
            Ok(measured) => metrics.extend(measured),
            // What the other parts found is worth having.
            Err(error) => eprintln!("part {part:?} can't be measured: {error:#}"),
        }
        if let Some(path) = &options.json {
            write_json(path, &metrics)?;
        }
    }
    ensure!(!metrics.is_empty(), "nothing has a sample of both sides: see what failed above");
    for same_peer in metrics.chunk_by(|a, b| a.peer.name == b.peer.name) {
        print_table(same_peer);
        println!();
    }
    Ok(())
}

impl Options {
    fn parts(&self, kernel: bool) -> Vec<Part> {
        if !self.parts.is_empty() {
            return self.parts.clone();
        }
        let all = Part::value_variants();
        all.iter()
            .copied()
            .filter(|part| kernel || matches!(part, Part::Tiny | Part::TinyBurst | Part::TinyRooms))
            .collect()
    }
}

impl Clones<'_> {
    fn measure(&self, part: Part) -> Result<Vec<Metric>> {
        match part {
            Part::Tiny => self.latency("tiny guest", &self.templates(&self.tiny()?)?),
            Part::Linux => self.latency("Linux", &self.templates(&self.linux(MEMORY_MIB)?)?),
            Part::Memory => weight::weigh(self),
            Part::Burst => burst::measure(self, "Linux", &self.linux(MEMORY_MIB)?),
            Part::TinyBurst => burst::measure(self, "tiny guest", &self.tiny()?),
            Part::Sizes => curves::sizes(self),
            Part::Rooms => curves::rooms(self, "Linux", &self.linux(MEMORY_MIB)?),
            Part::TinyRooms => curves::rooms(self, "tiny guest", &self.tiny()?),
        }
    }

    /// A guest of a few instructions.
    fn tiny(&self) -> Result<Machine> {
        let kernel = self.folder.join("ticking");
        fs::write(&kernel, guest_images::ticking_kernel())?;
        Ok(machine(kernel, None, MEMORY_MIB))
    }

    /// A Linux guest whose init ticks.
    fn linux(&self, memory_mib: u32) -> Result<Machine> {
        let Some(kernel) = &self.options.kernel else { bail!("--kernel says which guest kernel to boot") };
        let (to, initramfs) = (self.folder.join("vmlinux"), self.folder.join("initramfs"));
        if !to.exists() {
            stage(kernel, &self.folder, "vmlinux")?;
        }
        fs::write(&initramfs, guest_images::initramfs(&guest_images::ticking_init()))?;
        Ok(machine(to, Some(initramfs), memory_mib))
    }

    fn template(&self, machine: &Machine, firecracker: bool) -> Result<Template> {
        let peer = firecracker.then_some(self.bed.firecracker.as_path());
        let template = Template::make(machine, &self.bed.carrel_vmm, peer, &self.work)?;
        let unlearnt = template.unlearnt();
        template.learn(&self.bed).or_else(|error| {
            eprintln!("bench: clones have nothing ahead of their guests here: {error:#}");
            Ok(unlearnt)
        })
    }

    /// Some of one machine, saved by both VMMs: from where a guest happened to be saved it is a tenth or all of the way to its next tick.
    fn templates(&self, machine: &Machine) -> Result<Vec<Template>> {
        (0..TEMPLATES).map(|_| self.template(machine, true)).collect()
    }

    /// Request to first tick, all sides in turn.
    fn latency(&self, guest: &str, templates: &[Template]) -> Result<Vec<Metric>> {
        let unlearnt: Vec<Template> = templates.iter().map(Template::unlearnt).collect();
        let mut series = [
            (Side::Prepared.name(), Side::Prepared, templates),
            (Side::Firecracker.name(), Side::Firecracker, templates),
            (Side::FirecrackerApi.name(), Side::FirecrackerApi, templates),
            ("carrel, prepared, no working set", Side::Prepared, &unlearnt),
            (Side::Carrel.name(), Side::Carrel, templates),
        ]
        .map(|(name, side, templates)| Series::new(name, (side, InTurn::of(templates))));
        self.rounds(&mut series, |(side, templates)| self.one(*side, templates.next()?))?;
        let [prepared, firecracker, api, first, carrel] = series.each_ref();
        Ok([firecracker, api]
            .into_iter()
            .flat_map(|theirs| [prepared, first, carrel].map(|ours| (ours, theirs)))
            .flat_map(|(ours, theirs)| {
                let state =
                    if theirs.side.0 == Side::FirecrackerApi { "its API up" } else { "from its start" };
                self.compare(
                    &format!("request to first tick, {guest}, {}", ours.name.trim_start_matches("carrel, ")),
                    "ms",
                    &format!("{}, {state}", self.version),
                    &ours.samples,
                    &theirs.samples,
                )
            })
            .collect())
    }

    /// One start by itself; ms.
    fn one(&self, side: Side, template: &Template) -> Result<Sample> {
        let ready = self.bed.ready(side, template, &[])?;
        scrub();
        let started = ready.start(template)?;
        Ok(vec![started.took.as_secs_f64() * 1e3])
    }

    /// As many rounds as asked for, or, as long as the ratio of the first two series is wide, some more.
    fn rounds<S>(
        &self,
        series: &mut [Series<S>],
        mut sample: impl FnMut(&S) -> Result<Sample>,
    ) -> Result<()> {
        let warm_ups = self.options.warm_ups;
        let mut rounds = warm_ups + self.options.runs.unwrap_or(RUNS);
        let mut round = 0;
        while round < rounds {
            let sides = series.len().max(1);
            for turn in 0..sides {
                // Another side begins each time: what one leaves to be done meets the next.
                let at = (usize::try_from(round)? + turn) % sides;
                let one = series.get_mut(at).context("a round has as many turns as sides")?;
                one.take(round + 1, round >= warm_ups, &mut sample);
            }
            round += 1;
            if round == rounds
                && self.options.runs.is_none()
                && round < warm_ups + MOST_RUNS
                && is_wide(series)
            {
                rounds += MORE_RUNS;
            }
            progress(round, rounds);
        }
        series.iter().for_each(Series::tell_failures);
        Ok(())
    }

    /// A row, unless no round has both.
    fn compare(
        &self,
        metric: &str,
        unit: &'static str,
        peer: &str,
        ours: &[Sample],
        theirs: &[Sample],
    ) -> Vec<Metric> {
        let mut made = rows(Bench::Clone, &[("", unit)], peer, ours, theirs, "");
        for row in &mut made {
            metric.clone_into(&mut row.metric);
        }
        made
    }
}

fn machine(kernel: PathBuf, initramfs: Option<PathBuf>, memory_mib: u32) -> Machine {
    Machine {
        kernel,
        initramfs,
        command_line: COMMAND_LINE.into(),
        memory_mib,
        vcpus: 1,
        vsock: false,
        disks: Vec::new(),
    }
}

fn is_wide<S>(series: &[Series<S>]) -> bool {
    let [ours, theirs, ..] = series else { return false };
    let first = |series: &Series<S>| series.samples.iter().map(|sample| value(sample, 0)).collect::<Vec<_>>();
    let (ours, theirs) = whole_pairs(&first(ours), &first(theirs));
    if ours.is_empty() {
        return true;
    }
    let ratio = stats::ratio(&ours, &theirs);
    ratio.ratio_high - ratio.ratio_low > WIDE * ratio.ratio
}

/// Templates, of which each start takes the next.
struct InTurn<'a> {
    of: &'a [Template],
    taken: Cell<usize>,
}

impl<'a> InTurn<'a> {
    fn of(templates: &'a [Template]) -> Self {
        Self { of: templates, taken: Cell::new(0) }
    }

    fn next(&self) -> Result<&'a Template> {
        let at = self.taken.replace(self.taken.get() + 1);
        self.of.get(at % self.of.len().max(1)).context("there is no template")
    }
}

/// Samples of one value each.
fn single(values: impl IntoIterator<Item = f64>) -> Vec<Sample> {
    values.into_iter().map(|value| vec![value]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_kernel_there_is_but_the_tiny_guest() {
        let mut options = Options { parts: Vec::new(), work: None, clones: 100, concurrent: 64, ready: 64 };
        assert_eq!(options.parts(false), [Part::Tiny, Part::TinyBurst, Part::TinyRooms]);
        assert_eq!(options.parts(true).len(), Part::value_variants().len());
        options.parts = vec![Part::Rooms];
        assert_eq!(options.parts(false), [Part::Rooms]);
    }

    #[test]
    fn a_ratio_without_samples_or_with_a_spread_is_wide() {
        let of = |samples: &[f64]| {
            let mut series = Series::new("a", ());
            series.samples = single(samples.iter().copied());
            series
        };
        assert!(is_wide(&[of(&[]), of(&[])]));
        assert!(is_wide(&[of(&[1.0, 9.0, 2.0]), of(&[1.0, 1.0, 1.0])]));
        assert!(!is_wide(&[of(&[2.0, 2.0, 2.0]), of(&[4.0, 4.0, 4.0])]));
    }
}
