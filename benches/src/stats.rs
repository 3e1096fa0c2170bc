//! Medians and percentiles of measured times.

/// The value below which `percent` of the samples lie (nearest rank). 0 for no samples.
pub fn percentile(samples: &[f64], percent: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).or(sorted.first()).copied().unwrap_or(0.0)
}

/// The median.
pub fn median(samples: &[f64]) -> f64 {
    percentile(samples, 50.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples() {
        let samples = [5.0, 1.0, 3.0, 2.0, 4.0];
        assert_eq!(
            (median(&samples), percentile(&samples, 95.0), percentile(&samples, 0.0)),
            (3.0, 5.0, 1.0)
        );
        assert_eq!(median(&[]), 0.0);
    }
}
