//! A plan in words.

use std::time::Duration;

use patrickstar_actors::types::Bytes;

use super::{Bound, Plan};

impl Plan {
    /// One line for the start of a run.
    pub fn headline(&self) -> String {
        let device = self.tiers.first();
        format!(
            "{} parameters, {} of states in {} chunks of {} ({:.1} % waste); device {} ({} for chunks); of {} groups {} live there, {} pass through to be stepped",
            self.parameters,
            self.model_states,
            self.chunks,
            self.chunk,
            100.0 * self.waste,
            device.map_or(Bytes(0), |tier| tier.capacity),
            device.map_or(Bytes(0), |tier| tier.chunk_budget),
            self.layout.group_count(),
            self.split.resident,
            self.split.streamed,
        )
    }

    /// The whole plan.
    pub fn lines(&self, bound: &Bound, predicted: Option<Duration>) -> Vec<String> {
        let mut lines = vec![self.headline()];
        for tier in &self.tiers {
            lines.push(format!(
                "{:6}  capacity {:>10}  for chunks {:>10}  predicted peak {:>10} + {} not chunks",
                tier.tier.to_string(),
                tier.capacity.to_string(),
                tier.chunk_budget.to_string(),
                tier.chunk_peak.to_string(),
                tier.non_model,
            ));
            for (kind, bytes) in &tier.peak_by_kind {
                lines.push(format!("          {:10} {bytes}", kind.name()));
            }
        }
        lines.push(format!(
            "a step  {} to the device, {} back, {} through the host optimizer",
            self.host_to_device, self.device_to_host, self.optimizer_bytes
        ));
        if let Some(flops) = self.flops {
            lines.push(format!("        {:.3} TFLOP without recompute", flops / 1e12));
        }
        lines.push(format!(
            "        of {} layers {} keep their activations{}, the others are computed again, {} from inputs in host memory",
            self.layers,
            self.kept_layers,
            if self.frugal { " but for what is cheap" } else { "" },
            self.away_layers
        ));
        lines.push(bound.line());
        lines.extend(predicted.map(|step| format!("predict {:.3} s a step", step.as_secs_f64())));
        lines.push(match self.refusal() {
            None => "fits".to_owned(),
            Some(reason) => reason,
        });
        lines
    }
}
