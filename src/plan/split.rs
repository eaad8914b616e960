//! Which groups live on the device, which pass through it, and which are stepped in host memory.

use std::sync::OnceLock;
use std::time::Duration;

use patrickstar_actors::memory::bandwidth::adam_bandwidth;
use patrickstar_actors::memory::limits::{Available, available_host_memory};
use patrickstar_actors::types::Bytes;
use patrickstar_actors::{Side, Split, SplitCosts, SplitRoom, spread_sides};

use super::predict::update_bytes;
use super::{KnownRates, Plan};
use crate::config::{Config, Placement, Size};
use crate::train::device::is_cuda;

/// What a GPU and its host do until they have been measured: products in FLOP/s for more than a second, the link in bytes/s each
/// way while both are used, and parameters that one core steps in a second beside the GPU. Measured on an H200 with 16 cores.
pub(super) const PRODUCTS: f64 = 6.5e14;
/// What a step's operations reach of the rate of products, with all that runs between them: 0.90 to 0.97 on an H200.
const OF_PRODUCTS: f64 = 0.92;
pub(super) const LINK: f64 = 43e9;
const STEPPED_BY_CORE: f64 = 3.5e8;
/// Parameters whose update is timed where the host's memory is at hand, and how often; the best counts. Measured on 16 cores
/// beside an H200: a quarter of them partly stays in the last cache, and five repeats may all be slow while others use the
/// memory.
const TIMED: usize = 64 << 20;
const REPEATS: usize = 20;
/// What is left of that rate while a GPU is fed, the bytes of its copies not counted: 0.84 to 0.96 on five machines.
const BESIDE_A_GPU: f64 = 0.93;
/// How far off a measurement may be. Others of the same host take memory for seconds: within a minute one said 4.6 to 6.5 G a
/// second, and another 5.5 to 7.5, when what steps got stayed within a tenth of 5.1 and of 5.5.
const MAY_BE_OFF: f64 = 1.15;
/// Of the host's available memory this is left to other programs and to what is not chunks, or a tenth of less.
const LEFT_TO_OTHERS: u64 = 8 << 30;
/// A model of the user's own, whose FLOPs are not known.
const UNKNOWN_COMPUTE: Duration = Duration::from_secs(1);

impl Plan {
    /// Device chunks that a split may count on beside so much non-model memory.
    pub(super) fn room(&self, config: &Config, non_model: Bytes) -> SplitRoom {
        let precision = self.layout.precision();
        let slots = config.memory.device.0.saturating_sub(non_model.0) / self.chunk.0.max(1);
        SplitRoom {
            slots: slots.min(u64::from(self.chunks)) as u32,
            working_set: self.working_set_chunks,
            groups: self.layout.group_count() as u32,
            persistent: precision.persistent_kinds().iter().map(|&kind| self.layout.parts(kind)).sum(),
            together: config.train.clip_norm > 0.0 || precision.scales_loss(),
            tight: false,
            looked_up: self.looked_up_groups,
            below: 0,
        }
    }

    fn split(&self, config: &Config, room: &SplitRoom, kept_layers: u32) -> Split {
        match config.actors.optimizer.placement {
            Placement::Host => Split { resident: 0, streamed: 0 },
            Placement::Device => {
                let resident = room.resident_beside_a_stream();
                Split { resident, streamed: room.groups - resident }
            }
            Placement::Hybrid if is_cuda(&config.compute) => room.split(&self.costs(config, kept_layers)),
            // Where the device is the host, passing through it is a detour.
            Placement::Hybrid => Split { resident: room.most_resident(), streamed: 0 },
        }
    }

    /// How groups and slots are shared out beside so much else on the device and in host memory.
    pub(super) fn spread(&self, config: &Config, beside: Beside) -> Spread {
        let chunk = self.chunk.0;
        let slots = |bytes: u64| (bytes / chunk).min(u64::from(u32::MAX)) as u32;
        let available = match available_host_memory() {
            Available::Known(bytes) => bytes.0 - (bytes.0 / 10).min(LEFT_TO_OTHERS),
            Available::Unknown => u64::MAX,
        }
        .saturating_sub(beside.host.0);
        let capacity = |wanted: u32| match config.memory.host {
            Size::Bytes(bytes) => bytes.0.saturating_sub(beside.host.0),
            Size::Auto => available.min(u64::from(wanted).saturating_mul(chunk)),
        };
        let mut room = self.room(config, beside.device);
        let on_disk = slots(config.memory.disk.0);
        room.below = slots(capacity(u32::MAX)).saturating_add(on_disk);
        let mut split = self.split(config, &room, beside.kept_layers);
        let (mut needed, mut wanted) = self.host_slots(&room, split, config.memory.device);
        if slots(capacity(wanted)).saturating_add(on_disk) < needed {
            room.tight = true;
            split = self.split(config, &room, beside.kept_layers);
            (needed, wanted) = self.host_slots(&room, split, config.memory.device);
        }
        let host = slots(capacity(wanted)).min(wanted);
        let disk = on_disk.min(wanted);
        room.below = host + disk;
        Spread { room, split, slots: Slots { host, disk }, needed }
    }

    /// What a step computes again of what is not kept, as a part of its operations.
    pub(super) fn computed_again(&self, kept_layers: u32) -> f64 {
        self.recompute_share * (1.0 - f64::from(kept_layers) / f64::from(self.layers.max(1)))
    }

    /// What the parts of a step cost, from shapes.
    pub(super) fn costs(&self, config: &Config, kept_layers: u32) -> SplitCosts {
        // Forward and twice as much backward, and what is computed again.
        let passes = 1.0 + self.computed_again(kept_layers);
        let forward_share = 1.0 / (3.0 * passes);
        let compute = self
            .flops
            .map_or(UNKNOWN_COMPUTE, |flops| Duration::from_secs_f64(passes * flops / (OF_PRODUCTS * PRODUCTS)));
        let parameters = self.parameters as f64 / self.layout.group_count().max(1) as f64;
        let copy = Duration::from_secs_f64(self.chunk.0 as f64 / LINK);
        SplitCosts {
            compute,
            forward_share,
            host_step: Duration::from_secs_f64(parameters / stepped_a_second(config)),
            memory_share: stepping_share(config),
            to_device: copy,
            to_host: copy,
        }
    }

    /// How long a step is estimated to take: what overlaps counts once. Rates that are not `known` are those of an H200 and, for
    /// the host's updates, of this machine. `None` for what computes on the host, whose speed differs too much between machines
    /// to be guessed, and for models of the user's own, whose FLOPs are not known.
    pub fn predicted_step(&self, config: &Config, known: &KnownRates) -> Option<Duration> {
        if !is_cuda(&config.compute) || self.flops.is_none() {
            return None;
        }
        let mut costs = self.costs(config, self.kept_layers);
        if let Some(compute) = known.compute {
            costs.compute = costs.compute.mul_f64(PRODUCTS / compute);
        }
        if let Some(link) = known.link {
            (costs.to_device, costs.to_host) =
                (costs.to_device.mul_f64(LINK / link), costs.to_host.mul_f64(LINK / link));
        }
        if let Some(host) = known.host {
            let parameters = self.parameters as f64 / f64::from(self.spread.room.groups.max(1));
            let bytes = parameters * update_bytes(self.layout.precision());
            costs.host_step = Duration::from_secs_f64(bytes / (host * stepping_share(config)));
        }
        Some(self.spread.step(&costs))
    }

    /// Gradients that wait in host memory at most.
    pub(super) fn waiting_gradients(&self, config: &Config) -> u32 {
        let Spread { room, split, .. } = self.spread;
        let away = room.groups - split.resident;
        if room.together {
            return away;
        }
        // Those that do not live on the device are the first that the backward pass completes.
        let costs = self.costs(config, self.kept_layers);
        let meanwhile = costs.compute.mul_f64(1.0 - costs.forward_share) * away / room.groups.max(1);
        let stepped = meanwhile.as_secs_f64() / costs.host_step.as_secs_f64().max(1e-9);
        away.saturating_sub(stepped as u32).max(room.least_gradients(away))
    }

    /// The side of each group.
    pub fn sides(&self) -> Vec<Side> {
        let Split { resident, streamed } = self.spread.split;
        spread_sides(self.layout.group_count() as u32, self.looked_up_groups, resident, streamed)
    }

    /// Slots in host memory: what the tier must have, and what it can use.
    fn host_slots(&self, room: &SplitRoom, split: Split, device: Bytes) -> (u32, u32) {
        let away = room.groups - split.resident;
        // A neighbour may take some of the device: residents then need a place, and so do their gradients.
        let of_residents = (room.persistent + 1) * split.resident;
        let homeless = (device.0 / 4 / self.chunk.0.max(1)).min(u64::from(of_residents)) as u32;
        (room.needed_below(split), room.persistent * away + room.spare() + away + homeless)
    }
}

/// What is not chunks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Beside {
    /// On the device.
    pub device: Bytes,
    /// In host memory.
    pub host: Bytes,
    /// Layers that keep their activations.
    pub kept_layers: u32,
}

/// How groups and slots are shared out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Spread {
    pub room: SplitRoom,
    pub split: Split,
    pub slots: Slots,
    /// Slots that host memory and disk must have together.
    pub needed: u32,
}

/// Chunks below the device.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Slots {
    pub host: u32,
    pub disk: u32,
}

impl Spread {
    /// Before anything is shared out.
    pub const NOTHING: Spread = Spread {
        room: SplitRoom {
            slots: 0,
            working_set: 0,
            groups: 0,
            persistent: 0,
            together: false,
            tight: false,
            looked_up: 0,
            below: 0,
        },
        split: Split { resident: 0, streamed: 0 },
        slots: Slots { host: 0, disk: 0 },
        needed: 0,
    };

    /// How long a step is estimated to take.
    pub fn step(&self, costs: &SplitCosts) -> Duration {
        self.room.step(costs, self.split)
    }
}

/// Parameters that the host steps in a second beside a GPU, were nothing copied. A program for GPUs runs where it plans, so it
/// measures, once: hosts of the same kind differ by a third.
fn stepped_a_second(config: &Config) -> f64 {
    static MEASURED: OnceLock<Option<f64>> = OnceLock::new();
    let measure = || {
        let rate = adam_bandwidth(config.model.precision, TIMED, REPEATS);
        rate.inspect_err(|error| tracing::warn!("the host's updates cannot be timed, an estimate is used: {error}"))
            .ok()
    };
    let measured = is_cuda(&config.compute) && cfg!(feature = "cuda");
    let by_all = if measured { *MEASURED.get_or_init(|| measure().map(|rate| rate.params_per_s)) } else { None };
    let usual = STEPPED_BY_CORE * cores() as f64;
    by_all.map_or(usual, |by_all| likely(BESIDE_A_GPU * by_all, usual)) * stepping_share(config)
}

/// Between what was measured and what is usual, at most as far from the first as that may be off.
fn likely(measured: f64, usual: f64) -> f64 {
    measured * (usual / measured).sqrt().clamp(1.0 / MAY_BE_OFF, MAY_BE_OFF)
}

/// The share of the cores that step. All of them together wait for memory.
fn stepping_share(config: &Config) -> f64 {
    match config.actors.optimizer.threads {
        0 => 1.0,
        threads => (threads as f64 / cores() as f64).min(1.0),
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_measurement_counts_for_half_where_it_may_be_noise_and_prevails_elsewhere() {
        let near = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-9;
        assert!(near(likely(5.6, 5.6), 5.6));
        assert!(near(likely(6.4, 5.625), 6.0));
        assert!(near(likely(50.0, 5.0), 50.0 / MAY_BE_OFF) && near(likely(1.0, 5.0), MAY_BE_OFF));
    }
}
