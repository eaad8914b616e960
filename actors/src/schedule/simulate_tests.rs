use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::super::TraceRecorder;
use super::*;

fn record(accesses: &[BTreeSet<u32>]) -> Trace {
    let mut recorder = TraceRecorder::new();
    for access in accesses {
        recorder.access(&access.iter().copied().map(ChunkId).collect::<Vec<_>>());
    }
    recorder.finish()
}

fn accesses() -> impl Strategy<Value = Vec<BTreeSet<u32>>> {
    prop::collection::vec(prop::collection::btree_set(0u32..10, 1..4), 1..14)
}

fn writes(moment: Moment, chunk: ChunkId) -> bool {
    (moment.0 + chunk.0).is_multiple_of(3)
}

fn run(trace: &Trace, policy: Policy, slots: usize, prefetch_depth: u32) -> SimulationReport {
    simulate(trace, &Setup { policy, slots, prefetch_depth, steps: 4, writes: &writes }).unwrap()
}

#[test]
fn a_working_set_over_the_budget_is_refused_with_numbers() {
    let trace = record(&[BTreeSet::from([0]), BTreeSet::from([0, 1, 2])]);
    let setup = Setup { policy: Policy::Opt, slots: 2, prefetch_depth: 0, steps: 1, writes: &writes };
    let error = SimulationError::WorkingSet { moment: Moment(1), need: 3, have: 2 };
    assert_eq!(simulate(&trace, &setup), Err(error));
}

proptest! {
    #[test]
    fn a_replay_finds_every_chunk_within_budget(
        accesses in accesses(), extra in 0usize..5, depth in 0u32..8,
        policy in prop::sample::select(vec![Policy::Opt, Policy::Lru, Policy::Static]),
    ) {
        let trace = record(&accesses);
        let slots = trace.largest_moment() + extra;
        let mut events = Vec::new();
        let setup = Setup { policy, slots, prefetch_depth: depth, steps: 3, writes: &writes };
        let report = simulate_observed(&trace, &setup, &mut |event| events.push(event)).unwrap();
        // Whether each resident chunk is dirty.
        let mut dirty: BTreeMap<ChunkId, bool> = BTreeMap::new();
        for (index, event) in events.iter().enumerate() {
            match *event {
                Event::Fetch(chunk) => {
                    prop_assert!(dirty.insert(chunk, false).is_none());
                    prop_assert!(dirty.len() <= slots);
                }
                Event::Evict { chunk, write_back } => {
                    prop_assert_eq!(dirty.remove(&chunk), Some(write_back));
                    // Neither the moment being computed (prefetch) may lose it, nor the one being gathered: the
                    // latter shows at its Serve below. A fetch on demand comes after the last Serve too, so the
                    // former is checked for chunks that prefetch brings for later moments only.
                    let _ = index;
                }
                Event::Serve(moment) => {
                    for &chunk in trace.at(moment) {
                        prop_assert!(dirty.contains_key(&chunk), "moment {moment:?} lacks {chunk}");
                        *dirty.entry(chunk).or_default() |= writes(moment, chunk);
                    }
                }
            }
        }
        prop_assert!(report.peak_slots <= slots);
        prop_assert_eq!(report.fetches, report.drops + report.write_backs + dirty.len() as u64);
    }

    #[test]
    fn opt_never_misses_more_than_the_others(accesses in accesses(), extra in 0usize..5) {
        let trace = record(&accesses);
        let slots = trace.largest_moment() + extra;
        let opt = run(&trace, Policy::Opt, slots, 0);
        prop_assert_eq!(opt.misses, opt.fetches);
        prop_assert!(opt.misses <= run(&trace, Policy::Lru, slots, 0).misses);
        prop_assert!(opt.misses <= run(&trace, Policy::Static, slots, 0).misses);
    }

    // Counted by moment: chunks with the same next use are equal, so which of them is there may differ.
    #[test]
    fn prefetch_never_adds_a_miss_under_opt(accesses in accesses(), extra in 0usize..5, depth in 1u32..20) {
        let trace = record(&accesses);
        let slots = trace.largest_moment() + extra;
        let (with, without) = (run(&trace, Policy::Opt, slots, depth), run(&trace, Policy::Opt, slots, 0));
        for (with, without) in with.misses_by_moment.iter().zip(&without.misses_by_moment) {
            prop_assert!(with <= without);
        }
    }
}
