//! Medians, percentiles and the interval of a ratio. Pure functions over samples.

use serde::Serialize;

/// Bootstrap draws.
const DRAWS: usize = 2000;

/// One side's samples, in a few numbers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Summary {
    /// The middle one.
    pub(crate) median: f64,
    /// The one that 95 % don't exceed.
    pub(crate) p95: f64,
}

/// A ratio of two medians with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Ratio {
    /// Ours over theirs.
    pub(crate) ratio: f64,
    /// Lower end of the interval.
    pub(crate) ratio_low: f64,
    /// Upper end of the interval.
    pub(crate) ratio_high: f64,
}

/// Summary of at least one sample.
pub(crate) fn summary(samples: &[f64]) -> Summary {
    Summary { median: quantile(samples, 50), p95: quantile(samples, 95) }
}

/// The ratio of medians, its interval by a bootstrap over runs: each run's pair was measured back to back, so whole
/// pairs are drawn. The generator is seeded with a constant: the same samples give the same interval.
pub(crate) fn ratio(ours: &[f64], theirs: &[f64]) -> Ratio {
    let pairs = ours.len().min(theirs.len());
    let of = |picked: &[usize]| {
        let side = |from: &[f64]| -> f64 {
            quantile(&picked.iter().filter_map(|&i| from.get(i).copied()).collect::<Vec<_>>(), 50)
        };
        side(ours) / side(theirs)
    };
    let mut draw = picks(pairs);
    let draws: Vec<f64> = (0..DRAWS).map(|_| of(&(0..pairs).map(|_| draw()).collect::<Vec<_>>())).collect();
    let all: Vec<usize> = (0..pairs).collect();
    Ratio { ratio: of(&all), ratio_low: permille(&draws, 25), ratio_high: permille(&draws, 975) }
}

/// One side by itself: where its samples lie.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Spread {
    /// The middle one.
    pub(crate) median: f64,
    /// A quarter lies below.
    pub(crate) q1: f64,
    /// A quarter lies above.
    pub(crate) q3: f64,
    /// The one that 95 % don't exceed.
    pub(crate) p95: f64,
    /// The one that 99 % don't exceed.
    pub(crate) p99: f64,
    /// Lower end of the median's 95 % interval.
    pub(crate) median_low: f64,
    /// Upper end of it.
    pub(crate) median_high: f64,
}

/// Spread of at least one sample; the median's interval by a bootstrap, as in [`ratio`].
pub(crate) fn spread(samples: &[f64]) -> Spread {
    let mut draw = picks(samples.len());
    let draws: Vec<f64> = (0..DRAWS)
        .map(|_| {
            let picked: Vec<f64> = (0..samples.len()).filter_map(|_| samples.get(draw()).copied()).collect();
            quantile(&picked, 50)
        })
        .collect();
    Spread {
        median: quantile(samples, 50),
        q1: quantile(samples, 25),
        q3: quantile(samples, 75),
        p95: quantile(samples, 95),
        p99: quantile(samples, 99),
        median_low: permille(&draws, 25),
        median_high: permille(&draws, 975),
    }
}

/// Indices below `among`, always the same ones.
fn picks(among: usize) -> impl FnMut() -> usize {
    let mut seed: u64 = 0x9e37_79b9_7f4a_7c15;
    move || {
        // xorshift64*: ample for picking indices.
        seed ^= seed >> 12;
        seed ^= seed << 25;
        seed ^= seed >> 27;
        usize::try_from(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33).unwrap_or(0) % among.max(1)
    }
}

fn quantile(samples: &[f64], percent: usize) -> f64 {
    permille(samples, percent * 10)
}

/// Linear interpolation between the two nearest ranks; NaN without samples.
fn permille(samples: &[f64], permille: usize) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let (rank, rest) = (last * permille / 1000, last * permille % 1000);
    let low = sorted.get(rank).copied().unwrap_or(f64::NAN);
    let high = sorted.get((rank + 1).min(last)).copied().unwrap_or(low);
    low + (high - low) * f64::from(u16::try_from(rest).unwrap_or(0)) / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_and_percentile_interpolate() {
        let s = summary(&[4.0, 1.0, 3.0, 2.0]);
        assert!((s.median - 2.5).abs() < 1e-9, "{s:?}");
        assert!((s.p95 - 3.85).abs() < 1e-9, "{s:?}");
        assert!((summary(&[7.0]).p95 - 7.0).abs() < 1e-9);
    }

    #[test]
    fn a_spread_is_in_order_and_its_interval_holds_the_median() {
        let samples: Vec<f64> = (0..40).map(|i| f64::from((i * 17) % 41)).collect();
        let s = spread(&samples);
        assert!(s.q1 < s.median && s.median < s.q3 && s.q3 < s.p95 && s.p95 <= s.p99, "{s:?}");
        assert!(s.median_low <= s.median && s.median <= s.median_high, "{s:?}");
        assert!(s.median_low < s.median_high, "{s:?}");
        let one = spread(&[7.0]);
        assert!((one.median_low - 7.0).abs() < 1e-9 && (one.median_high - 7.0).abs() < 1e-9);
    }

    #[test]
    fn a_constant_ratio_has_an_interval_of_no_width() {
        let theirs: Vec<f64> = (1..=20).map(f64::from).collect();
        let ours: Vec<f64> = theirs.iter().map(|t| t * 0.5).collect();
        let r = ratio(&ours, &theirs);
        assert!((r.ratio - 0.5).abs() < 1e-9 && (r.ratio_low - 0.5).abs() < 1e-9, "{r:?}");
    }

    #[test]
    fn noise_widens_the_interval_around_the_ratio() {
        let theirs: Vec<f64> = (0..20).map(|i| 10.0 + f64::from(i % 5)).collect();
        let ours: Vec<f64> = (0..20).map(|i| 5.0 + f64::from((i * 7) % 5)).collect();
        let r = ratio(&ours, &theirs);
        assert!(r.ratio_low < r.ratio && r.ratio < r.ratio_high, "{r:?}");
    }
}
