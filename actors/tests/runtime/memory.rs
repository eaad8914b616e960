//! Budgets that change while training, and devices that are shared: the same bits, or a clear error.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use patrickstar_actors::Retune;
use patrickstar_actors::chunk::Layout;
use patrickstar_actors::error::RuntimeError;
use patrickstar_actors::health::ActorName;
use patrickstar_actors::memory::{Backend, CpuBackend, DeviceRoom, MemoryError, Slab, Stream};
use patrickstar_actors::monitor::{MemoryProbe, NoProbe};
use patrickstar_actors::runtime::StepStart;
use patrickstar_actors::schedule::Policy;
use patrickstar_actors::stats::Pressure;
use patrickstar_actors::types::{Bytes, Precision, Step, Tier};

use crate::model::{BLOCKS, CHUNK, Case, HOST, Model, specs, train};

/// Main memory as a device that others use too: who has this handle says how much of it nobody holds.
#[derive(Default)]
struct SharedDevice {
    free: AtomicU64,
    /// What non-model memory was last told to keep.
    kept: AtomicU64,
}

impl Backend for SharedDevice {
    fn new_stream(&self, name: &str) -> Result<Box<dyn Stream>, MemoryError> {
        CpuBackend.new_stream(name)
    }

    fn device_slab(&self, slots: u32, slot_bytes: Bytes) -> Result<Box<dyn Slab>, MemoryError> {
        CpuBackend.device_slab(slots, slot_bytes)
    }

    fn separates_non_model(&self) -> bool {
        true
    }

    fn trim_non_model(&self, keep: Bytes) -> Result<(), MemoryError> {
        self.kept.store(keep.0, Ordering::Relaxed);
        Ok(())
    }

    fn room(&self) -> Result<Option<DeviceRoom>, MemoryError> {
        Ok(Some(DeviceRoom { free: Bytes(self.free.load(Ordering::Relaxed)), pool: Bytes(0) }))
    }
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

/// A fixed share follows neither neighbours nor activations.
#[test]
fn a_fixed_share_stays() {
    let resident = Case::resident(Precision::Bf16, 1.0);
    let slots = Layout::new(&specs(), Precision::Bf16, Bytes(CHUNK)).expect("layout").chunk_count() as u64;
    let (reference, _) = train_beside(&resident, None);
    for (fixed_share, kept_all) in [(true, true), (false, false)] {
        let case = Case { device_slots: slots, fixed_share, ..resident.clone() };
        let device = Arc::new(SharedDevice { free: AtomicU64::new(4 * CHUNK), ..SharedDevice::default() });
        let (states, kept) = train_beside(&case, Some(device));
        assert!(states == reference);
        assert_eq!(kept == slots, kept_all, "{kept} of {slots}");
        let probe = Arc::new(Activations { chunks: [3; 2 * BLOCKS - 1], asked: AtomicU64::new(0) });
        let mut model = Model::on(Arc::new(CpuBackend), probe, &case).expect("start");
        model.step(1).expect("step");
        model.step(2).expect("step");
        let budget = model.runtime.tier_use(Tier::Device).budget.0 / CHUNK;
        assert_eq!(budget == slots, kept_all, "{budget} of {slots}");
    }
}

/// Whatever the chunks give back the neighbour takes: they keep what finds no place in host memory.
#[test]
fn a_neighbour_gets_no_memory_whose_chunks_have_no_other_place() {
    for precision in [Precision::Fp32, Precision::Bf16] {
        let layout = Layout::new(&specs(), precision, Bytes(CHUNK)).expect("layout");
        let groups = layout.group_count() as u32;
        let persistent: u32 = precision.persistent_kinds().iter().map(|&kind| layout.parts(kind)).sum();
        for clip_norm in [0.0, 1.0] {
            let resident = Case::resident(precision, clip_norm);
            let (reference, kept) = train_beside(&resident, None);
            assert_eq!(kept, u64::from(layout.chunk_count() as u32));
            for lives_there in [2, groups - 2, groups] {
                let away = groups - lives_there;
                // The least that a plan accepts for the residents that there are.
                let gradients = if clip_norm > 0.0 { away } else { away.min(4) };
                let host_slots = persistent * away + gradients + 2 + persistent;
                let device_slots = layout.chunk_count() as u64;
                let case = Case { device_slots, host_slots, sides: (lives_there, 0), ..resident.clone() };
                let device = Arc::new(SharedDevice { free: AtomicU64::new(4 * CHUNK), ..SharedDevice::default() });
                let (states, kept) = train_beside(&case, Some(device));
                let what = format!(
                    "{precision:?} clip {clip_norm}: {kept} slots left of {device_slots} for {lives_there} residents"
                );
                assert!(states == reference, "{what}");
                assert!(kept < device_slots || lives_there > 2, "{what}");
            }
        }
    }
}

/// The states after steps in which, after the first, nothing is free on the device any more, and the slots left then.
fn train_beside(case: &Case, device: Option<Arc<SharedDevice>>) -> (Vec<u8>, u64) {
    let mut model = match &device {
        Some(device) => Model::on(device.clone(), Arc::new(NoProbe), case),
        None => Model::new(case),
    }
    .expect("start");
    for step in 1..=12 {
        model.step(step).unwrap_or_else(|error| panic!("step {step}: {error}"));
        std::thread::sleep(std::time::Duration::from_millis(20));
        if let Some(device) = &device {
            device.free.store(0, Ordering::Relaxed);
        }
    }
    let kept = model.runtime.tier_use(Tier::Device).capacity.0 / CHUNK;
    (model.states().expect("states"), kept)
}

/// A smaller device leaves chunks that neither it nor host memory has room for: whoever waits is told.
#[test]
fn a_budget_into_which_chunks_do_not_fit_ends_the_run_with_numbers() {
    let (done, outcome) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        // As many slots as the plan of ten residents needs: three states of the other groups, and few more.
        let case = Case { device_slots: 48, host_slots: 13, sides: (10, 0), ..Case::resident(Precision::Fp32, 0.0) };
        for _ in 0..20 {
            let mut model = Model::new(&case).expect("start");
            model.step(1).expect("step");
            for slots in [28, 20, 12] {
                let device = Some(Bytes(slots * CHUNK));
                model.runtime.retune(Retune { device, ..Retune::default() }).expect("retune");
            }
            done.send((2..40).try_for_each(|step| model.step(step))).expect("the test waits");
        }
    });
    for _ in 0..20 {
        match outcome.recv_timeout(std::time::Duration::from_secs(60)).expect("the run neither ends nor goes on") {
            Err(RuntimeError::OutOfSlots { need, .. }) => assert!(need > 0),
            other => panic!("expected to run out of slots, got {other:?}"),
        }
    }
}

/// Non-model memory in chunks, by access of a step. Runtimes ask for the last one's when the next one begins.
struct Activations {
    chunks: [u64; 2 * BLOCKS - 1],
    asked: AtomicU64,
}

impl MemoryProbe for Activations {
    fn live(&self) -> Bytes {
        Bytes(0)
    }

    fn take_peak(&self) -> Bytes {
        // A step closes one moment more than it has accesses: the one before its first.
        let asked = self.asked.fetch_add(1, Ordering::Relaxed) as usize % (self.chunks.len() + 1);
        Bytes(asked.checked_sub(1).map_or(0, |moment| self.chunks[moment]) * CHUNK)
    }
}

/// An access that leaves no slot for more than itself, beside others that need fewer slots and have fewer.
#[test]
fn the_next_accesses_lower_budget_takes_nothing_from_the_one_that_waits() {
    let reference = train(&Case::resident(Precision::Fp32, 0.0));
    let first_backward = BLOCKS - 1;
    // Of ten slots the largest access needs six, and gets them; its neighbours get five and four, and need no more.
    let mut chunks = [6; 2 * BLOCKS - 1];
    chunks[first_backward - 1..=first_backward + 1].copy_from_slice(&[5, 4, 5]);
    let case = Case { device_slots: 10, ..Case::resident(Precision::Fp32, 0.0) };
    let probe = Arc::new(Activations { chunks, asked: AtomicU64::new(0) });
    let mut model = Model::on(Arc::new(CpuBackend), probe, &case).expect("start");
    for step in 1..=4 {
        model.step(step).expect("step");
    }
    assert_eq!(model.runtime.non_model_by_moment(), chunks.map(|chunks| chunks * CHUNK));
    assert!(model.states().expect("states") == reference);
}

/// What is kept free beside activations is for their growth: the work does not stop for it.
#[test]
fn headroom_takes_nothing_that_an_access_needs() {
    let reference = train(&Case::resident(Precision::Fp32, 0.0));
    let case = Case { device_slots: 10, ..Case::resident(Precision::Fp32, 0.0) };
    let probe = Arc::new(Activations { chunks: [4; 2 * BLOCKS - 1], asked: AtomicU64::new(0) });
    let mut model = Model::on(Arc::new(CpuBackend), probe, &case).expect("start");
    model.runtime.retune(Retune { headroom: Some(0.1), ..Retune::default() }).expect("retune");
    for step in 1..=4 {
        model.step(step).expect("step");
    }
    assert!(model.states().expect("states") == reference);
}

/// A device whose activations have memory of their own: chunks lose nothing to them.
#[test]
fn activations_in_memory_of_their_own_leave_all_slots_to_chunks() {
    let case = Case { device_slots: 6, ..Case::resident(Precision::Fp32, 0.0) };
    let probe = Arc::new(Activations { chunks: [1; 2 * BLOCKS - 1], asked: AtomicU64::new(0) });
    let device = Arc::new(SharedDevice::default());
    let mut model = Model::on(device.clone(), probe, &case).expect("start");
    for step in 1..=4 {
        model.step(step).expect("step");
    }
    assert!(model.states().expect("states") == train(&Case::resident(Precision::Fp32, 0.0)));
    // With a smaller budget they give up what no step needed.
    let retune = Retune { device: Some(Bytes(case.device_slots * CHUNK - 1)), ..Retune::default() };
    model.runtime.retune(retune).expect("retune");
    let began = std::time::Instant::now();
    while device.kept.load(Ordering::Relaxed) == 0 {
        assert!(began.elapsed().as_secs() < 60, "nothing was given up");
        std::thread::yield_now();
    }
    assert_eq!(device.kept.load(Ordering::Relaxed), CHUNK);
}
