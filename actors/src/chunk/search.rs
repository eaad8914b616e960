//! Picks the chunk size that wastes least, among those the device can hold.

use std::collections::BTreeSet;

use super::layout::{CHUNK_ALIGNMENT, Layout, LayoutError, TensorSpec, indivisible_bytes};
use crate::types::{Bytes, Precision, TensorId};

/// Layouts tried at most: each costs one pass over the tensors.
const SAMPLES: u64 = 200;
/// Utilisations this close count as equal; larger chunks copy at a better rate.
const NEAR_TIE: f64 = 0.02;

/// What a search may choose from.
#[derive(Clone, Copy, Debug)]
pub struct SearchLimits<'a> {
    /// Smallest size to try; raised to the smallest legal one.
    pub min: Bytes,
    /// Largest size to try.
    pub max: Bytes,
    /// Device memory for chunks, when known.
    pub device_budget: Option<Bytes>,
    /// Positions of the tensors of every block.
    pub working_set: &'a [Vec<usize>],
}

/// A size that was tried.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// The chunk size.
    pub chunk: Bytes,
    /// Share of the groups' elements that are parameters.
    pub utilisation: f64,
    /// Number of groups.
    pub groups: usize,
    /// Weight and gradient chunks of the largest block.
    pub working_set_chunks: usize,
}

/// The outcome of a search.
#[derive(Clone, Debug, PartialEq)]
pub struct SearchReport {
    /// The chosen size.
    pub best: Bytes,
    /// Its utilisation.
    pub utilisation: f64,
    /// Every size tried, smallest first.
    pub candidates: Vec<Candidate>,
}

impl Candidate {
    fn working_set_bytes(&self) -> u64 {
        (self.working_set_chunks as u64).saturating_mul(self.chunk.0)
    }
}

/// Tries sizes between the limits and returns the best with everything tried.
pub fn search_chunk_size(
    specs: &[TensorSpec],
    precision: Precision,
    limits: SearchLimits<'_>,
) -> Result<SearchReport, LayoutError> {
    if let Some(&index) = limits.working_set.iter().flatten().find(|&&index| index >= specs.len()) {
        return Err(LayoutError::UnknownTensor { index, count: specs.len() });
    }
    let mut smallest = limits.min.0.max(1);
    for spec in specs {
        smallest = smallest.max(indivisible_bytes(spec, precision)?);
    }
    let first = smallest.div_ceil(CHUNK_ALIGNMENT);
    let last = limits.max.0 / CHUNK_ALIGNMENT;
    if first > last {
        let min = Bytes(first.saturating_mul(CHUNK_ALIGNMENT));
        return Err(LayoutError::EmptyRange { min, max: limits.max });
    }
    let mut candidates = Vec::new();
    for pages in sample(first, last) {
        candidates.push(try_size(specs, precision, Bytes(pages * CHUNK_ALIGNMENT), limits.working_set)?);
    }
    let best = choose(&candidates, limits.device_budget)
        .ok_or(LayoutError::EmptyRange { min: limits.min, max: limits.max })?;
    let best = shrink(specs, precision, best, first, limits.working_set)?;
    Ok(SearchReport { best: best.chunk, utilisation: best.utilisation, candidates })
}

/// The smallest size into which everything goes with as few groups and chunks as into `best`: sizes lie a few per cent apart,
/// and what a chunk is too large by is lost in every one.
fn shrink(
    specs: &[TensorSpec],
    precision: Precision,
    mut best: Candidate,
    first: u64,
    blocks: &[Vec<usize>],
) -> Result<Candidate, LayoutError> {
    let mut too_small = first.saturating_sub(1);
    while too_small + 1 < best.chunk.0 / CHUNK_ALIGNMENT {
        let middle = too_small.midpoint(best.chunk.0 / CHUNK_ALIGNMENT);
        let tried = try_size(specs, precision, Bytes(middle * CHUNK_ALIGNMENT), blocks)?;
        if tried.groups <= best.groups && tried.working_set_chunks <= best.working_set_chunks {
            best = tried;
        } else {
            too_small = middle;
        }
    }
    Ok(best)
}

/// At most `SAMPLES` sizes, in equal ratios: what matters is how a chunk compares to a block, large or small.
fn sample(first: u64, last: u64) -> Vec<u64> {
    let ratio = (last as f64 / first as f64).powf(1.0 / (SAMPLES - 1) as f64);
    let mut sizes: Vec<u64> =
        (0..SAMPLES as i32).map(|i| ((first as f64 * ratio.powi(i)).round() as u64).clamp(first, last)).collect();
    sizes.dedup();
    sizes
}

fn try_size(
    specs: &[TensorSpec],
    precision: Precision,
    chunk: Bytes,
    blocks: &[Vec<usize>],
) -> Result<Candidate, LayoutError> {
    let layout = Layout::new(specs, precision, chunk)?;
    let groups = |block: &Vec<usize>| {
        let tiles = block.iter().flat_map(|&tensor| layout.tiles(TensorId(tensor as u32)));
        tiles.map(|tile| tile.group).collect::<BTreeSet<_>>().len()
    };
    // A weight and a gradient chunk for every group of the block.
    let working_set_chunks = 2 * blocks.iter().map(groups).max().unwrap_or(0);
    Ok(Candidate { chunk, utilisation: layout.utilisation(), groups: layout.group_count(), working_set_chunks })
}

fn choose(candidates: &[Candidate], budget: Option<Bytes>) -> Option<Candidate> {
    // Twice the working set: the next block's chunks arrive while this one computes.
    let fits = |c: &&Candidate| budget.is_none_or(|budget| c.working_set_bytes().saturating_mul(2) <= budget.0);
    let Some(top) = candidates.iter().filter(fits).map(|c| c.utilisation).reduce(f64::max) else {
        return candidates.iter().min_by_key(|c| c.working_set_bytes()).copied();
    };
    let near = |c: &&Candidate| c.utilisation >= top * (1.0 - NEAR_TIE);
    candidates.iter().filter(fits).filter(near).max_by_key(|c| c.chunk).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn specs() -> Vec<TensorSpec> {
        let spec = |i: usize| TensorSpec { name: i.to_string(), rows: 64, columns: 64, tile_rows: None, decay: true };
        (0..16).map(spec).collect()
    }

    fn search(max: u64, budget: Option<u64>) -> Result<SearchReport, LayoutError> {
        let blocks: Vec<Vec<usize>> = (0..8).map(|i| vec![2 * i, 2 * i + 1]).collect();
        let device_budget = budget.map(Bytes);
        let limits = SearchLimits { min: Bytes(0), max: Bytes(max), device_budget, working_set: &blocks };
        search_chunk_size(&specs(), Precision::Fp32, limits)
    }

    #[test]
    fn full_utilisation_and_the_larger_chunk_win() {
        let report = search(140_000, None).unwrap();
        assert_eq!((report.best, report.utilisation), (Bytes(131_072), 1.0));
        assert!(report.candidates.len() <= 200);
        assert!(search(1 << 30, None).unwrap().candidates.len() <= 200);
    }

    #[test]
    fn a_budget_bounds_the_working_set() {
        assert_eq!(search(140_000, Some(131_072)).unwrap().best, Bytes(32_768));
        // Nothing fits: the smallest working set is the best there is.
        assert_eq!(search(140_000, Some(1)).unwrap().best, Bytes(16_384));
    }

    #[test]
    fn no_chunk_is_larger_than_its_groups_need() {
        // 2000 rows of 4 KiB: no sample has just the size of a third or a quarter.
        let specs: Vec<TensorSpec> = (0..5)
            .map(|i| TensorSpec { name: i.to_string(), rows: 2000, columns: 1024, tile_rows: Some(1), decay: true })
            .collect();
        let limits = SearchLimits { min: Bytes(1 << 20), max: Bytes(16 << 20), device_budget: None, working_set: &[] };
        let report = search_chunk_size(&specs, Precision::Fp32, limits).unwrap();
        let groups = |bytes: u64| Layout::new(&specs, Precision::Fp32, Bytes(bytes)).unwrap().group_count();
        assert!(groups(report.best.0 - CHUNK_ALIGNMENT) > groups(report.best.0), "{report:?}");
        let sampled = report.candidates.iter().map(|candidate| candidate.utilisation).fold(0.0, f64::max);
        assert!(report.utilisation > sampled * (1.0 - NEAR_TIE), "{report:?}");
    }

    #[test]
    fn an_empty_range_is_refused_with_the_smallest_legal_size() {
        let error = search(8192, None).unwrap_err();
        assert_eq!(error, LayoutError::EmptyRange { min: Bytes(16_384), max: Bytes(8192) });
        let limits = SearchLimits { min: Bytes(0), max: Bytes(1 << 20), device_budget: None, working_set: &[vec![99]] };
        let error = search_chunk_size(&specs(), Precision::Fp32, limits).unwrap_err();
        assert_eq!(error, LayoutError::UnknownTensor { index: 99, count: 16 });
    }
}
