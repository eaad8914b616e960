//! Learning-rate schedules: linear warm-up, then cosine, linear or constant.

use patrickstar_actors::types::Step;

use crate::config::{Schedule, Train};

/// Learning rate of `step` (the first step is 1), as in Hugging Face Trainer and nanoGPT: warm-up reaches `lr` at the
/// end of `warmup_steps`, decay ends at `min_lr` in the last step.
pub fn learning_rate(train: &Train, step: Step) -> f64 {
    let (step, warmup, total) = (step.0 as f64, train.warmup_steps as f64, train.steps as f64);
    if step < warmup {
        return train.lr * step / warmup;
    }
    let progress = if total > warmup { ((step - warmup) / (total - warmup)).min(1.0) } else { 1.0 };
    match train.schedule {
        Schedule::Constant => train.lr,
        Schedule::Linear => train.lr + (train.min_lr - train.lr) * progress,
        Schedule::Cosine => {
            let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
            train.min_lr + (train.lr - train.min_lr) * cosine
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_start_peak_and_end_where_they_should() {
        let train = Train { steps: 100, warmup_steps: 10, lr: 1.0, min_lr: 0.1, ..Train::default() };
        for (schedule, end) in [(Schedule::Constant, 1.0), (Schedule::Linear, 0.1), (Schedule::Cosine, 0.1)] {
            let train = Train { schedule, ..train.clone() };
            assert_eq!(learning_rate(&train, Step(1)), 0.1);
            assert_eq!(learning_rate(&train, Step(10)), 1.0);
            assert!((learning_rate(&train, Step(100)) - end).abs() < 1e-12, "{schedule:?}");
        }
        let middle = learning_rate(&Train { schedule: Schedule::Cosine, ..train }, Step(55));
        assert!((middle - 0.55).abs() < 1e-12);
    }
}
