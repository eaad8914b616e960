//! A model without candle: blocks whose gradients depend on their weights, so that any stale or torn weight changes all
//! later bits.

use std::sync::Arc;
use std::time::Duration;

use patrickstar_actors::adam::{AdamConfig, narrow_fp16, widen_fp16};
use patrickstar_actors::chunk::{Layout, TensorSpec};
use patrickstar_actors::error::RuntimeError;
use patrickstar_actors::health::ActorName;
use patrickstar_actors::memory::{Backend, CpuBackend};
use patrickstar_actors::monitor::{MemoryProbe, NoProbe};
use patrickstar_actors::runtime::{Runtime, RuntimeConfig, StepStart, StepStats};
use patrickstar_actors::schedule::Policy;
use patrickstar_actors::timeline::Timeline;
use patrickstar_actors::types::{Bytes, ChunkId, GroupId, Kind, Precision, Step, TensorId, Tier};
use patrickstar_actors::{Access, EvictionPolicy, Retune, SplitCosts, SplitRoom, spread_sides};

pub const CHUNK: u64 = 16 << 10;
pub const BLOCKS: usize = 8;

/// A model of `BLOCKS` blocks with two tensors each; the first tensor is tied: the last block uses it too.
pub fn specs() -> Vec<TensorSpec> {
    (0..2 * BLOCKS)
        .map(|index| TensorSpec {
            name: format!("t{index}"),
            rows: 24 + index,
            columns: 64,
            tile_rows: None,
            decay: index % 2 == 0,
        })
        .collect()
}

fn uses(block: usize) -> Vec<TensorId> {
    let mut uses = vec![TensorId(2 * block as u32), TensorId(2 * block as u32 + 1)];
    if block == BLOCKS - 1 {
        uses.push(TensorId(0));
    }
    uses
}

/// All groups are stepped in host memory, or on the device without staying there.
pub const HOST: (u32, u32) = (0, 0);
pub const DEVICE: (u32, u32) = (0, u32::MAX);

/// A host so slow that groups pass through the device.
pub const GUESS: SplitCosts = SplitCosts {
    compute: Duration::from_millis(10),
    forward_share: 0.25,
    host_step: Duration::from_secs(1),
    memory_share: 0.25,
    to_device: Duration::from_micros(10),
    to_host: Duration::from_micros(10),
};

#[derive(Clone)]
pub struct Case {
    pub precision: Precision,
    pub device_slots: u64,
    pub host_slots: u32,
    pub disk_slots: u32,
    pub policy: Policy,
    pub prefetch: u32,
    /// Groups that live on the device, and groups that pass through it to be stepped.
    pub sides: (u32, u32),
    /// Groups change sides while training, by what steps cost, and by a guess of that before.
    pub splits: bool,
    pub clip_norm: f64,
    /// Chunks keep all slots, whatever is measured and whoever takes memory.
    pub fixed_share: bool,
    pub kill: Option<ActorName>,
}

impl Case {
    pub fn resident(precision: Precision, clip_norm: f64) -> Self {
        Case {
            precision,
            device_slots: 1000,
            host_slots: 200,
            disk_slots: 0,
            policy: Policy::Opt,
            prefetch: 4,
            sides: HOST,
            splits: false,
            clip_norm,
            fixed_share: false,
            kill: None,
        }
    }
}

pub struct Model {
    pub runtime: Runtime,
    /// Changes the device's memory at random moments of a step.
    pub neighbour: Option<u64>,
    pub precision: Precision,
}

pub fn chunks(layout: &Layout, block: usize, kind: Kind) -> Vec<ChunkId> {
    let mut chunks: Vec<ChunkId> = uses(block)
        .into_iter()
        .flat_map(|tensor| layout.tiles(tensor).iter().flat_map(|tile| layout.group_chunks(tile.group, kind)).copied())
        .collect();
    chunks.sort();
    chunks.dedup();
    chunks
}

impl Model {
    pub fn new(case: &Case) -> Result<Self, RuntimeError> {
        Self::on(Arc::new(CpuBackend), Arc::new(NoProbe), case)
    }

    /// The model on a device of another kind, or with temporaries that count.
    pub fn on(backend: Arc<dyn Backend>, probe: Arc<dyn MemoryProbe>, case: &Case) -> Result<Self, RuntimeError> {
        let layout = Layout::new(&specs(), case.precision, Bytes(CHUNK)).expect("layout");
        let mut gradient_uses = vec![0; layout.group_count()];
        for block in 0..BLOCKS {
            for chunk in chunks(&layout, block, Kind::Gradient) {
                gradient_uses[layout.chunk(chunk).group.0 as usize] += 1;
            }
        }
        let (resident, streamed) = case.sides;
        let sides = spread_sides(layout.group_count() as u32, 0, resident, streamed);
        let persistent = case.precision.persistent_kinds().iter().map(|&kind| layout.parts(kind)).sum();
        let room = SplitRoom {
            slots: case.device_slots as u32,
            working_set: 6,
            groups: layout.group_count() as u32,
            persistent,
            together: case.clip_norm > 0.0 || case.precision.scales_loss(),
            tight: false,
            looked_up: 0,
            below: case.host_slots + case.disk_slots,
        };
        let disk = std::env::temp_dir().join(format!("patrickstar-test-{}-{:p}", std::process::id(), &layout));
        let config = RuntimeConfig {
            device: Bytes(case.device_slots * CHUNK),
            non_model: Bytes(0),
            host_slots: case.host_slots,
            disk_slots: case.disk_slots,
            disk_path: disk,
            eviction: EvictionPolicy { policy: case.policy, prefetch: case.prefetch },
            sides,
            split: case.splits.then_some((room, GUESS)),
            adam: AdamConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, decoupled: true },
            clip_norm: case.clip_norm,
            mailbox: 4,
            optimizer_threads: 2,
            fixed_share: case.fixed_share,
            headroom: 0.0,
            monitor_interval: Duration::from_millis(5),
        };
        let runtime = Runtime::start(layout, config, gradient_uses, backend, probe, Arc::new(Timeline::default()))?;
        let model = Model { runtime, neighbour: None, precision: case.precision };
        let layout = model.runtime.layout();
        for (index, info) in layout.chunks().iter().enumerate().filter(|(_, info)| info.kind != Kind::Gradient) {
            let (chunk, kind) = (ChunkId(index as u32), info.kind);
            let group = info.group;
            let first = info.part as usize * layout.part_elements();
            match kind {
                Kind::Weight => model.runtime.initialise(&[chunk], |bytes| fill(bytes[0], group, 0, case.precision))?,
                Kind::Master => {
                    model.runtime.initialise(&[chunk], |bytes| fill(bytes[0], group, first, Precision::Fp32))?;
                }
                _ => model.runtime.clear(&[chunk])?,
            }
        }
        Ok(model)
    }

    pub fn step(&mut self, step: u64) -> Result<(), RuntimeError> {
        self.run(StepStart::new(Step(step), 1e-2), None).map(drop)
    }

    /// A step whose fp16 gradients are multiplied by `factor` before they are released for good.
    pub fn run(&mut self, start: StepStart, factor: Option<f32>) -> Result<StepStats, RuntimeError> {
        self.runtime.begin_step(start)?;
        for block in 0..BLOCKS - 1 {
            self.disturb();
            let request = self.weights(block);
            let lease = self.runtime.access(|| format!("forward {block}"), Tier::Device, request)?;
            self.runtime.release_forward(lease)?;
        }
        for block in (0..BLOCKS).rev() {
            self.disturb();
            let layout = self.runtime.layout().clone();
            let mut request = self.weights(block);
            request.extend(chunks(&layout, block, Kind::Gradient).into_iter().map(|chunk| (chunk, Access::Fresh)));
            let lease = self.runtime.access(|| format!("backward {block}"), Tier::Device, request)?;
            for tensor in uses(block) {
                for tile in layout.tiles(tensor) {
                    let elements = tile.rows * 64;
                    let weight = lease.address_of(layout.group_chunks(tile.group, Kind::Weight)[0]).expect("leased");
                    let gradient =
                        lease.address_of(layout.group_chunks(tile.group, Kind::Gradient)[0]).expect("leased");
                    accumulate(self.precision, weight, gradient, tile.offset, elements, block);
                    // Every tensor's last use is in the first block that has it.
                    if let Some(factor) = factor.filter(|_| (0..block).all(|earlier| !uses(earlier).contains(&tensor)))
                    {
                        multiply_fp16(gradient, tile.offset, elements, factor);
                    }
                }
            }
            self.runtime.release_backward(lease)?;
        }
        let stats = self.runtime.end_step()?;
        let device = self.runtime.tier_use(Tier::Device);
        assert!(device.used <= device.capacity);
        Ok(stats)
    }

    fn disturb(&mut self) {
        let Some(state) = &mut self.neighbour else { return };
        *state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
        let device = Some(Bytes((12 + (*state >> 33) % 49) * CHUNK));
        if *state >> 62 == 0 {
            self.runtime.retune(Retune { device, ..Retune::default() }).expect("retune");
        }
        std::thread::sleep(Duration::from_millis(1));
    }

    /// Waits until the device's slots have as much memory as that.
    pub fn await_capacity(&self, slots: u64) {
        self.runtime.retune(Retune { device: Some(Bytes(slots * CHUNK)), ..Retune::default() }).expect("retune");
        let began = std::time::Instant::now();
        while self.runtime.tier_use(Tier::Device).capacity != Bytes(slots * CHUNK) {
            assert!(began.elapsed().as_secs() < 60, "{:?}", self.runtime.tier_use(Tier::Device));
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn weights(&self, block: usize) -> Vec<(ChunkId, Access)> {
        chunks(self.runtime.layout(), block, Kind::Weight).into_iter().map(|chunk| (chunk, Access::Read)).collect()
    }

    /// All states, in chunk order.
    pub fn states(&self) -> Result<Vec<u8>, RuntimeError> {
        self.runtime.drain()?;
        let mut all = Vec::new();
        for group in 0..self.runtime.layout().group_count() {
            for &kind in self.precision.persistent_kinds() {
                let chunks = self.runtime.layout().group_chunks(GroupId(group as u32), kind).to_vec();
                self.runtime.read(&chunks, |slices| slices.iter().for_each(|slice| all.extend_from_slice(slice)))?;
            }
        }
        Ok(all)
    }
}

fn fill(bytes: &mut [u8], group: GroupId, first: usize, precision: Precision) {
    let value = |index: usize| (((first + index) * 37 + group.0 as usize * 101) % 97) as f32 / 97.0 - 0.5;
    match precision {
        Precision::Fp32 => {
            bytes.chunks_exact_mut(4).enumerate().for_each(|(i, out)| out.copy_from_slice(&value(i).to_ne_bytes()))
        }
        Precision::Bf16 => bytes
            .chunks_exact_mut(2)
            .enumerate()
            .for_each(|(i, out)| out.copy_from_slice(&((value(i).to_bits() >> 16) as u16).to_ne_bytes())),
        Precision::Fp16 => bytes
            .chunks_exact_mut(2)
            .enumerate()
            .for_each(|(i, out)| out.copy_from_slice(&narrow_fp16(value(i)).to_ne_bytes())),
    }
}

/// A gradient that depends on the weights.
fn accumulate(precision: Precision, weight: *mut u8, gradient: *mut u8, offset: usize, elements: usize, block: usize) {
    let slope = |w: f32, i: usize| (w * 3.0 + (i % 7) as f32 * 0.01) * (1.0 + block as f32 * 0.1);
    for i in offset..offset + elements {
        // SAFETY: the caller's lease covers `elements` from `offset` in both chunks.
        unsafe {
            match precision {
                Precision::Fp32 => *gradient.cast::<f32>().add(i) += slope(*weight.cast::<f32>().add(i), i),
                Precision::Bf16 => {
                    let widen = |bits: u16| f32::from_bits(u32::from(bits) << 16);
                    let target = gradient.cast::<u16>().add(i);
                    let sum = widen(*target) + slope(widen(*weight.cast::<u16>().add(i)), i);
                    *target = (sum.to_bits() >> 16) as u16;
                }
                Precision::Fp16 => {
                    let target = gradient.cast::<u16>().add(i);
                    let sum = widen_fp16(*target) + slope(widen_fp16(*weight.cast::<u16>().add(i)), i);
                    *target = narrow_fp16(sum);
                }
            }
        }
    }
}

fn multiply_fp16(gradient: *mut u8, offset: usize, elements: usize, factor: f32) {
    for i in offset..offset + elements {
        // SAFETY: the caller's lease covers `elements` from `offset`.
        unsafe {
            let target = gradient.cast::<u16>().add(i);
            *target = narrow_fp16(widen_fp16(*target) * factor);
        }
    }
}

pub fn train(case: &Case) -> Vec<u8> {
    let mut model = Model::new(case).expect("start");
    for step in 1..=4 {
        if let (Some(actor), 2) = (case.kill, step) {
            model.runtime.plant_panic(actor);
        }
        model.step(step).unwrap_or_else(|error| panic!("step {step}: {error}"));
    }
    let states = model.states().expect("states");
    if let Some(actor) = case.kill {
        let status = model.runtime.actors();
        let restarts = status.iter().find(|status| status.actor == actor.name()).map(|status| status.restarts);
        assert_eq!(restarts, Some(1), "{actor:?} was killed and restored once");
    }
    states
}
