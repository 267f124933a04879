//! The results as files: `results.json` for programs, `results.md` for people, plots.
//!
//! JSON: `{"schema": 1, "command", "host", "options", "subjects": [], "metrics": [], "series": [], "skipped": [], "runs": []}`; a series has its samples
//! and their spread. `command`, `options` and the host's load are those of the last run. Fields are added, not renamed.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context, Result};
use carrel_host::timestamp::rfc3339_of;
use serde_json::{Value, json};

use super::earlier::Run;
use super::metrics::{Better, Metric};
use super::place::Place;
use super::plots;
use super::results::{Results, Series};
use super::subjects::Present;

/// The JSON's form.
pub(crate) const SCHEMA: u32 = 1;

/// Everything that a report says.
pub(crate) struct Report<'a> {
    /// Where.
    pub(crate) place: &'a Place,
    /// Who.
    pub(crate) subjects: Vec<&'a Present>,
    /// What.
    pub(crate) metrics: &'a [&'static Metric],
    /// What came out.
    pub(crate) results: &'a Results,
    /// The run that it is of.
    pub(crate) run: &'a Run,
    /// Those before, of which it holds the rest.
    pub(crate) earlier: &'a [Run],
}

impl Report<'_> {
    /// Writes all files into a directory, which is made.
    pub(crate) fn write(&self, out: &Path) -> Result<()> {
        fs::create_dir_all(out).with_context(|| format!("{} can't be made", out.display()))?;
        fs::write(out.join("results.json"), serde_json::to_vec_pretty(&self.json()?)?)?;
        let plots = plots::draw(self, out)?;
        fs::write(out.join("results.md"), self.markdown(&plots))?;
        Ok(())
    }

    /// All runs, the last one last.
    fn runs(&self) -> impl Iterator<Item = &Run> {
        self.earlier.iter().chain([self.run])
    }

    fn interrupted(&self) -> bool {
        self.runs().any(|run| run.interrupted)
    }

    fn json(&self) -> Result<Value> {
        let series = self.results.series.iter().filter(|series| !is_noise(series)).map(|series| {
            let mut value = serde_json::to_value(series)?;
            value["spread"] = serde_json::to_value(series.spread())?;
            Ok(value)
        });
        Ok(json!({
            "schema": SCHEMA,
            "command": self.run.command,
            "interrupted": self.interrupted(),
            "host": self.place,
            "options": self.run.options,
            "subjects": self.subjects,
            "metrics": self.metrics,
            "series": series.collect::<Result<Vec<Value>>>()?,
            "skipped": self.results.skipped,
            "runs": self.runs().collect::<Vec<_>>(),
        }))
    }

    /// Tables first; how each figure came about below them.
    pub(crate) fn markdown(&self, plots: &[String]) -> String {
        let mut text = String::from("# Isolation benchmark\n\n");
        if self.interrupted() {
            text.push_str("**Interrupted: this is what there was up to then.**\n\n");
        }
        let _ = writeln!(text, "Host: {}.\n\nAgain: `{}`\n", self.place.sentence(), self.run.command);
        if !self.earlier.is_empty() {
            let _ = writeln!(text, "Measured in {} runs there:\n", self.runs().count());
            for Run { command, began, load, metrics, .. } in self.runs() {
                let _ = writeln!(
                    text,
                    "- {}, load {load}, `{command}`: {}",
                    rfc3339_of(UNIX_EPOCH + Duration::from_secs(*began)),
                    metrics.join(", ")
                );
            }
            text.push('\n');
        }
        text.push_str("Medians, with the quartiles in parentheses and the 95 % interval of the median (bootstrap) in brackets.\n");
        for metric in self.metrics {
            self.table(metric, &mut text);
        }
        if !plots.is_empty() {
            text.push_str("\n## Plots\n\n");
        }
        for plot in plots {
            let _ = writeln!(text, "![{plot}]({plot})");
        }
        text.push_str("\n## Subjects\n\n| subject | version | set up as |\n|---|---|---|\n");
        for one in &self.subjects {
            let _ =
                writeln!(text, "| {} | {} | {} |", one.subject.name(), cell(&one.version), cell(one.setup));
        }
        if !self.results.skipped.is_empty() {
            text.push_str("\n## Skipped\n\n| subject | what | why |\n|---|---|---|\n");
        }
        for skip in &self.results.skipped {
            let what = if skip.metrics.is_empty() { "everything".into() } else { skip.metrics.join(", ") };
            let level = skip.level.map(|level| format!(" at {level}")).unwrap_or_default();
            let _ = writeln!(text, "| {} | {what}{level} | {} |", skip.subject.name(), cell(&skip.reason));
        }
        text.push_str("\n## Metrics\n\n| metric | how it is measured |\n|---|---|\n");
        for metric in self.metrics {
            let _ = writeln!(text, "| {} | {} |", metric.name, cell(metric.how));
        }
        text
    }

    fn table(&self, metric: &Metric, text: &mut String) {
        let of: Vec<&Series> =
            self.results.series.iter().filter(|series| series.metric.name == metric.name).collect();
        if of.iter().all(|series| is_noise(series)) {
            return;
        }
        let better = match metric.better {
            Better::Lower => "less is better",
            Better::Higher => "more is better",
        };
        let unit = if metric.unit.is_empty() { "count" } else { metric.unit };
        let levels = of.iter().any(|series| series.level.is_some());
        let _ = writeln!(text, "\n## {}: {}\n\n{unit}; {better}.\n", metric.name, metric.title);
        let head = if levels { ("| at once ", "|---") } else { ("", "") };
        let _ = writeln!(text, "| subject {}| samples | median | p95 | p99 | failed |", head.0);
        let _ = writeln!(text, "|---{}|---|---|---|---|---|", head.1);
        for series in of {
            let level = match (levels, series.level) {
                (true, Some(level)) => format!("| {level} "),
                (true, None) => "| ".into(),
                (false, _) => String::new(),
            };
            let figures = series.spread().map_or("none | | ".into(), |s| {
                format!(
                    "{} ({}–{}) [{}–{}] | {} | {}",
                    figure(s.median),
                    figure(s.q1),
                    figure(s.q3),
                    figure(s.median_low),
                    figure(s.median_high),
                    figure(s.p95),
                    figure(s.p99)
                )
            });
            let (name, count) = (series.subject.name(), series.samples.len());
            let _ = writeln!(text, "| {name} {level}| {count} | {figures} | {} |", series.failed);
        }
    }
}

/// A series that is there only because something else of its group failed.
fn is_noise(series: &Series) -> bool {
    series.samples.is_empty() && series.failed == 0 || !series.metric.subjects.contains(&series.subject)
}

/// Three significant digits, or all before the point.
pub(crate) fn figure(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// A table's cell may hold neither a bar nor a line's end.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::isolation::metrics::METRICS;
    use crate::isolation::subjects::Subject;

    #[test]
    fn a_report_holds_every_figure_and_every_omission() {
        let mut results = Results::default();
        let start = super::super::metrics::named("start-true").unwrap();
        let burst = super::super::metrics::named("burst").unwrap();
        results.add(start, None, Subject::Plain, &[1.0, 2.0, 3.0]);
        results.add(burst, Some(8), Subject::Runc, &[250.0, 260.0]);
        results.skip(&[], None, Subject::Crun, "there is no crun | on the\nPATH".into());
        let place = Place::here();
        let plain = Present {
            subject: Subject::Plain,
            version: "this host's kernel".into(),
            setup: Subject::Plain.setup(),
            program: PathBuf::new(),
        };
        let metrics: Vec<&'static Metric> = METRICS.iter().collect();
        let run = Run {
            command: "carrel bench --only burst".into(),
            began: 1_799_999_999,
            load: "0.50".into(),
            options: json!({}),
            interrupted: false,
            metrics: vec!["burst".into()],
        };
        let report = Report {
            place: &place,
            subjects: vec![&plain],
            metrics: &metrics,
            results: &results,
            run: &Run {
                command: "carrel bench --quick".into(),
                options: json!({ "runs": 3 }),
                ..run.clone()
            },
            earlier: &[run],
        };
        let folder = tempfile::tempdir().unwrap();
        report.write(&folder.path().join("out")).unwrap();
        let read = |name: &str| fs::read_to_string(folder.path().join("out").join(name)).unwrap();
        let text = read("results.md");
        assert!(text.contains("| plain | 3 | 2.00 (1.50–2.50)"), "{text}");
        assert!(text.contains("| runc | 8 | 2 | 255 "), "{text}");
        assert!(text.contains("| crun | everything | there is no crun \\| on the PATH |"), "{text}");
        assert!(text.contains("`carrel bench --quick`"), "{text}");
        assert!(text.contains("- 2027-01-15T07:59:59"), "{text}");
        assert!(text.contains(", load 0.50, `carrel bench --only burst`: burst\n"), "{text}");
        let json: Value = serde_json::from_str(&read("results.json")).unwrap();
        assert_eq!(json["schema"], 1);
        assert_eq!(json["series"][0]["metric"], "start-true");
        assert_eq!(json["series"][0]["spread"]["median"], 2.0);
        assert_eq!(json["series"][1]["level"], 8);
        assert_eq!(json["skipped"][0]["subject"], "crun");
        assert_eq!(json["metrics"].as_array().unwrap().len(), METRICS.len());
        assert!(read("start-true.svg").contains("plain"));
        assert!(read("burst.svg").contains("<svg"));
    }
}
