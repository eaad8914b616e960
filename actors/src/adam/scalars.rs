//! What a step needs besides the chunks, computed once on the host so that no device rounds it differently.

use crate::types::Step;

/// Hyperparameters of Adam that stay the same over a training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamConfig {
    /// Decay of the momentum.
    pub beta1: f64,
    /// Decay of the variance.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Strength of the weight decay.
    pub weight_decay: f64,
    /// `true`: AdamW, the weight shrinks. `false`: Adam, the decay is added to the gradient.
    pub decoupled: bool,
}

impl Default for AdamConfig {
    fn default() -> Self {
        AdamConfig { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, decoupled: true }
    }
}

/// The scalars of one step, each rounded once from f64 to f32, as PyTorch does with Python numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepScalars {
    /// Multiplies the gradient first; 1.0 leaves every bit of it.
    pub gradient_scale: f32,
    /// `1 - lr * weight_decay` for AdamW; 1.0, which changes no bit, where the weight does not shrink.
    pub shrink: f32,
    /// Multiple of the weight added to the gradient (Adam only; 0.0 for AdamW).
    pub l2: f32,
    /// Multiplies `gradient - momentum`: `1 - beta1`, or `-beta1` where `lerp_from_gradient`.
    pub lerp: f32,
    /// As `torch.lerp`: interpolate from the nearer end, which is the gradient when `1 - beta1 >= 0.5`.
    pub lerp_from_gradient: bool,
    /// Decay of the variance.
    pub beta2: f32,
    /// `1 - beta2`.
    pub one_minus_beta2: f32,
    /// `sqrt(1 - beta2^step)`.
    pub sqrt_correction2: f32,
    /// Added to the denominator.
    pub eps: f32,
    /// `-lr / (1 - beta1^step)`.
    pub negative_step_size: f32,
}

impl StepScalars {
    /// Scalars of `step`, which counts from 1: the bias corrections of step 0 do not exist, and those of 1 stand in.
    pub fn new(config: &AdamConfig, lr: f64, step: Step, gradient_scale: f32) -> Self {
        let step = step.0.max(1) as f64;
        let weight = 1.0 - config.beta1;
        // `torch.lerp` rounds the weight to f32 before it compares and before it subtracts one.
        let weight_f32 = weight as f32;
        let lerp_from_gradient = weight_f32 >= 0.5;
        let shrink = if config.decoupled { 1.0 - lr * config.weight_decay } else { 1.0 };
        StepScalars {
            gradient_scale,
            shrink: shrink as f32,
            l2: if config.decoupled { 0.0 } else { config.weight_decay as f32 },
            lerp: if lerp_from_gradient { weight_f32 - 1.0 } else { weight_f32 },
            lerp_from_gradient,
            beta2: config.beta2 as f32,
            one_minus_beta2: (1.0 - config.beta2) as f32,
            sqrt_correction2: (1.0 - config.beta2.powf(step)).sqrt() as f32,
            eps: config.eps as f32,
            negative_step_size: (-lr / (1.0 - config.beta1.powf(step))) as f32,
        }
    }
}
