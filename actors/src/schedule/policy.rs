//! Which chunk leaves a full tier.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::trace::Trace;
use crate::types::{ChunkId, Moment};

/// How victims are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// Farthest next use.
    #[default]
    Opt,
    /// Least recent use.
    Lru,
    /// A fixed set stays, the rest passes through.
    Static,
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Policy::Opt => "opt",
            Policy::Lru => "lru",
            Policy::Static => "static",
        })
    }
}

impl FromStr for Policy {
    type Err = String;

    fn from_str(text: &str) -> Result<Policy, String> {
        match text {
            "opt" => Ok(Policy::Opt),
            "lru" => Ok(Policy::Lru),
            "static" => Ok(Policy::Static),
            _ => Err(format!("`{text}` is not a policy: write opt, lru or static")),
        }
    }
}

/// A resident chunk that may leave: neither leased nor moving.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The chunk.
    pub chunk: ChunkId,
    /// Whether a valid copy exists elsewhere, so that it can be dropped.
    pub clean: bool,
    /// Tick of the last access.
    pub last_use: u64,
    /// Tick at which it arrived.
    pub arrived: u64,
}

/// The chunks that the static policy keeps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StaticSet(BTreeSet<ChunkId>);

impl StaticSet {
    /// The first chunks by first use that leave room for the largest moment in `slots`.
    pub fn new(trace: &Trace, slots: usize) -> StaticSet {
        let mut chunks: Vec<_> = trace.chunks().collect();
        chunks.sort_by_key(|&chunk| (trace.first_use(chunk), chunk));
        chunks.truncate(slots.saturating_sub(trace.largest_moment()));
        StaticSet(chunks.into_iter().collect())
    }

    /// Whether `chunk` is to stay.
    pub fn contains(&self, chunk: ChunkId) -> bool {
        self.0.contains(&chunk)
    }
}

/// The candidate to evict at `now`; with `need_within`, only one whose next use is farther than that.
pub fn choose_victim(
    policy: Policy,
    trace: Option<&Trace>,
    now: Moment,
    static_set: &StaticSet,
    candidates: &[Candidate],
    need_within: Option<u32>,
) -> Option<ChunkId> {
    let Some(trace) = trace else {
        return least_recent(candidates.iter());
    };
    // Never used again is farther than anything.
    let next = |c: &Candidate| trace.distance_to_next_use(c.chunk, now, false).unwrap_or(u32::MAX);
    let allowed = candidates.iter().filter(|c| need_within.is_none_or(|limit| next(c) > limit));
    match policy {
        Policy::Opt => allowed.max_by_key(|c| (next(c), c.clean, Reverse(c.chunk))).map(|c| c.chunk),
        Policy::Lru => least_recent(allowed),
        Policy::Static => {
            let (kept, passing): (Vec<&Candidate>, Vec<&Candidate>) =
                allowed.partition(|c| static_set.contains(c.chunk));
            let latest = || kept.iter().max_by_key(|c| (trace.first_use(c.chunk), Reverse(c.chunk)));
            passing.iter().min_by_key(|c| (c.arrived, c.chunk)).or_else(latest).map(|c| c.chunk)
        }
    }
}

fn least_recent<'a>(candidates: impl Iterator<Item = &'a Candidate>) -> Option<ChunkId> {
    candidates.min_by_key(|c| (c.last_use, c.chunk)).map(|c| c.chunk)
}
