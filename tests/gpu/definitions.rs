//! Every operation on the GPU against its definition in f64: the host's operations, with which the other tests compare,
//! may be wrong in the same way.

use patrickstar::model::ops::Rope;
use patrickstar_actors::types::Tier;

use crate::harness::Place;
use crate::harness::checks::ropes;
use crate::harness::definitions::{self, TAILS};
use crate::harness::masks::attentions;
use crate::{PRECISIONS, gpu, sizes};

fn in_all_types(check: impl Fn(&Place)) {
    PRECISIONS.map(gpu).iter().for_each(check);
}

/// Three sizes, each through the tails.
fn triples() -> Vec<[usize; 3]> {
    sizes(&TAILS).flat_map(|s| [[s, 64, 96], [33, s, 40], [31, 48, s]]).collect()
}

/// Rows and widths.
fn pairs() -> Vec<[usize; 2]> {
    sizes(&TAILS).flat_map(|s| [[s, 64], [33, s]]).collect()
}

#[test]
fn linear() {
    in_all_types(|place| triples().into_iter().for_each(|sizes| definitions::linear(place, sizes)));
}

#[test]
fn gelu_and_dropout() {
    in_all_types(|place| {
        for length in sizes(&[8193, 1, 7, 31, 33, 1000]) {
            definitions::gelu(place, length);
            definitions::dropout(place, length);
        }
    });
}

/// Rows of a warp and of a block, those that are kept and those that are read again.
#[test]
fn norms() {
    in_all_types(|place| {
        for sizes in pairs().into_iter().chain([[5, 4096], [3, 12_289], [3, 20_000]]) {
            definitions::layer_norm(place, sizes);
            definitions::rms_norm(place, sizes);
        }
    });
}

#[test]
fn swiglu() {
    in_all_types(|place| pairs().into_iter().for_each(|sizes| definitions::swiglu(place, sizes)));
}

#[test]
fn embeddings() {
    in_all_types(|place| {
        for sizes in triples() {
            definitions::embedding(place, sizes);
            definitions::embedding(&Place { tier: Tier::Host, ..place.clone() }, sizes);
            definitions::positions(place, sizes);
        }
    });
}

#[test]
fn cross_entropy() {
    in_all_types(|place| {
        for sizes in triples().into_iter().chain([[9, 61_001, 8]]) {
            definitions::cross_entropy(place, sizes);
        }
    });
}

#[test]
fn rope() {
    in_all_types(|place| {
        // Longer and shorter times than before, which a table is kept for.
        for time in [3, 700, 5] {
            for rope in ropes() {
                definitions::rope(place, time, 24, &rope);
            }
            for interleaved in [false, true] {
                let rope = Rope { heads: 3, head_dim: 64, rotary_dim: 32, theta: 10_000.0, interleaved };
                definitions::rope(place, time, 256, &rope);
            }
        }
    });
}

/// Times within a tile and beyond, with every mask.
#[test]
fn attention() {
    in_all_types(|place| {
        for (time, head) in [(3, 8), (33, 40), (129, 64), (70, 144)] {
            for attention in sizes(&attentions(time).iter().collect::<Vec<_>>()) {
                definitions::attention(place, time, head, attention);
            }
        }
    });
}
