//! Attention under every mask, by its definition.

use patrickstar::model::ops::{Attention, Segments};

/// How often 16-bit numbers are rounded before products on a GPU: probabilities, their gradients and the output, whose
/// product with its gradient is subtracted from those, before products with keys, queries and values.
pub const INNER: u32 = 4;

/// The samples of each of two sequences.
pub fn samples(time: usize) -> [Vec<usize>; 2] {
    let mut rest = vec![1; time.min(2)];
    rest.extend((time > 2).then(|| time - 2));
    [vec![time / 2, time - time / 2], rest]
}

/// Heads, groups and masks in every combination, for two sequences.
pub fn attentions(time: usize) -> Vec<Attention> {
    let packed = Segments::new(&samples(time)).unwrap();
    let mut attentions = Vec::new();
    for (heads, kv_heads) in [(2, 2), (4, 2), (3, 1)] {
        for causal in [true, false] {
            for window in [None, Some(1), Some(3), Some(time), Some(usize::MAX)] {
                for segments in [None, Some(packed.clone())] {
                    attentions.push(Attention { heads, kv_heads, causal, window, segments });
                }
            }
        }
    }
    attentions
}

pub fn packed_width(attention: &Attention, head: usize) -> usize {
    (attention.heads + 2 * attention.kv_heads) * head
}

/// Whether a query sees a key. `lengths` are those of the samples of one sequence.
fn sees(attention: &Attention, lengths: Option<&[usize]>, query: usize, key: usize) -> bool {
    let sample = |lengths: &[usize], token: usize| {
        let ends = lengths.iter().scan(0, |end, length| {
            *end += length;
            Some(*end)
        });
        ends.take_while(|&end| end <= token).count()
    };
    (!attention.causal || key <= query)
        && attention.window.is_none_or(|window| (query as i128 - key as i128) < window as i128)
        && lengths.is_none_or(|lengths| sample(lengths, query) == sample(lengths, key))
}

/// The result, one number after another.
pub fn attention(
    qkv: &[f64],
    [batch, time, width]: [usize; 3],
    attention: &Attention,
    lengths: Option<&[Vec<usize>]>,
) -> Vec<f64> {
    let (heads, kv_heads) = (attention.heads, attention.kv_heads);
    let of_head = |b: usize, t: usize, head: usize| {
        &qkv[(b * time + t) * packed_width(attention, width) + head * width..][..width]
    };
    let mut out = Vec::new();
    for b in 0..batch {
        let lengths = lengths.map(|lengths| &lengths[b][..]);
        for (query, head) in (0..time).flat_map(|query| (0..heads).map(move |head| (query, head))) {
            let shared = head / (heads / kv_heads);
            let weight = |key: usize| {
                if !sees(attention, lengths, query, key) {
                    return 0.0;
                }
                let pairs = of_head(b, query, head).iter().zip(of_head(b, key, heads + shared));
                (pairs.map(|(q, k)| q * k).sum::<f64>() / (width as f64).sqrt()).exp()
            };
            let weights: Vec<f64> = (0..time).map(weight).collect();
            let sum: f64 = weights.iter().sum();
            for i in 0..width {
                let value = |key: usize| weights[key] / sum * of_head(b, key, heads + kv_heads + shared)[i];
                out.push((0..time).map(value).sum());
            }
        }
    }
    out
}
