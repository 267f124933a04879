//! Measures carrel's VMM and Firecracker side by side, in one run, interleaved.
//!
//! ```text
//!  case ──> for each round: carrel, firecracker, (carrel unconfined) ──> samples ──> medians, ratio, interval ──> table, JSON
//!                                 └─ failed: once more ─ failed again: missing, counted by side
//! ```
//!
//! Both sides boot the same kernel, initramfs, command line and machine (`shipped`: each the kernel and command line that its own project recommends), and say that they
//! are ready by the same byte on the same serial port. Firecracker runs as it comes: without its jailer and, in builds for gnu targets, without a seccomp filter. carrel runs as
//! it comes: confined. A second carrel, `--unconfined`, shows what that costs.

mod clone;
mod engine;
mod guest_images;
mod isolation;
mod meter;
mod prompt;
mod stats;
mod vsock;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use serde::Serialize;

use engine::{Engine, Machine, Running};
use stats::Summary;

/// Counted rounds, if nobody says how many; by how many more while the interval is wide; how many at most.
const RUNS: u32 = 20;
const MORE_RUNS: u32 = 10;
const MOST_RUNS: u32 = 60;
/// An interval is wide above this part of its ratio.
const WIDE: f64 = 0.15;
/// Starts under strace.
const COUNTED_STARTS: u32 = 3;

/// Command line that both sides get: a serial console that only init writes to.
const COMMAND_LINE: &str = "console=ttyS0 quiet reboot=t panic=-1";
/// Firecracker's docs/getting-started.md, and what spares it the console's time: its kernel says nothing.
const PEER_COMMAND_LINE: &str = "console=ttyS0 reboot=k panic=1 quiet loglevel=1";

#[derive(Parser)]
#[command(
    version,
    about,
    after_help = "Examples:\n  scripts/bench boot\n  scripts/bench tiny --runs 50 --json tiny.json\n  scripts/bench vsock --firecracker /usr/local/bin/firecracker"
)]
struct Options {
    /// What to measure
    #[arg(value_enum)]
    bench: Bench,
    /// Counted rounds; each measures every side once [default: 20, and up to 60 while the interval is wide]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: Option<u32>,
    /// Rounds before, not counted
    #[arg(long, default_value_t = 3)]
    warm_ups: u32,
    /// The carrel-vmm to measure
    #[arg(long, value_name = "PATH", env = "CARREL_VMM")]
    carrel_vmm: PathBuf,
    /// The Firecracker to measure against
    #[arg(long, value_name = "PATH", env = "FIRECRACKER")]
    firecracker: PathBuf,
    /// The guest kernel, an ELF vmlinux [not for tiny and memory]
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,
    /// The kernel that Firecracker's project recommends, an ELF vmlinux [shipped only]
    #[arg(long, value_name = "PATH")]
    peer_kernel: Option<PathBuf>,
    /// The command line for it [shipped only]
    #[arg(long, value_name = "WORDS", default_value = PEER_COMMAND_LINE)]
    peer_command_line: String,
    /// The vsock guest's /init (carrel-bench-guest, static) [vsock only]
    #[arg(long, value_name = "PATH")]
    guest: Option<PathBuf>,
    /// Write one JSON object a metric per line
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(flatten)]
    clone: clone::Options,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Bench {
    /// Process start to the first output of a three-instruction guest: the VMM's own share of a start
    Tiny,
    /// Process start to /init of a Linux guest, 128 MiB, 1 vCPU
    Boot,
    /// The same as each ships: with the kernel configuration and the command line that its own project recommends
    Shipped,
    /// The VMM's own memory with the three-instruction guest: PSS without guest memory, and kernel memory of its cgroup
    Memory,
    /// 256 MiB into the guest, out of it, and single bytes there and back
    Vsock,
    /// Guests that go on from a snapshot: request to first tick, memory, starts a second, and what a start's time depends on
    Clone,
}

/// One line of the result.
#[derive(Serialize)]
struct Metric {
    bench: Bench,
    metric: String,
    unit: &'static str,
    runs: usize,
    carrel: Summary,
    peer: Peer,
    #[serde(flatten)]
    ratio: stats::Ratio,
}

#[derive(Serialize)]
struct Peer {
    name: String,
    #[serde(flatten)]
    summary: Summary,
}

/// One side and what its rounds gave, a sample each: sides are compared round by round.
struct Series<S = Engine> {
    name: &'static str,
    side: S,
    samples: Vec<Sample>,
    /// Attempts that failed, and rounds that are missing for it.
    failed: u32,
    missing: u32,
}

impl<S> Series<S> {
    fn new(name: &'static str, side: S) -> Self {
        Self { name, side, samples: Vec::new(), failed: 0, missing: 0 }
    }

    /// Takes a round's sample, in a second attempt if the first fails. What is missing then throws away nothing of the others.
    fn take(&mut self, round: u32, counted: bool, mut sample: impl FnMut(&S) -> Result<Sample>) {
        let mut attempt = || {
            sample(&self.side).inspect_err(|error| {
                self.failed += 1;
                eprintln!("\nround {round} of {} failed: {error:#}", self.name);
            })
        };
        let taken = attempt().or_else(|_| attempt());
        if counted {
            self.missing += u32::from(taken.is_err());
            self.samples.push(taken.unwrap_or_default());
        }
    }

    fn tell_failures(&self) {
        if self.failed > 0 {
            let (name, rounds) = (self.name, self.samples.len());
            eprintln!(
                "{name}: {} attempts failed; {} of {rounds} rounds are missing",
                self.failed, self.missing
            );
        }
    }
}

/// What one start of one side gave: values in the order of its bench's metrics; a missing one is NaN, or not there.
type Sample = Vec<f64>;

fn value(sample: &Sample, i: usize) -> f64 {
    sample.get(i).copied().unwrap_or(f64::NAN)
}

/// The values of those rounds that have one of both sides.
fn whole_pairs(ours: &[f64], theirs: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let pairs = ours.iter().copied().zip(theirs.iter().copied());
    pairs.filter(|(ours, theirs)| ours.is_finite() && theirs.is_finite()).unzip()
}

fn main() -> ExitCode {
    // One line, as `carrel`'s own, for `carrel bench` is this program.
    carried_out().map_or_else(
        |error| {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        },
        |()| ExitCode::SUCCESS,
    )
}

fn carried_out() -> Result<()> {
    // What `carrel bench` asks for; the rest of this file is about the VMM alone.
    let mut words = std::env::args_os();
    let program = words.next().unwrap_or_default();
    if words.next().is_some_and(|word| word == isolation::COMMAND) {
        return isolation::run(std::iter::once(program).chain(words));
    }
    let options = Options::parse();
    if options.bench == Bench::Clone {
        return clone::run(&options);
    }
    let folder = tempfile::tempdir()?;
    let machines = machines(&options, folder.path())?;
    let binary = stage(&options.carrel_vmm, folder.path(), "carrel-vmm")?;
    let confined = Engine::Carrel { binary: binary.clone(), arguments: Vec::new() };
    let unconfined = Engine::Carrel { binary, arguments: vec!["--unconfined".into()] };
    let peer = Engine::Firecracker { binary: stage(&options.firecracker, folder.path(), "firecracker")? };
    let sides = [confined, peer, unconfined];

    let mut series = sides.map(|side| Series::new(side.name(), side));
    let mut turns: Vec<&mut Series> = series.iter_mut().collect();
    let mut round = 0;
    let mut rounds = options.warm_ups + options.runs.unwrap_or(RUNS);
    while round < rounds {
        for series in &mut turns {
            series.take(round + 1, round >= options.warm_ups, |side| {
                scrub();
                sample(options.bench, side, machines.of(side))
            });
        }
        // Another side begins: what one leaves to be done meets the next.
        turns.rotate_left(1);
        round += 1;
        if round == rounds
            && options.runs.is_none()
            && round < options.warm_ups + MOST_RUNS
            && is_wide(&turns)
        {
            rounds += MORE_RUNS;
        }
        progress(round, rounds);
    }
    drop(turns);
    series.iter().for_each(Series::tell_failures);
    let [confined, theirs, unconfined] = series.each_ref().map(|series| &series.samples[..]);
    let peer_version = version(&options.firecracker)?;
    let mut metrics = compare(options.bench, &peer_version, confined, theirs, "");
    metrics.extend(compare(options.bench, &peer_version, unconfined, theirs, "unconfined"));
    if matches!(options.bench, Bench::Tiny | Bench::Boot | Bench::Shipped) {
        metrics.extend(system_calls(options.bench, &series, &machines, &peer_version));
    }
    ensure!(!metrics.is_empty(), "no round has a sample of both sides: see what failed above");
    print_table(&metrics);
    if let Some(path) = &options.json {
        write_json(path, &metrics)?;
    }
    Ok(())
}

/// Memory for two guests, written and given back: it is what the next VMM gets. Without that the first touch of a page that held the last guest's code
/// would be counted as the VMM's: an emulated host then has its translations to throw away, at up to 200 ms a boot.
pub(crate) fn scrub() {
    drop(std::hint::black_box(vec![1_u8; 256 << 20]));
}

/// Whether the interval of the aim's own metric says little yet.
fn is_wide(turns: &[&mut Series]) -> bool {
    let first = |wanted: fn(&Engine) -> bool| -> Vec<f64> {
        let series = turns.iter().find(|series| wanted(&series.side));
        series.into_iter().flat_map(|series| &series.samples).map(|sample| value(sample, 0)).collect()
    };
    let ours = first(|side| matches!(side, Engine::Carrel { arguments, .. } if arguments.is_empty()));
    let theirs = first(|side| matches!(side, Engine::Firecracker { .. }));
    let (ours, theirs) = whole_pairs(&ours, &theirs);
    // Without a pair it says nothing at all.
    if ours.is_empty() {
        return true;
    }
    let ratio = stats::ratio(&ours, &theirs);
    ratio.ratio_high - ratio.ratio_low > WIDE * ratio.ratio
}

/// A copy beside everything else that is measured: read over a shared file system, a kernel takes longer than its boot.
fn stage(from: &Path, folder: &Path, name: &str) -> Result<PathBuf> {
    let to = folder.join(name);
    fs::copy(from, &to).with_context(|| format!("{} can't be copied", from.display()))?;
    Ok(to)
}

/// What each side boots.
struct Machines {
    ours: Machine,
    theirs: Machine,
}

impl Machines {
    fn of(&self, side: &Engine) -> &Machine {
        match side {
            Engine::Carrel { .. } => &self.ours,
            Engine::Firecracker { .. } => &self.theirs,
        }
    }
}

/// What the bench boots, its images written into `folder`.
fn machines(options: &Options, folder: &Path) -> Result<Machines> {
    let mut ours = machine(options, folder)?;
    let mut theirs = ours.clone();
    if options.bench == Bench::Shipped {
        // The one that rooms have, with the serial console that tells when init is there.
        ours.command_line = format!("{} quiet", carrel_host::launch::command_line(true));
        let kernel =
            options.peer_kernel.as_ref().context("--peer-kernel says which one Firecracker boots")?;
        theirs.kernel = stage(kernel, folder, "peer-vmlinux")?;
        theirs.command_line.clone_from(&options.peer_command_line);
    }
    Ok(Machines { ours, theirs })
}

fn machine(options: &Options, folder: &Path) -> Result<Machine> {
    let write = |name: &str, bytes: &[u8]| -> Result<PathBuf> {
        let path = folder.join(name);
        fs::write(&path, bytes)?;
        Ok(path)
    };
    let linux = || {
        let kernel = options.kernel.as_ref().context("--kernel says which guest kernel to boot")?;
        stage(kernel, folder, "vmlinux")
    };
    let (kernel, initramfs) = match options.bench {
        Bench::Clone => bail!("a clone's machines are its own"),
        Bench::Tiny | Bench::Memory => (write("tiny", &guest_images::tiny_kernel())?, None),
        Bench::Boot | Bench::Shipped => {
            (linux()?, Some(write("initramfs", &guest_images::initramfs(&guest_images::ready_init()))?))
        }
        Bench::Vsock => {
            let guest = options.guest.as_ref().context("--guest says which program is the guest's /init")?;
            (linux()?, Some(write("initramfs", &guest_images::initramfs(&fs::read(guest)?))?))
        }
    };
    Ok(Machine {
        kernel,
        initramfs,
        command_line: COMMAND_LINE.into(),
        memory_mib: if options.bench == Bench::Vsock { 256 } else { 128 },
        vcpus: 1,
        vsock: options.bench == Bench::Vsock,
        disks: Vec::new(),
    })
}

/// Names and units of a bench's metrics, the aim's own first.
fn metrics_of(bench: Bench) -> &'static [(&'static str, &'static str)] {
    match bench {
        Bench::Tiny => &[("start to output", "ms"), ("page faults", ""), ("VM exits", "")],
        Bench::Boot | Bench::Shipped => &[("start to init", "ms"), ("page faults", ""), ("VM exits", "")],
        Bench::Memory => &[("PSS", "KiB"), ("kernel memory", "KiB")],
        Bench::Clone => &[("request to first tick", "ms")],
        Bench::Vsock => &[("into the guest", "MiB/s"), ("out of the guest", "MiB/s"), ("round trip", "µs")],
    }
}

/// Starts one side once and measures it.
fn sample(bench: Bench, side: &Engine, machine: &Machine) -> Result<Sample> {
    let number = |n: u64| u32::try_from(n).map_or(f64::NAN, f64::from);
    match bench {
        Bench::Tiny | Bench::Boot | Bench::Shipped => {
            let (took, running) = side.start(machine, &[])?;
            let family = meter::family(running.pid());
            let exits = meter::vm_exits(&family).map_or(f64::NAN, number);
            Ok(vec![took.as_secs_f64() * 1e3, number(meter::page_faults(&family)), exits])
        }
        Bench::Memory => {
            let cgroup = meter::Cgroup::new("carrel-bench");
            let wrapper = cgroup.as_ref().map(meter::Cgroup::wrapper).unwrap_or_default();
            let (_, running) = side.start(machine, &wrapper)?;
            let pss = meter::pss_kib(&meter::family(running.pid()), machine.memory_mib)?;
            let kernel = match &cgroup {
                Some(cgroup) => number(cgroup.kernel_kib()?),
                None => f64::NAN,
            };
            drop(running);
            Ok(vec![number(pss), kernel])
        }
        Bench::Vsock => {
            let (_, running) = side.start(machine, &[])?;
            vsock_sample(&running)
        }
        Bench::Clone => bail!("a clone is not booted"),
    }
}

fn vsock_sample(running: &Running) -> Result<Sample> {
    let connect = || running.connect(vsock::PORT);
    Ok(vec![vsock::into_guest(connect()?)?, vsock::out_of_guest(connect()?)?, vsock::round_trip(connect()?)?])
}

/// Host system calls until ready, counted under strace: it would distort the clock, not the count.
fn system_calls(bench: Bench, series: &[Series; 3], machines: &Machines, peer: &str) -> Vec<Metric> {
    if Command::new("strace").arg("-V").output().is_err() {
        eprintln!("strace is not installed: system calls are not counted");
        return Vec::new();
    }
    let count = |side: &Engine| -> Result<Sample> {
        let file = tempfile::NamedTempFile::new()?;
        let wrapper = ["strace", "-f", "-qq", "-o", &file.path().to_string_lossy()].map(String::from);
        let (_, running) = side.start(machines.of(side), &wrapper)?;
        // One line a call; what was unfinished and resumed has two.
        let trace = fs::read_to_string(file.path())?;
        let calls = trace.lines().filter(|line| !line.contains(" resumed>") && !line.contains("+++")).count();
        ensure!(calls > 0, "strace recorded nothing");
        drop(running);
        Ok(vec![u32::try_from(calls).map_or(f64::NAN, f64::from)])
    };
    let counts = series.each_ref().map(|series| {
        let mut counts = Series::new(series.name, series.side.clone());
        (0..COUNTED_STARTS).for_each(|round| counts.take(round + 1, true, count));
        counts.tell_failures();
        counts.samples
    });
    let [confined, theirs, unconfined] = counts.each_ref().map(Vec::as_slice);
    let names = &[("host system calls", "")];
    let mut metrics = rows(bench, names, peer, confined, theirs, "");
    metrics.extend(rows(bench, names, peer, unconfined, theirs, "unconfined"));
    metrics
}

fn compare(bench: Bench, peer: &str, ours: &[Sample], theirs: &[Sample], variant: &str) -> Vec<Metric> {
    rows(bench, metrics_of(bench), peer, ours, theirs, variant)
}

fn rows(
    bench: Bench,
    names: &[(&'static str, &'static str)],
    peer: &str,
    ours: &[Sample],
    theirs: &[Sample],
    variant: &str,
) -> Vec<Metric> {
    let column = |samples: &[Sample], i| samples.iter().map(|s| value(s, i)).collect::<Vec<_>>();
    let mut metrics = Vec::new();
    for (i, &(name, unit)) in names.iter().enumerate() {
        let (ours, theirs) = whole_pairs(&column(ours, i), &column(theirs, i));
        if ours.is_empty() {
            continue;
        }
        let metric = if variant.is_empty() { name.to_owned() } else { format!("{name}, {variant}") };
        metrics.push(Metric {
            bench,
            metric,
            unit,
            runs: ours.len(),
            carrel: stats::summary(&ours),
            peer: Peer { name: peer.to_owned(), summary: stats::summary(&theirs) },
            ratio: stats::ratio(&ours, &theirs),
        });
    }
    metrics
}

fn version(firecracker: &Path) -> Result<String> {
    let output =
        Command::new(firecracker).arg("--version").output().context("Firecracker can't be started")?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or("firecracker").trim().to_lowercase())
}

fn progress(round: u32, of: u32) {
    eprint!("\rround {round} of {of}");
    if round == of {
        eprintln!();
    }
    // Progress is a courtesy: what can't be shown is not shown.
    let _ = std::io::stderr().flush();
}

fn print_table(metrics: &[Metric]) {
    let peer = metrics.first().map_or("peer", |m| m.peer.name.as_str());
    println!("| metric | unit | runs | carrel median (p95) | {peer} median (p95) | ratio (95 % interval) |");
    println!("|---|---|---|---|---|---|");
    for m in metrics {
        println!(
            "| {} | {} | {} | {:.2} ({:.2}) | {:.2} ({:.2}) | {:.3} ({:.3}–{:.3}) |",
            m.metric,
            m.unit,
            m.runs,
            m.carrel.median,
            m.carrel.p95,
            m.peer.summary.median,
            m.peer.summary.p95,
            m.ratio.ratio,
            m.ratio.ratio_low,
            m.ratio.ratio_high
        );
    }
}

fn write_json(path: &Path, metrics: &[Metric]) -> Result<()> {
    let mut lines = String::new();
    for metric in metrics {
        lines.push_str(&serde_json::to_string(metric)?);
        lines.push('\n');
    }
    fs::write(path, lines).with_context(|| format!("{} can't be written", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series() -> Series {
        Series::new("firecracker", Engine::Firecracker { binary: "firecracker".into() })
    }

    #[test]
    fn a_failed_sample_is_taken_once_more_and_then_missing() {
        let mut series = series();
        let mut attempts = 0;
        let mut flaky = |_: &Engine| {
            attempts += 1;
            if attempts == 1 { bail!("a stall") } else { Ok(vec![1.0]) }
        };
        series.take(1, true, &mut flaky);
        assert_eq!((series.failed, series.missing, series.samples.len()), (1, 0, 1));
        series.take(2, true, |_| bail!("a stall"));
        series.take(3, true, |_| Ok(vec![3.0]));
        assert_eq!((series.failed, series.missing), (3, 1));
        assert_eq!(series.samples, [vec![1.0], vec![], vec![3.0]]);
        // A warm-up that fails is no missing sample.
        series.take(4, false, |_| bail!("a stall"));
        assert_eq!((series.failed, series.missing, series.samples.len()), (5, 1, 3));
    }

    #[test]
    fn rounds_are_compared_that_have_a_sample_of_both_sides() {
        let metrics = rows(
            Bench::Vsock,
            &[("a", ""), ("b", "")],
            "peer",
            &[vec![1.0, 5.0], vec![], vec![3.0, f64::NAN]],
            &[vec![2.0, 5.0], vec![9.0, 9.0], vec![6.0, 1.0]],
            "",
        );
        let seen: Vec<_> = metrics.iter().map(|m| (m.runs, m.ratio.ratio)).collect();
        assert_eq!(seen, [(2, 0.5), (1, 1.0)]);
        assert!(rows(Bench::Vsock, &[("a", "")], "peer", &[vec![]], &[vec![1.0]], "").is_empty());
    }
}
