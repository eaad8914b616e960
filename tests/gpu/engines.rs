//! Engines in one process, of a user's own blocks. Each begins with a pool of its own, so these run alone:
//! `gpu --ignored --test-threads=1 engines::`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use patrickstar::config::{DeviceKind, Recompute};
use patrickstar::model::ops;
use patrickstar::model::tape::Tape;
use patrickstar_actors::types::Precision;

use crate::branch::{AGAIN, BLOCKS, batches, engine, train};
use crate::memory::Capped;
use crate::{gpu, ops};

const MIB: u64 = 1 << 20;
/// A budget with room for all activations, beside what libraries take.
const ROOMY: u64 = 512 * MIB;

/// Ends a loop of another thread, also where a check fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
#[ignore = "takes the pool of the process; run alone"]
fn blocks_of_a_users_own_keep_what_fits_with_the_same_bits() {
    let _capped = Capped::by_the_gpu();
    let passes = Arc::<AtomicUsize>::default();
    let (expected, counts) = train(&mut engine(DeviceKind::Cuda, Recompute::Full, ROOMY, &passes), &passes);
    assert_eq!(counts, [AGAIN; 6]);
    let mut auto = engine(DeviceKind::Cuda, Recompute::Auto, ROOMY, &passes);
    let (bits, counts) = train(&mut auto, &passes);
    assert!(bits == expected, "other bits");
    let kept = AGAIN - BLOCKS;
    assert_eq!(counts, [AGAIN, AGAIN - kept, AGAIN - kept, AGAIN, AGAIN, AGAIN - kept]);
}

#[test]
#[ignore = "takes the pool of the process; run alone"]
fn engines_begin_and_end_beside_each_other_and_beside_other_work() {
    let _capped = Capped::by_the_gpu();
    let passes = Arc::<AtomicUsize>::default();
    let fresh = || engine(DeviceKind::Cuda, Recompute::Auto, ROOMY, &passes);
    let (expected, _) = train(&mut fresh(), &passes);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let other_work = scope.spawn(|| {
            let place = gpu(Precision::Fp32);
            let mut rounds = 0;
            while !over.load(Ordering::Relaxed) {
                let x = place.tensor(&vec![1.0; 100_000 + 1000 * (rounds % 50)], &[100_000 + 1000 * (rounds % 50)]);
                let x = Tape::forgetting(&place.compute).constant(x);
                let sum = ops::add(&x, &x).and_then(|sum| sum.tensor()).unwrap();
                assert_eq!(sum.max(0).unwrap().to_scalar::<f32>().unwrap(), 2.0);
                ops().gpu().pool_use().unwrap();
                rounds += 1;
            }
            rounds
        });
        let ends = Over(&over);
        let mut before = fresh();
        for _ in 0..10 {
            let mut next = fresh();
            // One that has seen the beginning of another goes on.
            assert!(train(&mut before, &passes).0 == expected);
            for batch in batches() {
                next.step(&batch).unwrap();
            }
            drop(next);
            before = fresh();
        }
        drop(ends);
        assert!(other_work.join().unwrap() > 10);
    });
}
