//! Dynamic loss scaling (Micikevicius et al., "Mixed precision training", ICLR 2018).

use patrickstar_actors::types::{Precision, Step};
use serde::{Deserialize, Serialize};

/// PyTorch's first scale and growth interval.
const FIRST: f32 = 65_536.0;
const GROWTH_INTERVAL: u64 = 2000;
const LARGEST: f32 = 16_777_216.0;

/// What the loss is multiplied with before gradients are taken, always a power of two; and how many updates were made.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    /// The factor.
    pub scale: f32,
    /// Updates since it last changed.
    pub since_change: u64,
    /// Updates in all: steps without those whose gradients overflowed.
    pub updates: Step,
}

impl LossScale {
    /// Before the first step.
    pub fn new(precision: Precision) -> Self {
        let scale = if precision.scales_loss() { FIRST } else { 1.0 };
        LossScale { scale, since_change: 0, updates: Step(0) }
    }

    /// After `steps` steps of a precision that needs no scale.
    pub fn unscaled(steps: Step) -> Self {
        LossScale { scale: 1.0, since_change: 0, updates: steps }
    }

    /// After a step. `None` when gradients overflow although nothing is scaled up any more.
    #[must_use]
    pub fn after(self, precision: Precision, overflow: bool) -> Option<Self> {
        if overflow {
            return (self.scale > 1.0).then_some(LossScale { scale: self.scale / 2.0, since_change: 0, ..self });
        }
        let updates = Step(self.updates.0 + 1);
        let since_change = self.since_change + 1;
        if precision.scales_loss() && since_change >= GROWTH_INTERVAL && self.scale < LARGEST {
            return Some(LossScale { scale: self.scale * 2.0, since_change: 0, updates });
        }
        Some(LossScale { since_change, updates, ..self })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overflow_halves_and_a_long_quiet_time_doubles() {
        let fp16 = Precision::Fp16;
        let mut scale = LossScale::new(fp16).after(fp16, true).unwrap();
        assert_eq!((scale.scale, scale.updates), (FIRST / 2.0, Step(0)));
        for _ in 0..GROWTH_INTERVAL {
            assert_eq!(scale.scale, FIRST / 2.0);
            scale = scale.after(fp16, false).unwrap();
        }
        assert_eq!((scale.scale, scale.since_change, scale.updates), (FIRST, 0, Step(GROWTH_INTERVAL)));
        let least = LossScale { scale: 1.0, ..scale };
        assert_eq!(least.after(fp16, true), None);
    }

    #[test]
    fn other_precisions_are_never_scaled() {
        let mut scale = LossScale::new(Precision::Bf16);
        for _ in 0..2 * GROWTH_INTERVAL {
            scale = scale.after(Precision::Bf16, false).unwrap();
        }
        assert_eq!((scale.scale, scale.updates), (1.0, Step(2 * GROWTH_INTERVAL)));
    }
}
