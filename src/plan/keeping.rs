//! Which activations are kept for the backward pass, and where inputs of blocks wait for it.

use std::time::Duration;

use patrickstar_actors::types::Bytes;

use super::split::Beside;
use super::{Keeping, Plan};
use crate::config::{Boundaries, Config, Recompute};
use crate::model::gpt2;
use crate::train::device::is_cuda;

/// Of settings predicted to be as fast within this part of a step, the one that keeps least: memory that is left is worth more
/// to chunks than the prediction knows.
const AS_FAST: f64 = 0.005;
/// Chunks leave the device for activations where that is predicted to shorten a step by this part.
const WORTH_IT: f64 = 0.03;

impl Plan {
    /// What is kept where. All activations, where they find a place beside a model that lives on the device as a whole; else
    /// those of as many layers as make a step shortest, which on a GPU may mean that some chunks live in host memory for them.
    /// Where nothing is kept inputs of layers go to host memory if chunks have no room beside them. With a static share
    /// whatever finds a place in the rest. `beside` tells what other memory a choice needs.
    pub(super) fn keeping(&self, config: &Config, kept: Keeping, beside: &dyn Fn(Keeping) -> Beside) -> Keeping {
        let layers = self.layers as usize;
        let room = |keeping: Keeping| self.room(config, beside(keeping).device);
        // Beside a static share chunks have no use for what activations leave.
        let in_the_rest = |keeping: Keeping| {
            let chunks = config.memory.fixed_chunks()?;
            Some(beside(keeping).device.0 + chunks.0 <= config.memory.device.0)
        };
        if config.train.recompute == Recompute::Auto {
            let fits = |keeping: &Keeping| in_the_rest(*keeping).unwrap_or_else(|| room(*keeping).holds_all());
            let all = Keeping { layers, ..Keeping::default() };
            if fits(&all) {
                return all;
            }
            // Two thirds more find a place if they leave out what is cheap.
            let most = (1..=layers).map(frugal).take_while(fits).last();
            let worth_more = |most| self.worth_more_than_chunks(config, most, beside);
            if let Some(keeping) = most.map_or_else(|| worth_more(0), |most| worth_more(most.layers).or(Some(most))) {
                return keeping;
            }
        }
        if config.train.boundaries == Boundaries::Device {
            return kept;
        }
        let keeping = |away: usize| Keeping { away, ..kept };
        let most = layers - kept.layers;
        let fits =
            |keeping: Keeping| in_the_rest(keeping).unwrap_or_else(|| room(keeping).slots >= self.flowing(config));
        keeping((0..=most).find(|&away| fits(keeping(away))).unwrap_or(most))
    }

    /// Whether activations were known before any step: those of a model of the user's own are not.
    pub(crate) fn knows_activations(&self) -> bool {
        self.flops.is_some()
    }

    /// Device memory set aside for activations: buffers that are kept beside them are not theirs.
    pub(super) fn for_activations(&self) -> Bytes {
        Bytes(self.reserved.0.saturating_sub(self.buffers.0))
    }

    /// Lets as many layers of a model of the user's own keep their activations as find a place in what was set aside: `each`
    /// of a block, beside the `peak` of a step that kept none. Returns how many blocks do.
    pub(crate) fn keep_measured(&mut self, config: &Config, each: Bytes, peak: Bytes) -> u32 {
        let set_aside = self.for_activations().0;
        let usable = if is_cuda(&config.compute) { gpt2::unfragmented(set_aside) } else { set_aside };
        // Where nothing counts allocations nothing was measured.
        let Some(fitting) = usable.saturating_sub(peak.0).checked_div(each.0) else { return 0 };
        // All layers do with the first block or not at all.
        let blocks = match fitting.min(u64::from(self.layers) + 1) as u32 {
            blocks if blocks > self.layers => blocks,
            blocks => blocks.min(self.layers.saturating_sub(1)),
        };
        self.kept_layers = blocks.min(self.layers);
        self.measured = Bytes(peak.0 + each.0 * u64::from(blocks));
        blocks
    }

    /// Slots with which the model goes on while chunks travel: on a GPU a block's come while another's are used.
    fn flowing(&self, config: &Config) -> u32 {
        if is_cuda(&config.compute) { 2 * self.working_set_chunks } else { self.working_set_chunks }
    }

    /// More than `least` layers whose activations are worth more than the chunks whose place they take: what is not computed
    /// again shortens a step as long as the host hides the updates that it gets instead, and has memory for their states. On
    /// the host the two memories are one.
    fn worth_more_than_chunks(
        &self,
        config: &Config,
        least: usize,
        beside: &dyn Fn(Keeping) -> Beside,
    ) -> Option<Keeping> {
        if !is_cuda(&config.compute) || config.memory.fixed_chunks().is_some() {
            return None;
        }
        let step = |layers: usize| -> Option<Duration> {
            let others = beside(frugal(layers));
            let spread = self.spread(config, others);
            let flows = spread.room.holds_all() || spread.room.slots >= self.flowing(config);
            // Disk is too slow to hide behind anything.
            let has_a_place = spread.slots.host >= spread.needed;
            (flows && has_a_place || layers == least).then(|| spread.step(&self.costs(config, others.kept_layers)))
        };
        let steps: Vec<(usize, Duration)> =
            (least..=self.layers as usize).map_while(|layers| Some((layers, step(layers)?))).collect();
        let shortest = steps.iter().map(|&(_, step)| step).min()?;
        let (layers, step) = *steps.iter().find(|&&(_, step)| step <= shortest.mul_f64(1.0 + AS_FAST))?;
        (layers > least && step < steps.first()?.1.mul_f64(1.0 - WORTH_IT)).then(|| frugal(layers))
    }
}

/// So many layers keep what is not cheap.
fn frugal(layers: usize) -> Keeping {
    Keeping { layers, frugal: layers > 0, away: 0 }
}

#[cfg(test)]
mod tests {
    use crate::config::Sources;
    use crate::data::Tokenizer;
    use crate::plan::Plan;
    use crate::train::model::build;
    use crate::train::program::Program;

    #[test]
    fn a_job_that_runs_is_planned_with_the_activations_that_it_keeps() {
        let planned = |device: &str, before: Option<&Plan>| {
            let sets = ["compute.device=cuda", "model.preset=6b", "model.precision=bf16", "train.batch=16"];
            let more = ["train.seq_len=1024", "memory.chunk=256MiB", "memory.host=56GB", device];
            let sets = sets.iter().chain(&more).map(|set| set.to_string()).collect();
            let mut config = Sources::process(None, sets).load().unwrap().config;
            let (_, blocks) = build(&mut config, &Tokenizer::Bytes).unwrap();
            let program = Program::new(&blocks, config.model.embedding).unwrap();
            before.map_or_else(|| Plan::new(&config, &program), |before| before.again(&config, &program)).unwrap()
        };
        let running = planned("memory.device=200GB", None);
        assert_eq!((running.fits(), running.kept_layers), (true, running.layers));
        // A fresh job would compute again what has no place; one that runs cannot, and is refused.
        let fresh = planned("memory.device=70GB", None);
        assert!(fresh.fits() && fresh.kept_layers < running.kept_layers, "{fresh:?}");
        let again = planned("memory.device=70GB", Some(&running));
        assert_eq!(again.kept_layers, running.kept_layers);
        assert!(again.refusal().is_some_and(|reason| reason.contains("memory.device")), "{again:?}");
    }
}
