//! The isolation benchmark (`carrel bench`): what a room costs, for several ways of isolating one, measured in one run.
//!
//! ```text
//!  options ─> subjects that are there ─> stage (copies, root, cgroups) ─> measurements, group by group ─> report
//!                  └─ skipped, why             └──────── gone on every exit ────────┘            JSON, Markdown, SVG
//! ```
//!
//! A metric is a row of [`metrics::METRICS`], a subject a variant of [`subjects::Subject`]; how a subject runs a work is in [`plans`].

mod burst;
mod cgroups;
mod density;
mod earlier;
mod filter;
mod image;
mod measure;
mod metrics;
mod place;
mod plans;
mod plots;
mod report;
mod results;
pub(crate) mod room;
pub(crate) mod snapshot;
pub(crate) mod stage;
mod subjects;
mod surface;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde_json::json;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use earlier::{Earlier, Run};
use measure::{Amount, Bench, wanted};
use metrics::{METRICS, Metric};
use place::Place;
use report::Report;
use results::Results;
use stage::{Sources, Stage};
use subjects::{Present, Subject};
use surface::SourceFolders;

/// The word that comes before its options.
pub(crate) const COMMAND: &str = "isolation";

const EXAMPLES: &str = "\
Examples:
  carrel bench --list                             what is measured, and with whom
  carrel bench --quick --out quick                a few runs of everything
  carrel bench --out results                      20 runs; hours in an emulated host
  carrel bench --only start-true,burst --subjects plain,runc,carrel --runs 40
  carrel bench --only density-pss --out results --add    what a run before left out

It wants root, cgroup v2, and for guests a /dev/kvm that runs kernels; in a source tree
scripts/bench isolation brings all that it needs, an emulated host too. What is missing
is skipped, and the report says why. Whatever ends it, SIGKILL too: what it started ends
with it or with the next bench, and its mounts are in a namespace of its own.

Exit status: 0 measured, 1 nothing could be measured or written, 2 the command line is
wrong, 130 interrupted (what there was up to then is written).";

/// Measures what isolation costs, with several kinds of it in one run
#[derive(Debug, Parser)]
#[command(name = "carrel bench", version, about, after_help = EXAMPLES, max_term_width = 100)]
struct Options {
    /// Write results.json, results.md and plots into this directory
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Add to the report in --out: metrics that are measured now replace those of their name, the others stay
    #[arg(long, requires = "out")]
    add: bool,
    /// These metrics alone
    #[arg(long, value_name = "METRIC", value_delimiter = ',')]
    only: Vec<String>,
    /// These subjects alone
    #[arg(long, value_enum, value_name = "SUBJECT", value_delimiter = ',')]
    subjects: Vec<Subject>,
    /// Counted runs of each [default: 20, or 3 with --quick]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: Option<u32>,
    /// Runs before, not counted [default: 3, or 1 with --quick]
    #[arg(long, value_name = "RUNS")]
    warm_ups: Option<u32>,
    /// Few runs, small levels: to see whether it works
    #[arg(long)]
    quick: bool,
    /// Starts at once [default: 1,8,64, or 1,4 with --quick]
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=1000))]
    bursts: Vec<u32>,
    /// Idle rooms at once [default: 1,10,100,500, or 1,4 with --quick; the host's memory may end it earlier]
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=10_000))]
    densities: Vec<u32>,
    /// How long one start may take before it counts as failed
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    deadline: u64,
    /// Print the metrics and the subjects, and end
    #[arg(long)]
    list: bool,
    /// A directory on the file system to measure on
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    work: PathBuf,
    /// carrel's assets
    #[arg(long, value_name = "DIR", env = "CARREL_ASSETS")]
    assets: Option<PathBuf>,
    /// The carrel to measure [default: the assets' own, then the PATH's]
    #[arg(long, value_name = "PATH")]
    carrel: Option<PathBuf>,
    /// The carrel-vmm to measure by itself [default: the assets' own]
    #[arg(long, value_name = "PATH", env = "CARREL_VMM")]
    carrel_vmm: Option<PathBuf>,
    /// The Firecracker to measure [default: the PATH's]
    #[arg(long, value_name = "PATH", env = "FIRECRACKER")]
    firecracker: Option<PathBuf>,
    /// The program that rooms run [default: carrel-bench-guest beside this one]
    #[arg(long, value_name = "PATH")]
    guest: Option<PathBuf>,
    /// The root file system's disk, made before by --make-root [default: it is made]
    #[arg(long, value_name = "FILE")]
    root: Option<PathBuf>,
    /// Make the root file system's disk, and end
    #[arg(long, value_name = "FILE", conflicts_with = "root")]
    make_root: Option<PathBuf>,
    /// Sources to count lines of, a folder a subject (apt-get source runc, for one)
    #[arg(long, value_name = "DIR")]
    sources: Option<PathBuf>,
    /// carrel's own source tree
    #[arg(long, value_name = "DIR")]
    carrel_source: Option<PathBuf>,
    /// What to type to repeat it, for the report [default: this command line]
    #[arg(long, value_name = "TEXT", hide = true)]
    repeat: Option<String>,
}

/// What was asked for and is no measurement, or one sentence of what is wrong, as `carrel` says it of its own command lines.
fn misunderstood(error: &clap::Error) -> ! {
    const WRONG: i32 = 2;
    if !error.use_stderr() {
        error.exit();
    }
    let text = error.render().to_string();
    let first = text.trim_start_matches("error: ").split("\n\n").next().unwrap_or_default();
    let first = first.split_whitespace().collect::<Vec<_>>().join(" ");
    eprintln!("bench: {first}; see `carrel bench --help`.");
    std::process::exit(WRONG)
}

/// Carries it out.
pub(crate) fn run(words: impl Iterator<Item = OsString>) -> Result<()> {
    let options = Options::try_parse_from(words).unwrap_or_else(|error| misunderstood(&error));
    if options.list {
        list();
        return Ok(());
    }
    let chosen = options.metrics()?;
    let assets = options.assets()?;
    let guest = options.guest()?;
    if let Some(to) = &options.make_root {
        return image::make_root(&assets.join("runtimes/python3.11"), &guest, to);
    }
    let mut results = Results::default();
    let present = options.present(&assets, &mut results);
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        // However often: what is under way is given up within a moment, and what was started is removed.
        signal_hook::flag::register(signal, Arc::clone(&interrupted))?;
    }
    let place = Place::here();
    let earlier = match &options.out {
        Some(out) if options.add => Earlier::read(out, &place, &chosen)?,
        _ => Earlier::default(),
    };
    earlier.check_versions(present.values())?;
    let carrel_vmm = options.carrel_vmm.clone().unwrap_or_else(|| assets.join("carrel-vmm"));
    let sources = Sources {
        work: &options.work,
        assets: &assets,
        guest: &guest,
        root: options.root.as_deref(),
        carrel_vmm: &carrel_vmm,
    };
    let stage = Stage::new(&sources, present, &interrupted)?;
    let amount = options.amount();
    let folders = SourceFolders { peers: options.sources.clone(), carrel: options.carrel_source.clone() };
    let mut bench = Bench::new(&stage, &amount, &chosen, &folders, results);
    bench.run();
    let was_interrupted = interrupted.load(Ordering::Relaxed);
    let measured = bench.results.series.iter().any(|series| !series.samples.is_empty());
    let run = Run {
        command: options.repeat.clone().unwrap_or_else(command_line),
        began: place.began,
        load: place.load.clone(),
        options: json!({
            "runs": amount.runs, "warm_ups": amount.warm_ups, "bursts": amount.bursts,
            "densities": amount.densities, "deadline_seconds": amount.deadline.as_secs(),
        }),
        interrupted: was_interrupted,
        metrics: chosen.iter().map(|metric| metric.name.to_owned()).collect(),
    };
    let Earlier { results, present, runs } = earlier;
    bench.results.join(results);
    bench.results.sort();
    let in_report = |metric: &&Metric| {
        let mut there = chosen.iter().chain(bench.results.series.iter().map(|series| &series.metric));
        there.any(|one| one.name == metric.name)
    };
    let subjects: BTreeMap<Subject, &Present> =
        present.iter().chain(stage.present.values()).map(|one| (one.subject, one)).collect();
    let report = Report {
        place: &place,
        subjects: subjects.into_values().collect(),
        metrics: &METRICS.iter().filter(in_report).collect::<Vec<_>>(),
        results: &bench.results,
        run: &run,
        earlier: &runs,
    };
    match &options.out {
        Some(out) => {
            report.write(out)?;
            eprintln!("bench: see {}", out.join("results.md").display());
        }
        None => print!("{}", report.markdown(&[])),
    }
    drop(stage);
    if was_interrupted {
        std::process::exit(130);
    }
    ensure!(measured, "nothing could be measured: see what was skipped and why");
    Ok(())
}

impl Options {
    fn metrics(&self) -> Result<Vec<&'static Metric>> {
        if self.only.is_empty() {
            return Ok(METRICS.iter().collect());
        }
        self.only.iter().map(|name| wanted(name)).collect()
    }

    fn assets(&self) -> Result<PathBuf> {
        let assets = self.assets.clone().context(
            "--assets names the directory that scripts/build makes (or CARREL_ASSETS): kernel, disk and runtimes come from there",
        )?;
        for name in ["vmlinux", "scratch.ext4", "runtimes/python3.11"] {
            ensure!(
                assets.join(name).exists(),
                "{} has no {name}: make it with scripts/build",
                assets.display()
            );
        }
        Ok(assets)
    }

    fn guest(&self) -> Result<PathBuf> {
        let beside = || Some(std::env::current_exe().ok()?.with_file_name("carrel-bench-guest"));
        let guest = self.guest.clone().or_else(beside).context("--guest names the program that rooms run")?;
        ensure!(
            guest.is_file(),
            "{} is not there: --guest names the program that rooms run",
            guest.display()
        );
        Ok(guest)
    }

    /// Who of the chosen is there; why not, of the others.
    fn present(&self, assets: &Path, results: &mut Results) -> BTreeMap<Subject, Present> {
        let mut present = BTreeMap::new();
        let of_assets = Some(assets.join("carrel")).filter(|path| path.is_file());
        let carrel = self.carrel.clone().or(of_assets);
        for &subject in Subject::ALL {
            if !self.subjects.is_empty() && !self.subjects.contains(&subject) {
                continue;
            }
            let named = match subject {
                Subject::Carrel
                | Subject::CarrelClone
                | Subject::CarrelPool
                | Subject::CarrelResident
                | Subject::CarrelWarm => carrel.as_ref(),
                Subject::Firecracker | Subject::FirecrackerSnapshot | Subject::FirecrackerResident => {
                    self.firecracker.as_ref()
                }
                Subject::Plain
                | Subject::Bubblewrap
                | Subject::Runc
                | Subject::Crun
                | Subject::QemuMicrovm => None,
            };
            match subjects::look(subject, named) {
                Ok(found) => drop(present.insert(subject, found)),
                Err(reason) => {
                    eprintln!("bench: {} is skipped: {reason}", subject.name());
                    results.skip(&[], None, subject, reason);
                }
            }
        }
        present
    }

    fn amount(&self) -> Amount {
        let or = |given: &[u32], quick: &[u32], full: &[u32]| {
            let of = if !given.is_empty() {
                given
            } else if self.quick {
                quick
            } else {
                full
            };
            let mut levels = of.to_vec();
            levels.sort_unstable();
            levels.dedup();
            levels
        };
        Amount {
            runs: self.runs.unwrap_or(if self.quick { 3 } else { 20 }),
            warm_ups: self.warm_ups.unwrap_or(if self.quick { 1 } else { 3 }),
            bursts: or(&self.bursts, &[1, 4], &[1, 8, 64]),
            densities: or(&self.densities, &[1, 4], &[1, 10, 100, 500]),
            deadline: Duration::from_secs(self.deadline),
        }
    }
}

fn list() {
    println!("Metrics:");
    for metric in METRICS {
        println!("  {:<20} {:<6} {}", metric.name, metric.unit, metric.how);
    }
    println!("\nSubjects:");
    for subject in Subject::ALL {
        println!("  {:<20} {}", subject.name(), subject.setup());
    }
}

/// This very command line, as a shell takes it.
fn command_line() -> String {
    let mut words = vec!["carrel bench".to_owned()];
    for word in std::env::args().skip(2) {
        let plain =
            !word.is_empty() && word.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./,=:".contains(&b));
        words.push(if plain { word } else { format!("'{}'", word.replace('\'', r"'\''")) });
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn options(words: &[&str]) -> Options {
        Options::try_parse_from([&["carrel bench"], words].concat()).unwrap()
    }

    #[test]
    fn the_options_are_sound() {
        Options::command().debug_assert();
    }

    #[test]
    fn quick_is_less_of_everything_and_what_is_given_wins() {
        let (full, quick) = (options(&[]).amount(), options(&["--quick"]).amount());
        assert!(full.runs >= 20 && quick.runs < full.runs && quick.warm_ups < full.warm_ups);
        assert_eq!((full.bursts, full.densities), (vec![1, 8, 64], vec![1, 10, 100, 500]));
        let given = options(&["--quick", "--runs", "7", "--bursts", "8,2,8"]).amount();
        assert_eq!((given.runs, given.bursts), (7, vec![2, 8]));
    }

    #[test]
    fn metrics_are_chosen_by_name() {
        let chosen = options(&["--only", "burst,cpu"]).metrics().unwrap();
        assert_eq!(chosen.iter().map(|metric| metric.name).collect::<Vec<_>>(), ["burst", "cpu"]);
        assert!(options(&["--only", "nonsense"]).metrics().is_err());
        assert_eq!(options(&[]).metrics().unwrap().len(), METRICS.len());
    }

    #[test]
    fn assets_that_lack_something_are_refused_by_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let error = options(&["--assets", folder.path().to_str().unwrap()]).assets().unwrap_err();
        assert!(error.to_string().contains("vmlinux"), "{error}");
    }
}
