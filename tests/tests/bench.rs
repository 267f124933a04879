//! `carrel bench`: that it measures what it is told to, in rooms and out of them, and writes what it promises. Its figures are nobody's here: a run is counted, not judged.

// A test fails by panicking, and so do the functions that tests share.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use carrel_tests::{Carrel, Done, Running};
use rustix::fs::FileType;
use serde_json::Value;

/// Programs that were built with this one: `carrel-bench` is none of the assets.
fn built() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_carrel-tests-worker")).parent().unwrap()
}

const SUBJECTS: &str = "plain,firecracker,carrel,carrel-clone";

/// `carrel bench` where there is no Firecracker, with a root of one program in place of the runtime's five thousand files.
struct Bench<'a> {
    carrel: &'a Carrel,
    root: PathBuf,
    out: PathBuf,
}

impl<'a> Bench<'a> {
    fn new(carrel: &'a Carrel) -> Self {
        let folder = carrel.scratch();
        let (tree, root) = (folder.join("tree"), folder.join("root.ext4"));
        for name in ["bench", "scratch", "dev", "proc", "sys", "tmp"] {
            fs::create_dir_all(tree.join(name)).unwrap();
        }
        fs::copy(built().join("carrel-bench-guest"), tree.join("bench/work")).unwrap();
        let null = rustix::fs::makedev(1, 3);
        rustix::fs::mknodat(
            rustix::fs::CWD,
            tree.join("dev/null"),
            FileType::CharacterDevice,
            0o666.into(),
            null,
        )
        .unwrap();
        let mut line = Command::new("mke2fs");
        line.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
        line.args(["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-d"]).args([&tree, &root]).arg("64M");
        let done = line.output().expect("mke2fs runs");
        assert!(done.status.success(), "{done:?}");
        Self { carrel, root, out: folder.join("report") }
    }

    fn run(&self, subjects: &str, options: &[&str]) -> Done {
        let mut command = self.carrel.command(&["bench", "--subjects", subjects]);
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders = std::iter::once(built().to_owned()).chain(std::env::split_paths(&path));
        let path: OsString = std::env::join_paths(folders).unwrap();
        command.env("PATH", path).env_remove("FIRECRACKER");
        command.args(["--firecracker", "/nonexistent/firecracker", "--runs", "2", "--warm-ups", "1"]);
        command.arg("--root").arg(&self.root).arg("--work").arg(self.carrel.scratch());
        command.arg("--out").arg(&self.out).args(options);
        let done = Running::spawn(&mut command).done();
        // For whoever looks into a failure.
        eprintln!("{}", done.errors());
        done
    }

    fn report(&self) -> Value {
        serde_json::from_slice(&fs::read(self.out.join("results.json")).unwrap()).unwrap()
    }
}

/// The samples of a metric, by subject, in the report's order.
fn samples(report: &Value, metric: &str) -> Vec<(String, usize)> {
    let series = report["series"].as_array().unwrap().iter().filter(|series| series["metric"] == metric);
    series
        .map(|series| {
            let samples = series["samples"].as_array().unwrap();
            assert!(samples.iter().all(|sample| sample.as_f64().unwrap() > 0.0), "{series}");
            assert_eq!(series["failed"], 0, "{series}");
            (series["subject"].as_str().unwrap().to_owned(), samples.len())
        })
        .collect()
}

#[test]
fn a_report_has_what_was_measured_and_who_was_not_there_and_is_added_to() {
    let carrel = Carrel::new();
    let bench = Bench::new(&carrel);
    bench.run(SUBJECTS, &["--only", "start-true,syscalls"]).succeeds();
    let report = bench.report();
    let of = |subjects: &[&str]| -> Vec<(String, usize)> {
        subjects.iter().map(|subject| ((*subject).to_owned(), 2)).collect()
    };
    assert_eq!(samples(&report, "start-true"), of(&["plain", "carrel", "carrel-clone"]));
    assert_eq!(samples(&report, "syscalls"), of(&["plain", "carrel"]));
    let skipped = report["skipped"].as_array().unwrap();
    assert!(
        skipped.iter().any(|skip| skip["subject"] == "firecracker"
            && skip["reason"].as_str().unwrap().contains("/nonexistent/firecracker")),
        "{skipped:#?}"
    );
    // Bursts and densities: as many rooms as the level says, and weighed.
    let levels = ["--bursts", "2", "--densities", "2"];
    let rest = "burst,starts-per-second,density-pss,density-kernel";
    bench.run(SUBJECTS, &[&["--add", "--only", rest], &levels[..]].concat()).succeeds();
    let report = bench.report();
    assert_eq!(samples(&report, "start-true"), of(&["plain", "carrel", "carrel-clone"]), "these stay");
    for (metric, least) in [("burst", 2), ("starts-per-second", 1), ("density-pss", 2), ("density-kernel", 2)]
    {
        let measured = samples(&report, metric);
        let of_carrel = measured.iter().filter(|(subject, _)| subject.starts_with("carrel"));
        assert!(of_carrel.clone().count() > 0, "{metric}: {measured:?}");
        assert!(of_carrel.clone().all(|(_, count)| *count >= least), "{metric}: {measured:?}");
    }
    // For people: a table for each metric, plots, and the way to measure again.
    let text = fs::read_to_string(bench.out.join("results.md")).unwrap();
    for said in ["## start-true", "## density-pss", "/nonexistent/firecracker", "Again: `"] {
        assert!(text.contains(said), "no '{said}' in {text}");
    }
    for metric in ["start-true", "syscalls", "density-pss"] {
        let plot = fs::read_to_string(bench.out.join(format!("{metric}.svg"))).unwrap();
        assert!(plot.starts_with("<svg") && plot.trim_end().ends_with("</svg>"), "{metric}: {plot}");
        assert!(plot.contains("carrel"), "{metric}: {plot}");
    }
}

#[test]
fn a_bench_that_can_measure_nothing_says_so() {
    let carrel = Carrel::new();
    let bench = Bench::new(&carrel);
    let done = bench.run("firecracker", &["--only", "vsock-in"]);
    assert!(done.ends_with(1).errors().contains("bench: nothing could be measured"));
    let done = bench.run(SUBJECTS, &["--only", "no-such-metric"]);
    assert!(done.ends_with(1).errors().contains("no-such-metric"));
    // One sentence, as of every command.
    let done = bench.run(SUBJECTS, &["--deadline"]).ends_with(2);
    assert_eq!(done.errors().lines().count(), 1, "{done:?}");
    assert!(
        done.errors().contains("--deadline") && done.errors().contains("carrel bench --help"),
        "{done:?}"
    );
}
