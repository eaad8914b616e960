//! The optimizer: steps groups with Adam. Two actors, one a side, work at the same time.
//!
//! An update in place cannot simply be repeated, so every piece that is done is noted in the step's ledger: a successor
//! after a panic goes on with the pieces that are left.

#![expect(unsafe_code, reason = "steps leased chunks by address, many pieces at once")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use rayon::prelude::*;

use crate::adam::{PIECE, StepScalars, step_bf16, step_fp16, step_fp32};
use crate::chunk::{Pass, Tile};
use crate::error::RuntimeError;
use crate::health::ActorName;
use crate::memory::{DeviceMath, StateAddresses};
use crate::reduction::StepGroup;
use crate::shared::{Lease, Shared};
use crate::table::Request;
use crate::timeline::Track;
use crate::types::{Bytes, GroupId, Kind, Precision, Tier};

/// Steps groups; see the module's page.
pub(crate) struct Optimizer {
    shared: Arc<Shared>,
    /// Its side.
    tier: Tier,
    pool: Arc<rayon::ThreadPool>,
}

/// Elements `[start, start + len)` of a group that belong to one tensor and one 4-byte chunk.
#[derive(Clone, Copy, Debug)]
struct Piece {
    start: usize,
    len: usize,
    decay: bool,
}

impl Optimizer {
    pub fn new(shared: Arc<Shared>, tier: Tier, pool: Arc<rayon::ThreadPool>) -> Self {
        Optimizer { shared, tier, pool }
    }

    /// Applies updates until none is due.
    pub fn run(&mut self) -> Result<(), RuntimeError> {
        while let Some(update) = self.next()? {
            self.update(update)?;
            self.shared.updates.done(self.tier, update);
        }
        Ok(())
    }

    /// The first update whose chunks are in place, once there is one; `None` where nothing is due. The eviction actor looks
    /// at the same queue and brings what is missing.
    fn next(&self) -> Result<Option<StepGroup>, RuntimeError> {
        let mut table = self.shared.lock();
        loop {
            if let Some(error) = &table.failed {
                return Err(error.clone());
            }
            let due = self.shared.updates.due(self.tier);
            if due.is_empty() {
                return Ok(None);
            }
            let ready = due.into_iter().find(|update| {
                // Handed over twice, by a reduction that was restored: nothing is left to do.
                let applied = table.group(update.group).pending_update != Some(update.step);
                applied || {
                    let request = table.update_request(update.group, &self.shared.layout);
                    table.obstacle(&request, &self.shared.layout).is_none()
                }
            });
            if ready.is_some() {
                return Ok(ready);
            }
            let (guard, _) = self
                .shared
                .changed
                .wait_timeout(table, Duration::from_millis(100))
                .unwrap_or_else(PoisonError::into_inner);
            table = guard;
        }
    }

    fn update(&self, update: StepGroup) -> Result<(), RuntimeError> {
        if self.shared.lock().group(update.group).pending_update != Some(update.step) {
            return Ok(());
        }
        let states = GroupStates::lease(&self.shared, update.group)?;
        // A gradient that overflowed says nothing: the group stays as it is.
        let Some(scalars) = update.scalars else { return self.finish(update.group, states.lease, 0) };
        let start = self.shared.timeline.now();
        let math = self.shared.math.as_deref().filter(|_| self.tier == Tier::Device);
        // A device steps a piece in one launch; the host's are small enough to share out.
        let pieces = pieces_of(&self.shared, update.group, if math.is_some() { usize::MAX } else { PIECE });
        self.step(&states, &pieces, update, &scalars, math)?;
        let tier = self.tier;
        // Both sides work at once, and what is drawn on one line must not overlap.
        let track = if tier == Tier::Device { Track::DeviceOptimizer } else { Track::Optimizer };
        self.shared.timeline.span(track, start, None, Bytes(0), || format!("step {} on {tier}", update.group));
        if tier != Tier::Device {
            self.shared.lock().stats.stepping_on_host += self.shared.timeline.now() - start;
        }
        let parameters: u64 = pieces.iter().map(|piece| piece.len as u64).sum();
        self.finish(update.group, states.lease, parameters)
    }

    fn name(&self) -> ActorName {
        if self.tier == Tier::Device { ActorName::DeviceOptimizer } else { ActorName::Optimizer }
    }

    fn step(
        &self,
        states: &GroupStates,
        pieces: &[Piece],
        message: StepGroup,
        scalars: &StepScalars,
        math: Option<&dyn DeviceMath>,
    ) -> Result<(), RuntimeError> {
        let index = message.group.0 as usize;
        let (step, mut done) = std::mem::take(&mut self.shared.stepped()[index]);
        if step != message.step {
            done.clear();
        }
        done.resize(pieces.len(), false);
        let flags: Vec<AtomicBool> = done.into_iter().map(AtomicBool::new).collect();
        let (first, rest) = pieces.split_at(pieces.len() / 2);
        let run = |offset: usize, pieces: &[Piece]| {
            let flags = &flags[offset..offset + pieces.len()];
            match math {
                Some(math) => run_on_device(states, pieces, flags, scalars, math),
                None => {
                    self.pool.install(|| run_on_host(states, pieces, flags, scalars));
                    Ok(())
                }
            }
        };
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            run(0, first)?;
            self.shared.health.fault_point(self.name());
            run(first.len(), rest)
        }));
        self.shared.stepped()[index] = (message.step, flags.into_iter().map(AtomicBool::into_inner).collect());
        match outcome {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    fn finish(&self, group: GroupId, lease: Lease, parameters: u64) -> Result<(), RuntimeError> {
        let tier = lease.tier();
        // Together with the release: a gradient that eviction saw unleased could be on its way out when it is dropped.
        lease.release_and(Pass::Other, |table| {
            for &chunk in self.shared.layout.group_chunks(group, Kind::Gradient) {
                table.drop_payload(chunk)?;
            }
            table.group_mut(group).pending_update = None;
            match tier {
                Tier::Device => table.stats.stepped_on_device += parameters,
                Tier::Host | Tier::Disk => table.stats.stepped_on_host += parameters,
            }
            Ok(())
        })
    }
}

fn run_on_host(states: &GroupStates, pieces: &[Piece], flags: &[AtomicBool], scalars: &StepScalars) {
    pieces.par_iter().zip(flags).for_each(|(&piece, flag)| {
        if !flag.load(Ordering::Acquire) {
            states.update(piece, scalars);
            flag.store(true, Ordering::Release);
        }
    });
}

/// Queues the pieces that are left, and notes them when all are done.
fn run_on_device(
    states: &GroupStates,
    pieces: &[Piece],
    flags: &[AtomicBool],
    scalars: &StepScalars,
    math: &dyn DeviceMath,
) -> Result<(), RuntimeError> {
    for (&piece, _) in pieces.iter().zip(flags).filter(|(_, flag)| !flag.load(Ordering::Acquire)) {
        // SAFETY: the piece lies inside the leased chunks by construction, and no other piece overlaps it.
        unsafe { math.step(states.precision, scalars, piece.decay, states.addresses(piece), piece.len)? };
    }
    math.finish()?;
    flags.iter().for_each(|flag| flag.store(true, Ordering::Release));
    Ok(())
}

/// Pieces in a fixed order: tensors in order, cut at chunk halves and at `largest` elements.
fn pieces_of(shared: &Shared, group: GroupId, largest: usize) -> Vec<Piece> {
    let layout = &shared.layout;
    let part = layout.part_elements();
    let mut pieces = Vec::new();
    for tile in layout.group_tiles(group) {
        let Tile { tensor, rows, offset, .. } = *tile;
        let spec = &layout.tensors()[tensor.0 as usize];
        let (mut start, end) = (offset, offset + rows * spec.columns);
        while start < end {
            let part_end = (start / part + 1) * part;
            let len = largest.min(end - start).min(part_end - start);
            pieces.push(Piece { start, len, decay: spec.decay });
            start += len;
        }
    }
    pieces
}

/// All chunks of a group, leased together.
struct GroupStates {
    lease: Lease,
    precision: Precision,
    part_elements: usize,
    weight: *mut u8,
    low: *mut u8,
    gradient: *mut u8,
    master: Vec<*mut u8>,
    momentum: Vec<*mut u8>,
    variance: Vec<*mut u8>,
}

// SAFETY: the addresses stay valid and exclusive while `lease` lives; pieces of one step never overlap.
unsafe impl Sync for GroupStates {}

impl GroupStates {
    fn lease(shared: &Arc<Shared>, group: GroupId) -> Result<Self, RuntimeError> {
        let layout = &shared.layout;
        let Request { tier, chunks, requester, .. } = shared.lock().update_request(group, layout);
        let lease = shared.lease(requester, tier, chunks)?;
        let addresses = |kind: Kind| -> Vec<*mut u8> {
            layout.group_chunks(group, kind).iter().filter_map(|&chunk| lease.address_of(chunk)).collect()
        };
        let first = |kind: Kind| addresses(kind).first().copied().unwrap_or(std::ptr::null_mut());
        Ok(GroupStates {
            precision: layout.precision(),
            part_elements: layout.part_elements(),
            weight: first(Kind::Weight),
            low: first(Kind::Low),
            gradient: first(Kind::Gradient),
            master: addresses(Kind::Master),
            momentum: addresses(Kind::Momentum),
            variance: addresses(Kind::Variance),
            lease,
        })
    }

    /// Where the states of a piece begin. Under bf16 the fp32 states of a group take two chunks each; pieces never cross
    /// the boundary.
    fn addresses(&self, piece: Piece) -> StateAddresses {
        let (part, inner) = (piece.start / self.part_elements, piece.start % self.part_elements);
        let size = if self.precision.is_half() { 2 } else { 4 };
        let at = |base: *mut u8| if base.is_null() { base } else { base.wrapping_add(piece.start * size) };
        let wide =
            |parts: &[*mut u8]| parts.get(part).map_or(std::ptr::null_mut(), |base| base.wrapping_add(4 * inner));
        StateAddresses {
            weight: at(self.weight),
            low: at(self.low),
            master: wide(&self.master),
            momentum: wide(&self.momentum),
            variance: wide(&self.variance),
            gradient: at(self.gradient),
        }
    }

    fn update(&self, piece: Piece, scalars: &StepScalars) {
        let Piece { len, decay, .. } = piece;
        let at = self.addresses(piece);
        // SAFETY: the piece lies inside the leased chunks by construction, and no other piece overlaps it.
        unsafe {
            let momentum = std::slice::from_raw_parts_mut(at.momentum.cast::<f32>(), len);
            let variance = std::slice::from_raw_parts_mut(at.variance.cast::<f32>(), len);
            match self.precision {
                Precision::Fp32 => {
                    let weight = std::slice::from_raw_parts_mut(at.weight.cast::<f32>(), len);
                    let gradient = std::slice::from_raw_parts(at.gradient.cast::<f32>(), len);
                    step_fp32(scalars, decay, weight, momentum, variance, gradient);
                }
                Precision::Bf16 => {
                    let weight = std::slice::from_raw_parts_mut(at.weight.cast::<u16>(), len);
                    let low = std::slice::from_raw_parts_mut(at.low.cast::<u16>(), len);
                    let gradient = std::slice::from_raw_parts(at.gradient.cast::<u16>(), len);
                    step_bf16(scalars, decay, weight, low, momentum, variance, gradient);
                }
                Precision::Fp16 => {
                    let weight = std::slice::from_raw_parts_mut(at.weight.cast::<u16>(), len);
                    let master = std::slice::from_raw_parts_mut(at.master.cast::<f32>(), len);
                    let gradient = std::slice::from_raw_parts(at.gradient.cast::<u16>(), len);
                    step_fp16(scalars, decay, weight, master, momentum, variance, gradient);
                }
            }
        }
    }
}
