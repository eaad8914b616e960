//! Rows of tables that lie in host memory: looked up by all cores, and their gradients summed in the order of the device that
//! computes the rest.

#![expect(unsafe_code, reason = "takes the only slice of a gradient")]

use std::ops::Range;
use std::sync::Arc;

use candle_core::Result;
use half::{bf16, f16};
use patrickstar_actors::adam::{narrow_fp16, widen_fp16};
use rayon::prelude::*;

use crate::model::param::{GradientSlice, Param, WeightSlice};

/// Passes the row of `table` of each of `ids` and its place in `out` to `write`.
pub(crate) fn gather<O: Send>(
    table: &Param,
    ids: &[u32],
    out: &mut [O],
    write: impl Fn(WeightSlice<'_>, &mut [O]) + Sync,
) -> Result<()> {
    let tiles = table.tiles();
    let weights = (0..tiles.len().max(1)).map(|tile| table.weight(tile)).collect::<Result<Vec<_>>>()?;
    let (width, each) = (table.columns(), out.len() / ids.len().max(1));
    out.par_chunks_mut(each.max(1)).zip(ids).for_each(|(out, &id)| {
        let tile = tiles.partition_point(|tile| tile.row_start <= id as usize) - 1;
        let from = (id as usize - tiles[tile].row_start) * width;
        write(weights[tile].part(from..from + width), out);
    });
    Ok(())
}

/// The positions of a batch by their token: sorted by it, those of one token in order.
pub(crate) struct ByToken {
    ids: Arc<[u32]>,
    order: Vec<u32>,
    /// Where each token that occurs begins in `order`, and its end.
    starts: Vec<u32>,
}

impl ByToken {
    pub fn new(ids: Arc<[u32]>) -> Self {
        let mut keys: Vec<u64> = ids.iter().zip(0u64..).map(|(&id, position)| u64::from(id) << 32 | position).collect();
        keys.sort_unstable();
        let order: Vec<u32> = keys.into_iter().map(|key| key as u32).collect();
        let is_first = |i: usize| i == 0 || ids[order[i] as usize] != ids[order[i - 1] as usize];
        let mut starts: Vec<u32> = (0..order.len()).filter(|&i| is_first(i)).map(|i| i as u32).collect();
        starts.push(order.len() as u32);
        ByToken { ids, order, starts }
    }

    /// All positions in this order.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "kernels take them all at once"))]
    pub fn order(&self) -> &[u32] {
        &self.order
    }

    /// Tokens that occur.
    pub fn count(&self) -> usize {
        self.starts.len() - 1
    }

    /// The positions of token `i` of these as a range of `order`.
    pub fn range(&self, i: usize) -> Range<u32> {
        self.starts[i]..self.starts[i + 1]
    }

    /// The same, one by one.
    pub fn positions(&self, i: usize) -> &[u32] {
        let Range { start, end } = self.range(i);
        &self.order[start as usize..end as usize]
    }

    /// The number of token `i` of these.
    pub fn token(&self, i: usize) -> usize {
        self.ids[self.order[self.starts[i] as usize] as usize] as usize
    }

    /// How many of these from `first` on have a number below `end`.
    pub fn count_below(&self, first: usize, end: usize) -> usize {
        (first..self.count()).take_while(|&i| self.token(i) < end).count()
    }
}

/// Adds the rows of `dy` to the gradient of `table`, token by token; nothing in passes without gradients. Up to `segment` rows
/// of a token are summed one after another; of more, each so many, and their sums one after another.
pub(crate) fn add_by_token<D: Sync>(
    table: &Param,
    by_token: &ByToken,
    segment: usize,
    dy: &[D],
    widen: impl Fn(&D) -> f32 + Sync,
) -> Result<()> {
    let (mut first, width) = (0, table.columns());
    for (index, tile) in table.tiles().iter().enumerate() {
        let own = first..first + by_token.count_below(first, tile.row_start + tile.rows);
        first = own.end;
        let sum = |run: &[u32]| sum_run(run, segment, dy, width, &widen);
        let rows: Vec<(usize, &[u32])> =
            own.map(|i| (by_token.token(i) - tile.row_start, by_token.positions(i))).collect();
        // SAFETY: this is the only slice of the tile's gradient: operations run one after another on the compute thread.
        match unsafe { table.gradient(index)? } {
            None => {}
            Some(GradientSlice::F32(gradient)) => add_rows(gradient, width, &rows, sum, |before, sum| before + sum),
            Some(GradientSlice::Bf16(gradient)) => {
                add_rows(gradient, width, &rows, sum, |before, sum| bf16::from_f32(before.to_f32() + sum));
            }
            Some(GradientSlice::F16(gradient)) => add_rows(gradient, width, &rows, sum, |before, sum| {
                f16::from_bits(narrow_fp16(widen_fp16(before.to_bits()) + sum))
            }),
        }
    }
    Ok(())
}

/// The sum of the rows of `dy` at the positions of one token.
fn sum_run<D>(run: &[u32], segment: usize, dy: &[D], width: usize, widen: &impl Fn(&D) -> f32) -> Vec<f32> {
    let sum_segment = |positions: &[u32]| {
        let mut sum = vec![0f32; width];
        for &position in positions {
            let row = &dy[position as usize * width..][..width];
            sum.iter_mut().zip(row).for_each(|(sum, value)| *sum += widen(value));
        }
        sum
    };
    let mut sums = run.chunks(segment).map(sum_segment);
    let mut total = sums.next().unwrap_or_default();
    for sum in sums {
        total.iter_mut().zip(&sum).for_each(|(total, sum)| *total += sum);
    }
    total
}

/// Adds the sum of each of `rows`, which are sorted, to its row of `gradient`, on all cores.
fn add_rows<T: Copy + Send>(
    gradient: &mut [T],
    width: usize,
    rows: &[(usize, &[u32])],
    sum: impl Fn(&[u32]) -> Vec<f32> + Sync,
    add: impl Fn(T, f32) -> T + Sync,
) {
    let mut places = Vec::with_capacity(rows.len());
    let (mut left, mut next) = (gradient, 0);
    for &(row, run) in rows {
        let (place, rest) = left[(row - next) * width..].split_at_mut(width);
        places.push((place, run));
        (left, next) = (rest, row + 1);
    }
    places.into_par_iter().for_each(|(place, run)| {
        place.iter_mut().zip(sum(run)).for_each(|(place, sum)| *place = add(*place, sum));
    });
}

#[cfg(test)]
mod tests {
    use patrickstar_actors::types::Precision;

    use super::*;
    use crate::model::param::ParamTile;

    #[test]
    fn runs_are_summed_by_segments_into_the_rows_of_any_tile() {
        // Large and small values: another order of sums has other bits.
        let dy: Vec<f32> = (0..200).map(|i| if i % 3 == 0 { 1e8 } else { -3.7 - i as f32 }).collect();
        let ids: Vec<u32> = (0..100).map(|position| if position % 10 == 0 { 6 } else { 1 }).collect();
        let summed = |id: u32, column: usize, segment: usize| {
            let positions: Vec<usize> = (0..100).filter(|&position| ids[position] == id).collect();
            let sums = positions
                .chunks(segment)
                .map(|positions| positions.iter().fold(0f32, |sum, position| sum + dy[2 * position + column]));
            sums.reduce(|a, b| a + b).unwrap()
        };
        for segment in [32, usize::MAX] {
            for split in [3, 6] {
                let weights = [0f32; 16];
                let mut gradients = [1f32; 16];
                let tile = |row_start: usize, rows: usize, gradients: *mut f32| ParamTile {
                    row_start,
                    rows,
                    weight: weights.as_ptr().wrapping_add(2 * row_start).cast(),
                    gradient: gradients.wrapping_add(2 * row_start).cast(),
                };
                let param = Param::new("w", &[8, 2], Precision::Fp32, Some(1));
                let base = gradients.as_mut_ptr();
                // SAFETY: the arrays outlive the binding.
                unsafe { param.bind(vec![tile(0, split, base), tile(split, 8 - split, base)]) };
                add_by_token(&param, &ByToken::new(ids.clone().into()), segment, &dy, |&value| value).unwrap();
                param.release();
                for (row, column) in (0..8).flat_map(|row| [(row, 0), (row, 1)]) {
                    let used = row == 1 || row == 6;
                    let expected = if used { 1.0 + summed(row as u32, column, segment) } else { 1.0 };
                    assert_eq!(gradients[2 * row + column], expected, "row {row} of tiles cut at {split}");
                }
            }
        }
        assert_ne!(summed(1, 0, 32), summed(1, 0, usize::MAX));
    }
}
