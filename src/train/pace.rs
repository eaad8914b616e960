//! How fast steps follow each other, to say when a run will be over.

use std::time::Duration;

/// Share of the latest step in the mean: about the last twenty count.
const LATEST: f64 = 0.1;

/// A step as its user sees it.
#[derive(Clone, Copy, Debug)]
pub struct WholeStep {
    /// Tokens it trained on.
    pub tokens: u64,
    /// Its data included, and what it waited for the checkpoint and the validation before it.
    pub time: Duration,
    /// Of that, what it waited before it could begin because states were being saved.
    pub saving: Duration,
    /// Of that, what the loss on validation data took after the step before.
    pub validation: Duration,
    /// Until all steps are done, at the pace of the latest ones; unknown after the first.
    pub time_left: Option<Duration>,
}

/// The mean time of the latest steps.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    steps: u64,
    mean: f64,
}

impl Pace {
    /// Takes note of a step that took `time`, and returns the mean. The first step moves chunks on demand and is not what the
    /// run is like: nothing is said after it.
    pub fn after(&mut self, time: Duration) -> Option<Duration> {
        self.steps += 1;
        let share = match self.steps {
            1 => return None,
            2 => 1.0,
            _ => LATEST,
        };
        self.mean += share * (time.as_secs_f64() - self.mean);
        Some(Duration::from_secs_f64(self.mean))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_step_says_nothing_and_later_ones_change_the_mean_slowly() {
        let mut pace = Pace::default();
        assert_eq!(pace.after(Duration::from_secs(60)), None);
        assert_eq!(pace.after(Duration::from_secs(2)), Some(Duration::from_secs(2)));
        let after_outlier = pace.after(Duration::from_secs(12)).unwrap();
        assert_eq!(after_outlier, Duration::from_secs(3));
        let settled = (0..100).filter_map(|_| pace.after(Duration::from_secs(1))).last().unwrap();
        assert!((settled.as_secs_f64() - 1.0).abs() < 1e-3, "{settled:?}");
    }
}
