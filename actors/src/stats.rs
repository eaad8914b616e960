//! Counters of the runtime: what moved, why, and what the compute thread waited for.

use std::time::Duration;

use serde::Serialize;

use crate::types::{Bytes, Tier};

/// Direction of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// Host to device.
    HostToDevice,
    /// Device to host.
    DeviceToHost,
    /// Disk to host.
    DiskToHost,
    /// Host to disk.
    HostToDisk,
    /// A fresh chunk filled with zeros: no bytes cross a link.
    Zero,
}

impl Direction {
    /// All directions.
    pub const ALL: [Direction; 5] = [
        Direction::HostToDevice,
        Direction::DeviceToHost,
        Direction::DiskToHost,
        Direction::HostToDisk,
        Direction::Zero,
    ];
}

/// Why a chunk was moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Somebody waits for it.
    Demand,
    /// It will be needed soon.
    Prefetch,
    /// Its slot is needed.
    Evict,
    /// Its next user is on the other side: a gradient whose group is stepped on the host, states that passed through.
    Offload,
}

/// What the device waited for. Where the model is queued ahead, a wait of the compute thread counts as far as the device
/// had nothing to do meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StallCause {
    /// The group is still to be reduced or stepped.
    Optimizer,
    /// A copy is under way.
    Copy,
    /// No slot is free yet.
    Slot,
    /// The tier is above its budget.
    Budget,
    /// The gradients of the step to be measured.
    Reduction,
    /// The compute thread, which had not queued the next block yet.
    Queue,
    /// The group is still to be written to a checkpoint before it is stepped.
    Checkpoint,
}

impl StallCause {
    /// All causes.
    pub const ALL: [StallCause; 7] = [
        StallCause::Optimizer,
        StallCause::Copy,
        StallCause::Slot,
        StallCause::Budget,
        StallCause::Reduction,
        StallCause::Queue,
        StallCause::Checkpoint,
    ];

    /// Name in reports and metrics.
    pub fn name(self) -> &'static str {
        match self {
            StallCause::Optimizer => "optimizer",
            StallCause::Copy => "copy",
            StallCause::Slot => "slot",
            StallCause::Budget => "budget",
            StallCause::Reduction => "reduction",
            StallCause::Queue => "queue",
            StallCause::Checkpoint => "checkpoint",
        }
    }
}

/// What a tier's budget made happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pressure {
    /// The budget became smaller: somebody else took memory, a moment needed more of it, or it was retuned.
    Shrink,
    /// A chunk had to leave because the tier was above its budget.
    Evict,
}

impl Pressure {
    /// All of them.
    pub const ALL: [Pressure; 2] = [Pressure::Shrink, Pressure::Evict];

    /// Name in reports and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Pressure::Shrink => "shrink",
            Pressure::Evict => "evict",
        }
    }
}

/// Totals since the runtime started; subtract two of them for an interval.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Stats {
    /// Moves by `Direction`.
    pub moves: [u64; 5],
    /// Bytes by `Direction`.
    pub bytes: [u64; 5],
    /// Moves by `Reason`.
    pub reasons: [u64; 4],
    /// Clean copies whose slot was taken without a copy.
    pub dropped: u64,
    /// Device chunks copied to a lower slot, so that the memory above could go back to the device.
    pub relocated: u64,
    /// Chunks that the model found where it needed them.
    pub hits: u64,
    /// Chunks that had to be brought first, or were on their way.
    pub misses: u64,
    /// Prefetched chunks that were used.
    pub prefetch_useful: u64,
    /// Prefetched chunks for which the compute thread still had to wait.
    pub prefetch_late: u64,
    /// Prefetched chunks evicted before use.
    pub prefetch_wasted: u64,
    /// By `Tier::index` and `Pressure`.
    pub pressure: [[u64; 2]; 3],
    /// Time in which streams copied, by `Direction`.
    pub busy: [Duration; 5],
    /// Time that the device waited, by `StallCause`.
    pub stalls: [Duration; 7],
    /// Parameters stepped on the device side.
    pub stepped_on_device: u64,
    /// Parameters stepped on the host side.
    pub stepped_on_host: u64,
    /// Time in which the host's cores stepped.
    pub stepping_on_host: Duration,
    /// Actor restarts.
    pub restarts: u64,
}

impl Stats {
    /// Chunks copied between tiers (zero fills are not copies).
    pub fn chunk_moves(&self) -> u64 {
        self.moves[..4].iter().sum()
    }

    pub(crate) fn count_pressure(&mut self, tier: Tier, pressure: Pressure) {
        self.pressure[tier.index()][pressure as usize] += 1;
    }

    /// Time that the device waited.
    pub fn stall(&self) -> Duration {
        self.stalls.iter().sum()
    }

    /// What was counted since `earlier`.
    pub fn since(&self, earlier: &Stats) -> Stats {
        fn sub<const N: usize>(a: &[u64; N], b: &[u64; N]) -> [u64; N] {
            std::array::from_fn(|i| a[i] - b[i])
        }
        Stats {
            moves: sub(&self.moves, &earlier.moves),
            bytes: sub(&self.bytes, &earlier.bytes),
            reasons: sub(&self.reasons, &earlier.reasons),
            dropped: self.dropped - earlier.dropped,
            relocated: self.relocated - earlier.relocated,
            hits: self.hits - earlier.hits,
            misses: self.misses - earlier.misses,
            prefetch_useful: self.prefetch_useful - earlier.prefetch_useful,
            prefetch_late: self.prefetch_late - earlier.prefetch_late,
            prefetch_wasted: self.prefetch_wasted - earlier.prefetch_wasted,
            pressure: std::array::from_fn(|tier| sub(&self.pressure[tier], &earlier.pressure[tier])),
            busy: std::array::from_fn(|i| self.busy[i] - earlier.busy[i]),
            stalls: std::array::from_fn(|i| self.stalls[i] - earlier.stalls[i]),
            stepped_on_device: self.stepped_on_device - earlier.stepped_on_device,
            stepped_on_host: self.stepped_on_host - earlier.stepped_on_host,
            stepping_on_host: self.stepping_on_host - earlier.stepping_on_host,
            restarts: self.restarts - earlier.restarts,
        }
    }
}

/// Use of one tier now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TierUse {
    /// Bytes of chunk slots in use.
    pub used: Bytes,
    /// Highest `used` so far.
    pub peak: Bytes,
    /// What may be used now.
    pub budget: Bytes,
    /// What exists.
    pub capacity: Bytes,
}
