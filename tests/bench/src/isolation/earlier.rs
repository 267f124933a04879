//! Results of earlier runs to which one adds: where the host is emulated the whole bench takes hours, and each metric is a comparison by itself.
//!
//! ```text
//!  results.json ─read─▶ same host? ─▶ metrics that are measured now are dropped ─▶ the rest joins what comes out
//! ```

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::metrics::{Metric, named};
use super::place::Place;
use super::report::SCHEMA;
use super::results::{Results, Series, Skip};
use super::subjects::{Present, Subject};

/// One run of the bench, of which a report may hold several.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Run {
    /// What to type to have it again.
    pub(crate) command: String,
    /// Seconds since 1970, UTC.
    pub(crate) began: u64,
    /// Load average when it began.
    pub(crate) load: String,
    /// How much was done.
    pub(crate) options: Value,
    /// Whether it was ended before it was done.
    pub(crate) interrupted: bool,
    /// What it measured that is in the report.
    pub(crate) metrics: Vec<String>,
}

/// What earlier runs found.
#[derive(Debug, Default)]
pub(crate) struct Earlier {
    pub(crate) results: Results,
    pub(crate) present: Vec<Present>,
    pub(crate) runs: Vec<Run>,
}

#[derive(Deserialize)]
struct File {
    schema: u32,
    host: Place,
    subjects: Vec<Who>,
    series: Vec<Samples>,
    skipped: Vec<Skipped>,
    #[serde(default)]
    runs: Vec<Run>,
}

#[derive(Deserialize)]
struct Who {
    name: Subject,
    version: String,
}

#[derive(Deserialize)]
struct Samples {
    metric: String,
    level: Option<u32>,
    subject: Subject,
    samples: Vec<f64>,
    failed: u32,
}

#[derive(Deserialize)]
struct Skipped {
    metrics: Vec<String>,
    subject: Subject,
    level: Option<u32>,
    reason: String,
}

impl Earlier {
    /// Reads what is in a report's directory, without the metrics that are to be measured now; nothing where there is no report yet.
    pub(crate) fn read(out: &Path, here: &Place, measured_now: &[&'static Metric]) -> Result<Self> {
        let path = out.join("results.json");
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Self::default()),
            other => other.with_context(|| format!("{} can't be read", path.display()))?,
        };
        let file: File = serde_json::from_slice(&bytes)
            .with_context(|| format!("{} is no report to add to", path.display()))?;
        ensure!(file.schema == SCHEMA, "{} has schema {}, not {SCHEMA}", path.display(), file.schema);
        ensure!(
            file.host.is_same(here),
            "{} was measured on another host ({}), and figures of two hosts are no comparison: name another --out",
            path.display(),
            file.host.sentence()
        );
        let kept =
            |name: &str| named(name).filter(|metric| measured_now.iter().all(|now| now.name != metric.name));
        let series =
            file.series.into_iter().filter_map(|Samples { metric, level, subject, samples, failed }| {
                Some(Series { metric: kept(&metric)?, level, subject, samples, failed })
            });
        let skipped = file.skipped.into_iter().filter_map(|Skipped { metrics, subject, level, reason }| {
            let of: Vec<&'static str> = metrics.iter().filter_map(|name| Some(kept(name)?.name)).collect();
            // Nothing named is everything; nothing left of something is nothing.
            (metrics.is_empty() || !of.is_empty()).then_some(Skip { metrics: of, subject, level, reason })
        });
        let present = file.subjects.into_iter().map(|Who { name, version }| Present {
            subject: name,
            version,
            setup: name.setup(),
            program: Default::default(),
        });
        let runs = file.runs.into_iter().filter_map(|mut run| {
            run.metrics.retain(|name| kept(name).is_some());
            (!run.metrics.is_empty()).then_some(run)
        });
        let results = Results { series: series.collect(), skipped: skipped.collect() };
        Ok(Self { results, present: present.collect(), runs: runs.collect() })
    }

    /// Who was there in both has to have been the same.
    pub(crate) fn check_versions<'a>(&self, now: impl IntoIterator<Item = &'a Present>) -> Result<()> {
        for one in now {
            if let Some(before) = self.present.iter().find(|before| before.subject == one.subject) {
                ensure!(
                    before.version == one.version,
                    "{} was {} in the report that is to be added to, and is {} now: name another --out",
                    one.subject.name(),
                    before.version,
                    one.version
                );
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn report(host: &Place, series: &Value) -> Value {
        json!({
            "schema": SCHEMA, "host": host, "series": series,
            "subjects": [{ "name": "plain", "version": "1", "setup": "as it was" }],
            "skipped": [
                { "metrics": [], "subject": "crun", "reason": "none" },
                { "metrics": ["cpu", "start-true"], "subject": "runc", "reason": "slow" },
                { "metrics": ["start-true"], "subject": "runc", "reason": "slow" },
            ],
            "runs": [{
                "command": "carrel bench", "began": 1, "load": "0.1", "options": {}, "interrupted": false,
                "metrics": ["start-true", "cpu"],
            }],
        })
    }

    fn read(report: &Value, now: &[&str]) -> Result<Earlier> {
        let folder = tempfile::tempdir()?;
        fs::write(folder.path().join("results.json"), serde_json::to_vec(report)?)?;
        let now: Vec<_> = now.iter().map(|name| named(name).unwrap()).collect();
        Earlier::read(folder.path(), &Place::here(), &now)
    }

    #[test]
    fn what_is_measured_now_replaces_what_was_and_the_rest_stays() {
        let one =
            |metric: &str| json!({ "metric": metric, "subject": "plain", "samples": [1.5], "failed": 0 });
        let series = json!([one("start-true"), one("cpu"), one("of-another-version")]);
        let earlier = read(&report(&Place::here(), &series), &["start-true"]).unwrap();
        let kept: Vec<_> =
            earlier.results.series.iter().map(|s| (s.metric.name, s.samples.clone())).collect();
        assert_eq!(kept, [("cpu", vec![1.5])]);
        let skipped: Vec<_> = earlier.results.skipped.iter().map(|skip| skip.metrics.clone()).collect();
        assert_eq!(skipped, [vec![], vec!["cpu"]]);
        assert_eq!(earlier.runs[0].metrics, ["cpu"]);
        assert!(earlier.check_versions(&earlier.present).is_ok());
        let newer = Present { version: "2".into(), ..earlier.present[0].clone() };
        assert!(earlier.check_versions([&newer]).unwrap_err().to_string().contains("plain was 1"));
    }

    #[test]
    fn another_hosts_figures_and_what_is_no_report_are_refused() {
        let elsewhere = Place { memory_mib: 1, ..Place::here() };
        assert!(read(&report(&elsewhere, &json!([])), &[]).unwrap_err().to_string().contains("another host"));
        let busier = Place { load: "9.9".into(), began: 1, ..Place::here() };
        assert!(read(&report(&busier, &json!([])), &[]).is_ok());
        assert!(read(&json!({ "schema": SCHEMA }), &[]).is_err());
        let mut newer = report(&Place::here(), &json!([]));
        newer["schema"] = json!(SCHEMA + 1);
        assert!(read(&newer, &[]).unwrap_err().to_string().contains("schema"));
    }

    #[test]
    fn without_a_report_there_is_nothing_earlier() {
        let folder = tempfile::tempdir().unwrap();
        let earlier = Earlier::read(folder.path(), &Place::here(), &[]).unwrap();
        assert!(earlier.runs.is_empty() && earlier.results.series.is_empty());
    }
}
