//! The runtime under a model without candle: whatever the budget, policy, side or fault, the same bits.

#![expect(unsafe_code, reason = "tests bind parameters and call kernels by address")]
#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed assumption should stop a test

use std::time::Duration;

use patrickstar_actors::chunk::Layout;
use patrickstar_actors::health::ActorName;
use patrickstar_actors::runtime::StepStart;
use patrickstar_actors::schedule::Policy;
use patrickstar_actors::stats::{Direction, StallCause};
use patrickstar_actors::types::{Bytes, ChunkId, GroupId, Kind, Precision, Step, Tier};
use patrickstar_actors::{Access, Retune};

use model::{BLOCKS, CHUNK, Case, DEVICE, HOST, Model, chunks, specs, train};

mod memory;
mod model;

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
fn a_step_that_waits_for_a_checkpoint_says_so() {
    let mut model = Model::new(&Case::resident(Precision::Bf16, 0.0)).unwrap();
    model.step(1).unwrap();
    model.runtime.drain().unwrap();
    model.runtime.begin_save().unwrap();
    // Groups are to be saved before step 2 updates them, and no block is used in step 3 before that.
    model.step(2).unwrap();
    let (reader, view) = (model.runtime.reader(), model.runtime.view());
    let saver = std::thread::spawn(move || {
        while view.residency().unwrap().step < Step(3) {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(300));
        (0..reader.layout().group_count() as u32).for_each(|group| reader.saved(GroupId(group)));
    });
    model.step(3).unwrap();
    saver.join().unwrap();
    let stalls = model.runtime.stats().stalls;
    assert!(stalls[StallCause::Checkpoint as usize] > Duration::from_millis(1), "{stalls:?}");
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

/// They arrive one by one, and those that are there are used next on the device.
#[test]
fn gradients_that_an_access_awaits_in_host_memory_are_not_fetched_back() {
    let case = Case { prefetch: 8, ..Case::resident(Precision::Fp32, 0.0) };
    let mut model = Model::new(&case).expect("start");
    let in_block: Vec<_> = (0..BLOCKS).map(|block| chunks(model.runtime.layout(), block, Kind::Gradient)).collect();
    let mut gradients = in_block.concat();
    gradients.sort();
    gradients.dedup();
    let request = |chunks: &[ChunkId]| chunks.iter().map(|&chunk| (chunk, Access::Fresh)).collect();
    for step in 1..=20 {
        model.runtime.begin_step(StepStart::new(Step(step), 1e-2)).expect("begin");
        for tier in [Tier::Device, Tier::Host] {
            let lease = model.runtime.access(String::new, tier, request(&gradients)).expect("lease");
            model.runtime.release_forward(lease).expect("release");
        }
        for block in in_block.iter().rev() {
            let lease = model.runtime.access(String::new, Tier::Device, request(block)).expect("lease");
            model.runtime.release_backward(lease).expect("release");
        }
        model.runtime.end_step().expect("end");
        model.runtime.drain().expect("drain");
    }
    // To the host for the access, back, and to the host's update.
    let moves = model.runtime.stats().moves;
    let once_a_step = 20 * gradients.len() as u64;
    assert_eq!(moves[Direction::HostToDevice as usize], once_a_step);
    assert_eq!(moves[Direction::DeviceToHost as usize], 2 * once_a_step);
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
