//! The runtime under a model without candle: whatever the budget, policy, side or fault, the same bits.

#![expect(unsafe_code, reason = "tests bind parameters and call kernels by address")]
#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed assumption should stop a test

use std::sync::Arc;
use std::time::Duration;

use patrickstar_actors::adam::{AdamConfig, narrow_fp16, widen_fp16};
use patrickstar_actors::chunk::{Layout, TensorSpec};
use patrickstar_actors::error::RuntimeError;
use patrickstar_actors::health::ActorName;
use patrickstar_actors::memory::CpuBackend;
use patrickstar_actors::monitor::NoProbe;
use patrickstar_actors::runtime::{Runtime, RuntimeConfig, StepStart, StepStats};
use patrickstar_actors::schedule::Policy;
use patrickstar_actors::stats::{Direction, Pressure};
use patrickstar_actors::timeline::Timeline;
use patrickstar_actors::types::{Bytes, ChunkId, GroupId, Kind, Precision, Step, TensorId, Tier};
use patrickstar_actors::{Access, EvictionPolicy, Retune, SplitCosts, SplitRoom, spread_sides};

const CHUNK: u64 = 16 << 10;
const BLOCKS: usize = 8;

/// A model of `BLOCKS` blocks with two tensors each; the first tensor is tied: the last block uses it too.
fn specs() -> Vec<TensorSpec> {
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
const HOST: (u32, u32) = (0, 0);
const DEVICE: (u32, u32) = (0, u32::MAX);

/// A host so slow that groups pass through the device.
const GUESS: SplitCosts = SplitCosts {
    compute: Duration::from_millis(10),
    forward_share: 0.25,
    host_step: Duration::from_secs(1),
    memory_share: 0.25,
    to_device: Duration::from_micros(10),
    to_host: Duration::from_micros(10),
};

#[derive(Clone)]
struct Case {
    precision: Precision,
    device_slots: u64,
    host_slots: u32,
    disk_slots: u32,
    policy: Policy,
    prefetch: u32,
    /// Groups that live on the device, and groups that pass through it to be stepped.
    sides: (u32, u32),
    /// Groups change sides while training, by what steps cost, and by a guess of that before.
    splits: bool,
    clip_norm: f64,
    kill: Option<ActorName>,
}

impl Case {
    fn resident(precision: Precision, clip_norm: f64) -> Self {
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
            kill: None,
        }
    }
}

struct Model {
    runtime: Runtime,
    /// Changes the device's memory at random moments of a step.
    neighbour: Option<u64>,
    precision: Precision,
}

fn chunks(layout: &Layout, block: usize, kind: Kind) -> Vec<ChunkId> {
    let mut chunks: Vec<ChunkId> = uses(block)
        .into_iter()
        .flat_map(|tensor| layout.tiles(tensor).iter().flat_map(|tile| layout.group_chunks(tile.group, kind)).copied())
        .collect();
    chunks.sort();
    chunks.dedup();
    chunks
}

impl Model {
    fn new(case: &Case) -> Result<Self, RuntimeError> {
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
            headroom: 0.0,
            monitor_interval: Duration::from_millis(5),
        };
        let runtime = Runtime::start(
            layout,
            config,
            gradient_uses,
            Arc::new(CpuBackend),
            Arc::new(NoProbe),
            Arc::new(Timeline::default()),
        )?;
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

    fn step(&mut self, step: u64) -> Result<(), RuntimeError> {
        self.run(StepStart::new(Step(step), 1e-2), None).map(drop)
    }

    /// A step whose fp16 gradients are multiplied by `factor` before they are released for good.
    fn run(&mut self, start: StepStart, factor: Option<f32>) -> Result<StepStats, RuntimeError> {
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
    fn await_capacity(&self, slots: u64) {
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
    fn states(&self) -> Result<Vec<u8>, RuntimeError> {
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

/// A gradient that depends on the weights, so that any stale or torn weight changes all later bits.
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

fn train(case: &Case) -> Vec<u8> {
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

#[test]
fn states_are_the_same_bits_whatever_the_budget_policy_and_side() {
    for precision in [Precision::Fp32, Precision::Bf16, Precision::Fp16] {
        for clip_norm in [0.0, 1.0] {
            let reference = train(&Case::resident(precision, clip_norm));
            for sides in [HOST, DEVICE, (2, 0), (1, 3)] {
                for policy in [Policy::Opt, Policy::Lru, Policy::Static] {
                    for (device_slots, prefetch) in [(9, 0), (10, 3), (24, 8)] {
                        let resident = Case::resident(precision, clip_norm);
                        let case = Case { device_slots, policy, prefetch, sides, ..resident };
                        let what = format!("{precision:?} clip {clip_norm} {sides:?} {policy:?} {device_slots} slots");
                        assert!(train(&case) == reference, "{what}");
                    }
                }
            }
        }
    }
}

#[test]
fn states_are_the_same_bits_from_disk() {
    for precision in [Precision::Fp32, Precision::Bf16, Precision::Fp16] {
        let resident = Case::resident(precision, 1.0);
        let reference = train(&resident);
        for sides in [HOST, DEVICE, (1, 3)] {
            let case = Case { device_slots: 9, host_slots: 14, disk_slots: 100, sides, ..resident.clone() };
            assert!(train(&case) == reference, "{precision:?} {sides:?}");
        }
    }
}

/// The smallest host tier that a plan accepts: a place for the states that do not live on the device, and for few gradients
/// where they are used up as they come.
#[test]
fn a_host_tier_without_a_place_for_residents_is_enough() {
    for precision in [Precision::Fp32, Precision::Bf16, Precision::Fp16] {
        let layout = Layout::new(&specs(), precision, Bytes(CHUNK)).expect("layout");
        let groups = layout.group_count() as u32;
        let persistent: u32 = precision.persistent_kinds().iter().map(|&kind| layout.parts(kind)).sum();
        for clip_norm in [0.0, 1.0] {
            let resident = Case::resident(precision, clip_norm);
            let reference = train(&resident);
            for sides in [(2, 0), (2, 1), (groups - 1, 0), (groups, 0)] {
                let away = groups - sides.0;
                let gradients = if clip_norm > 0.0 || precision.scales_loss() { away } else { away.min(4) };
                let host_slots = persistent * away + gradients + 2 + persistent;
                let device_slots = u64::from(sides.0 * (persistent + 1) + 2 * 6 + 2 * (persistent + 1));
                let case = Case { device_slots, host_slots, sides, ..resident.clone() };
                assert!(train(&case) == reference, "{precision:?} clip {clip_norm} {sides:?}");
            }
        }
    }
}

#[test]
fn every_actor_may_die_in_the_middle_of_its_work() {
    let base = Case {
        device_slots: 9,
        host_slots: 14,
        disk_slots: 100,
        sides: (1, 3),
        ..Case::resident(Precision::Fp32, 1.0)
    };
    let reference = train(&Case::resident(Precision::Fp32, 1.0));
    // The monitor works once, after the warm-up step, so its panic is planted through a retune below.
    for actor in ActorName::ALL.into_iter().filter(|&actor| actor != ActorName::Monitor) {
        assert!(train(&Case { kill: Some(actor), ..base.clone() }) == reference, "{actor:?}");
    }
    let mut model = Model::new(&base).expect("start");
    for step in 1..=4 {
        if step == 3 {
            model.runtime.plant_panic(ActorName::Monitor);
            model.runtime.retune(Retune { device: Some(Bytes(12 * CHUNK)), ..Retune::default() }).expect("retune");
        }
        model.step(step).expect("step");
    }
    assert!(model.states().expect("states") == reference, "monitor");
}

#[test]
fn a_step_whose_gradients_overflow_updates_nothing_and_the_next_one_goes_on() {
    let case = Case::resident(Precision::Fp16, 1.0);
    let (mut model, mut undisturbed) = (Model::new(&case).expect("start"), Model::new(&case).expect("start"));
    let start = |step, update, loss_scale| StepStart { step: Step(step), update: Step(update), lr: 1e-2, loss_scale };
    model.step(1).expect("step 1");
    undisturbed.step(1).expect("step 1");
    let before = model.states().expect("states");
    let overflowed = model.run(start(2, 2, 1.0), Some(f32::INFINITY)).expect("step 2");
    assert!(overflowed.overflow && !overflowed.gradient_norm.is_finite());
    assert_eq!(overflowed.stats.stepped_on_host + overflowed.stats.stepped_on_device, 0);
    assert!(model.states().expect("states") == before, "an overflow changed states");
    let next = model.run(start(3, 2, 1.0), None).expect("step 3");
    assert!(!next.overflow);
    undisturbed.step(2).expect("step 2");
    assert!(model.states().expect("states") == undisturbed.states().expect("states"));
    // Gradients of a loss times two, divided by two: the same update, since nothing rounds differently.
    let mut scaled = Model::new(&case).expect("start");
    scaled.run(start(1, 1, 2.0), Some(2.0)).expect("scaled step");
    assert!(scaled.states().expect("states") == before);
}

#[test]
fn retuning_while_training_does_not_change_the_bits() {
    let case = Case { device_slots: 20, ..Case::resident(Precision::Fp32, 0.0) };
    let reference = train(&Case::resident(Precision::Fp32, 0.0));
    let mut model = Model::new(&case).expect("start");
    for step in 1..=4u64 {
        let policy = [Policy::Lru, Policy::Static, Policy::Opt][step as usize % 3];
        let device = Some(Bytes([20, 9, 14, 10][step as usize - 1] * CHUNK));
        let prefetch = Some(step as u32 % 3);
        // Groups change sides, host memory shrinks by a slot and the reserve grows, all at once.
        let sides = Some(patrickstar_actors::spread_sides(model.runtime.sides().len() as u32, 0, 0, step as u32 % 3));
        let host = Some(Bytes(model.runtime.tier_use(Tier::Host).capacity.0 - step % 2 * CHUNK));
        let headroom = Some(0.1 * step as f64);
        let retune = Retune { policy: Some(policy), prefetch, device, host, headroom, sides };
        model.runtime.retune(retune).expect("retune");
        model.step(step).expect("step");
    }
    assert!(model.states().expect("states") == reference);
}

/// A successor of the monitor knows what its predecessor was told.
#[test]
fn a_budget_outlives_the_monitor_that_was_told_of_it() {
    let case = Case { device_slots: 20, ..Case::resident(Precision::Fp32, 0.0) };
    let mut model = Model::new(&case).expect("start");
    model.step(1).expect("step");
    let few = Bytes(10 * CHUNK);
    model.runtime.retune(Retune { device: Some(few), ..Retune::default() }).expect("retune");
    model.step(2).expect("step");
    model.runtime.plant_panic(ActorName::Monitor);
    // Makes it publish, and die over that.
    model.runtime.retune(Retune { headroom: Some(0.1), ..Retune::default() }).expect("retune");
    let restarts = |model: &Model| {
        let actors = model.runtime.actors();
        actors.iter().find(|status| status.actor == "monitor").map_or(0, |monitor| monitor.restarts)
    };
    let began = std::time::Instant::now();
    while restarts(&model) == 0 {
        assert!(began.elapsed().as_secs() < 60, "the monitor is not restored");
        std::thread::yield_now();
    }
    for step in 3..6 {
        model.step(step).expect("step");
    }
    assert!(model.runtime.tier_use(Tier::Device).budget <= few);
    let shrunk = model.runtime.stats().pressure[Tier::Device.index()][Pressure::Shrink as usize];
    assert_eq!(shrunk, 1, "told once, and repeated by a successor");
}

/// A neighbour takes most of the device and gives it back: residents leave, others pass through, and all come home.
#[test]
fn groups_that_change_sides_keep_their_bits() {
    for precision in [Precision::Fp32, Precision::Bf16] {
        for clip_norm in [0.0, 1.0] {
            let run = |case: &Case, slots: &[u64]| {
                let mut model = Model::new(case).expect("start");
                let mut by_side = [0; 2];
                for (step, &slots) in (1..).zip(slots) {
                    let device = Some(Bytes(slots * CHUNK));
                    model.runtime.retune(Retune { device, ..Retune::default() }).expect("retune");
                    let stats = model.run(StepStart::new(Step(step), 1e-2), None).expect("step").stats;
                    by_side[0] += stats.stepped_on_device;
                    by_side[1] += stats.stepped_on_host;
                }
                let pressure = model.runtime.stats().pressure[Tier::Device.index()];
                (model.states().expect("states"), by_side, pressure)
            };
            let resident = Case::resident(precision, clip_norm);
            let (reference, _, pressure) = run(&resident, &[1000; 10]);
            assert_eq!(pressure, [0, 0]);
            let case = Case { device_slots: 60, sides: (4, 0), splits: true, ..resident };
            let (states, by_side, [shrunk, evicted]) = run(&case, &[60, 60, 60, 60, 9, 12, 60, 60, 30, 60]);
            assert!(states == reference, "{precision:?} clip {clip_norm}");
            assert!(by_side.iter().all(|&parameters| parameters > 0), "{by_side:?}");
            assert!(shrunk == 2 && evicted > 0, "{shrunk} {evicted}");
        }
    }
}

/// Memory of the device's slots goes and comes back at any moment of a step. A touch of a slot without memory would end
/// the process.
#[test]
fn device_memory_comes_and_goes_and_the_bits_stay() {
    let mut relocated = 0;
    for (seed, precision, sides, splits) in
        [(1, Precision::Fp32, (4, 0), true), (2, Precision::Bf16, HOST, false), (3, Precision::Bf16, (2, 8), false)]
    {
        let resident = Case::resident(precision, 0.0);
        let case = Case { device_slots: 60, sides, splits, ..resident.clone() };
        let (mut model, mut reference) = (Model::new(&case).expect("start"), Model::new(&resident).expect("start"));
        let whole = model.runtime.tier_use(Tier::Device).capacity.0 / CHUNK;
        model.neighbour = Some(seed);
        for step in 1..=12 {
            model.step(step).expect("step");
            reference.step(step).expect("step");
        }
        model.await_capacity(12);
        assert!(model.states().expect("states") == reference.states().expect("states"), "{precision:?} {sides:?}");
        relocated += model.runtime.stats().relocated;
        model.await_capacity(whole);
        model.step(13).expect("step");
        reference.step(13).expect("step");
        assert!(model.states().expect("states") == reference.states().expect("states"), "{precision:?} {sides:?}");
    }
    assert!(relocated > 0, "no chunk had to go to a lower slot");
}

#[test]
fn a_request_that_never_fits_is_a_typed_error_with_numbers() {
    let case = Case { device_slots: 2, ..Case::resident(Precision::Fp32, 0.0) };
    let mut model = Model::new(&case).expect("start");
    match model.step(1) {
        Err(RuntimeError::OutOfSlots { tier: Tier::Device, .. }) => {}
        other => panic!("expected to run out of device slots, got {other:?}"),
    }
}

#[test]
fn prefetched_weights_are_there_when_asked_for() {
    let case = Case { device_slots: 14, prefetch: 8, ..Case::resident(Precision::Fp32, 0.0) };
    let mut model = Model::new(&case).expect("start");
    for step in 1..=4 {
        model.step(step).expect("step");
    }
    let stats = model.runtime.stats();
    assert!(stats.prefetch_useful > 0, "{stats:?}");
    assert!(stats.moves[Direction::HostToDevice as usize] > 0);
}

#[test]
fn a_runtime_may_be_dropped_while_updates_wait_for_chunks() {
    let (done, dropped) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for sides in [DEVICE, HOST, (1, 3)].into_iter().cycle().take(60) {
            // No slot to spare: updates wait for moves when the model goes away.
            let case = Case { device_slots: 10, sides, ..Case::resident(Precision::Fp32, 1.0) };
            let mut model = Model::new(&case).expect("start");
            model.step(1).expect("step");
            drop(model);
        }
        done.send(()).expect("the test waits");
    });
    dropped.recv_timeout(Duration::from_secs(120)).expect("a runtime did not go down");
}
