//! What came out: a series of samples for each metric, level and subject, and what was skipped, why.

use serde::Serialize;

use super::metrics::Metric;
use super::subjects::Subject;
use crate::stats::{Spread, spread};

/// One subject's samples of one metric.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Series {
    /// Of which metric, by name.
    #[serde(serialize_with = "by_name")]
    pub(crate) metric: &'static Metric,
    /// How many at once, where there are levels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) level: Option<u32>,
    /// Whose.
    pub(crate) subject: Subject,
    /// In the metric's unit, in the order in which they were taken.
    pub(crate) samples: Vec<f64>,
    /// Attempts that failed.
    pub(crate) failed: u32,
}

/// What was not measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Skip {
    /// Metric names; empty: all.
    pub(crate) metrics: Vec<&'static str>,
    /// Who.
    pub(crate) subject: Subject,
    /// From which level on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) level: Option<u32>,
    /// Why.
    pub(crate) reason: String,
}

/// All of it.
#[derive(Debug, Default)]
pub(crate) struct Results {
    /// In the order of being measured.
    pub(crate) series: Vec<Series>,
    /// In the order of being noticed.
    pub(crate) skipped: Vec<Skip>,
}

impl Series {
    /// Its samples in a few numbers; nothing without any.
    pub(crate) fn spread(&self) -> Option<Spread> {
        (!self.samples.is_empty()).then(|| spread(&self.samples))
    }
}

impl Results {
    /// The series of a metric, level and subject, made if it is not there.
    fn series(
        &mut self,
        metric: &'static Metric,
        level: Option<u32>,
        subject: Subject,
    ) -> Option<&mut Series> {
        let same = |s: &Series| s.metric.name == metric.name && s.level == level && s.subject == subject;
        let at = self.series.iter().position(same).unwrap_or_else(|| {
            self.series.push(Series { metric, level, subject, samples: Vec::new(), failed: 0 });
            self.series.len() - 1
        });
        self.series.get_mut(at)
    }

    /// Adds samples.
    pub(crate) fn add(
        &mut self,
        metric: &'static Metric,
        level: Option<u32>,
        subject: Subject,
        samples: &[f64],
    ) {
        if let Some(series) = self.series(metric, level, subject) {
            series.samples.extend(samples.iter().filter(|sample| sample.is_finite()));
        }
    }

    /// Counts an attempt that failed.
    pub(crate) fn failed(&mut self, metric: &'static Metric, level: Option<u32>, subject: Subject) {
        if let Some(series) = self.series(metric, level, subject) {
            series.failed += 1;
        }
    }

    /// Joins what earlier runs found of other metrics.
    pub(crate) fn join(&mut self, earlier: Self) {
        self.series.extend(earlier.series);
        for skip in earlier.skipped {
            if !self.skipped.contains(&skip) {
                self.skipped.push(skip);
            }
        }
    }

    /// By level, then by subject, as tables and plots want them.
    pub(crate) fn sort(&mut self) {
        self.series.sort_by_key(|series| (series.level, series.subject));
    }

    /// Whether it was said already why there is nothing.
    pub(crate) fn is_skipped(&self, metrics: &[&'static Metric], level: u32, subject: Subject) -> bool {
        let same = |skip: &Skip| skip.metrics.iter().copied().eq(metrics.iter().map(|metric| metric.name));
        self.skipped.iter().any(|skip| skip.subject == subject && skip.level == Some(level) && same(skip))
    }

    /// Says why there is nothing.
    pub(crate) fn skip(
        &mut self,
        metrics: &[&'static Metric],
        level: Option<u32>,
        subject: Subject,
        reason: String,
    ) {
        let metrics = metrics.iter().map(|metric| metric.name).collect();
        let skip = Skip { metrics, subject, level, reason };
        if !self.skipped.contains(&skip) {
            self.skipped.push(skip);
        }
    }
}

fn by_name<S: serde::Serializer>(metric: &&'static Metric, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(metric.name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isolation::metrics::METRICS;

    #[test]
    fn samples_of_one_metric_level_and_subject_are_one_series() {
        let mut results = Results::default();
        let metric = &METRICS[0];
        results.add(metric, None, Subject::Plain, &[1.0, f64::NAN]);
        results.add(metric, Some(8), Subject::Plain, &[2.0]);
        results.add(metric, None, Subject::Plain, &[3.0]);
        results.failed(metric, None, Subject::Plain);
        let seen: Vec<_> = results.series.iter().map(|s| (s.level, s.samples.clone(), s.failed)).collect();
        assert_eq!(seen, [(None, vec![1.0, 3.0], 1), (Some(8), vec![2.0], 0)]);
        assert_eq!(results.series[0].spread().unwrap().median.to_bits(), 2.0_f64.to_bits());
    }
}
