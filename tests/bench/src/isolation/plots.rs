//! Plots of results, SVG: a line of boxes for a metric without levels, curves over the levels for one that has them.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::coord::ranged1d::ValueFormatter;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use super::metrics::Metric;
use super::report::{Report, figure};
use super::results::Series;
use super::subjects::Subject;
use crate::stats::Spread;

const WIDTH: u32 = 860;
const FONT: &str = "sans-serif";

/// Draws each metric that has figures, and returns the files' names.
pub(crate) fn draw(report: &Report<'_>, out: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for metric in report.metrics {
        let of: Vec<(&Series, Spread)> = report
            .results
            .series
            .iter()
            .filter(|series| {
                series.metric.name == metric.name && series.metric.subjects.contains(&series.subject)
            })
            .filter_map(|series| Some((series, series.spread()?)))
            .collect();
        if of.is_empty() {
            continue;
        }
        let name = format!("{}.svg", metric.name);
        let path = out.join(&name);
        let emulated = if report.place.emulated { " (emulated host)" } else { "" };
        let unit = if metric.unit.is_empty() { "count" } else { metric.unit };
        let title = format!("{}, {unit}{emulated}", metric.title);
        // The errors of plotters borrow what is drawn on: they are told here, not kept.
        let drawn = if of.iter().any(|(series, _)| series.level.is_some()) {
            curves(&path, &title, metric, &of)
        } else {
            boxes(&path, &title, &of)
        };
        drawn.map_err(|error| anyhow!("{} can't be drawn: {error}", path.display()))?;
        names.push(name);
    }
    Ok(names)
}

type Drawn = Result<(), Box<dyn std::error::Error>>;

/// Ends of a logarithmic axis that has room for all of it.
fn reach(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values
        .filter(|value| value.is_finite() && *value > 0.0)
        .fold((f64::INFINITY, 0.0_f64), |(low, high), value| (low.min(value), high.max(value)));
    if low > high { (0.5, 2.0) } else { (low / 1.5, high * 2.0) }
}

/// A row a subject: a whisker to the 95th percentile, a box of the quartiles, a line at the median and its figure. From zero, unless the slowest is many times
/// the quickest.
fn boxes(path: &Path, title: &str, of: &[(&Series, Spread)]) -> Drawn {
    let rows = u32::try_from(of.len())?;
    let root = SVGBackend::new(path, (WIDTH, 90 + 34 * rows)).into_drawing_area();
    root.fill(&WHITE)?;
    let (low, high) = reach(of.iter().flat_map(|(_, s)| [s.q1, s.median, s.q3, s.p95]));
    let mut chart = ChartBuilder::on(&root);
    chart.caption(title, (FONT, 18)).margin(10).margin_right(40).x_label_area_size(30).y_label_area_size(170);
    let names = 0.0..f64::from(rows);
    if high / low > 20.0 {
        fill(&mut chart.build_cartesian_2d((low..high).log_scale(), names)?, low, of)?;
    } else {
        fill(&mut chart.build_cartesian_2d(0.0..high * 0.65, names)?, 0.0, of)?;
    }
    root.present()?;
    Ok(())
}

/// The rows themselves, whatever the axis.
fn fill<X>(
    chart: &mut ChartContext<'_, SVGBackend<'_>, Cartesian2d<X, RangedCoordf64>>,
    low: f64,
    of: &[(&Series, Spread)],
) -> Drawn
where
    X: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let rows = u32::try_from(of.len())?;
    let name_at = |y: f64| -> &str {
        let row = of.iter().rev().zip(0_u32..).find(|(_, i)| (y - f64::from(*i) - 0.5).abs() < 0.01);
        row.map_or("", |((series, _), _)| series.subject.name())
    };
    // A label a row, in its middle: the ticks are twice as many as the rows.
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(usize::try_from(2 * rows + 1)?)
        .y_label_formatter(&|y| name_at(*y).to_owned())
        .x_label_formatter(&|x| figure(*x))
        .y_label_style((FONT, 13))
        .x_label_style((FONT, 12))
        .draw()?;
    for (i, (series, s)) in (0..rows).zip(of.iter().rev()) {
        let middle = f64::from(i) + 0.5;
        let color = color(series);
        let whisker = vec![(s.q3.max(low), middle), (s.p95.max(low), middle)];
        chart.draw_series([PathElement::new(whisker, color)])?;
        let body = [(s.q1.max(low), middle - 0.28), (s.q3.max(low), middle + 0.28)];
        chart.draw_series([Rectangle::new(body, color.mix(0.35).filled())])?;
        let median = vec![(s.median.max(low), middle - 0.34), (s.median.max(low), middle + 0.34)];
        chart.draw_series([PathElement::new(median, color.stroke_width(3))])?;
        // A little to the right of all that, in pixels: the axis may be of either kind.
        let at = (s.p95.max(s.median).max(low), middle + 0.18);
        let text = EmptyElement::at(at) + Text::new(figure(s.median), (6, 0), (FONT, 12));
        chart.draw_series([text])?;
    }
    Ok(())
}

/// A curve a subject over the levels: medians, with the 95th percentile as a whisker above.
fn curves(path: &Path, title: &str, metric: &Metric, of: &[(&Series, Spread)]) -> Drawn {
    let root = SVGBackend::new(path, (WIDTH, 460)).into_drawing_area();
    root.fill(&WHITE)?;
    let level = |series: &Series| f64::from(series.level.unwrap_or(1));
    let (low, high) = reach(of.iter().flat_map(|(_, s)| [s.median, s.p95]));
    let (few, many) = reach(of.iter().map(|(series, _)| level(series)));
    // The legend stands to the right of the curves.
    let many = many * (many / few).powf(0.3);
    let mut chart = ChartBuilder::on(&root)
        .caption(title, (FONT, 18))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(70)
        .build_cartesian_2d((few..many).log_scale(), (low..high).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("at once")
        .y_desc(if metric.unit.is_empty() { "count" } else { metric.unit })
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| figure(*y))
        .label_style((FONT, 12))
        .draw()?;
    let mut subjects: Vec<_> = of.iter().map(|(series, _)| series.subject).collect();
    subjects.sort_unstable();
    subjects.dedup();
    for subject in subjects {
        let mine: Vec<&(&Series, Spread)> =
            of.iter().filter(|(series, _)| series.subject == subject).collect();
        let Some((first, _)) = mine.first() else { continue };
        let color = color(first);
        let points: Vec<(f64, f64)> = mine.iter().map(|(series, s)| (level(series), s.median)).collect();
        chart
            .draw_series(LineSeries::new(points.clone(), color.stroke_width(2)))?
            .label(subject.name())
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 18, y)], color.stroke_width(2)));
        chart.draw_series(points.into_iter().map(|at| Circle::new(at, 3, color.filled())))?;
        chart.draw_series(mine.iter().map(|(series, s)| {
            PathElement::new(vec![(level(series), s.median), (level(series), s.p95)], color)
        }))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::MiddleRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .label_font((FONT, 12))
        .draw()?;
    root.present()?;
    Ok(())
}

/// A subject's own colour, the same in every plot.
fn color(series: &Series) -> RGBAColor {
    let [red, green, blue] = match series.subject {
        Subject::Plain => [110, 110, 110],
        Subject::Bubblewrap => [188, 143, 60],
        Subject::Runc => [46, 134, 193],
        Subject::Crun => [26, 82, 118],
        Subject::QemuMicrovm => [203, 67, 53],
        Subject::Firecracker => [230, 126, 34],
        Subject::FirecrackerSnapshot => [243, 178, 70],
        Subject::FirecrackerResident => [175, 122, 197],
        Subject::Carrel => [30, 132, 73],
        Subject::CarrelClone => [88, 190, 120],
        Subject::CarrelPool => [20, 184, 166],
        Subject::CarrelResident => [6, 182, 212],
        Subject::CarrelWarm => [134, 239, 172],
    };
    RGBColor(red, green, blue).to_rgba()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_reaches_around_what_is_there() {
        let (low, high) = reach([3.0, f64::NAN, 0.0, 300.0].into_iter());
        assert!(low < 3.0 && high > 300.0);
        assert_eq!(reach(std::iter::empty()), (0.5, 2.0));
    }
}
