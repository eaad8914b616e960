//! Blocks of a user's own keep their activations once a step has shown how much that is. Alone in its program: the allocator
//! counts for all of it, so tests take turns.

#![allow(clippy::unwrap_used)] // a failed assumption should stop a test

#[path = "harness/branch.rs"]
mod branch;

use std::sync::{Arc, Mutex, PoisonError};

use branch::{AGAIN, BLOCKS, ROWS, WIDTH, batch, train};
use patrickstar::config::{DeviceKind, Recompute};
use patrickstar::telemetry::alloc::CountingAllocator;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

static TURN: Mutex<()> = Mutex::new(());

#[test]
fn blocks_of_a_users_own_keep_what_fits_in_what_was_set_aside() {
    const MIB: u64 = 1 << 20;
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let passes = Arc::default();
    let (expected, counts) = train(&mut branch::engine(DeviceKind::Cpu, Recompute::Full, 64 * MIB, &passes), &passes);
    assert_eq!(counts, [AGAIN; 6]);
    let mut kept_before = 0;
    for (device, least, most) in [(4 * MIB, 0, 0), (8 * MIB, 1, BLOCKS - 3), (64 * MIB, BLOCKS - 1, BLOCKS - 1)] {
        let mut auto = branch::engine(DeviceKind::Cpu, Recompute::Auto, device, &passes);
        assert_eq!(auto.plan().kept_layers, 0, "nothing is known yet");
        let (bits, counts) = train(&mut auto, &passes);
        assert!(bits == expected, "{device} bytes: other bits");
        let kept = AGAIN - counts[1];
        assert!((least..=most).contains(&kept) && kept >= kept_before, "{device} bytes: {kept} blocks");
        kept_before = kept;
        assert_eq!(auto.plan().kept_layers as usize, kept.min(BLOCKS - 2));
        // Nothing is kept of what is larger than what was measured.
        assert_eq!(counts, [AGAIN, AGAIN - kept, AGAIN - kept, AGAIN, AGAIN, AGAIN - kept], "{device} bytes");
    }
}

#[test]
fn what_is_kept_stays_within_what_was_set_aside() {
    // The first products of a thread also allocate what it packs operands in.
    const DEVICE: u64 = 16 << 20;
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let passes = Arc::default();
    let mut auto = branch::engine(DeviceKind::Cpu, Recompute::Auto, DEVICE, &passes);
    for _ in 0..4 {
        auto.step(&batch(2, ROWS)).unwrap();
    }
    assert!(auto.plan().kept_layers > 0);
    let peak = auto.runtime().non_model_by_moment().into_iter().max().unwrap();
    // A block keeps its product and that after the activation function at least.
    let activation = (2 * 2 * ROWS * WIDTH * 4) as u64;
    assert!(peak >= u64::from(auto.plan().kept_layers) * activation && peak <= DEVICE / 4, "{peak} bytes");
    assert!(auto.runtime().device_peak().0 <= DEVICE);
}
