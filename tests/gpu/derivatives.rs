//! Backward against finite differences on the GPU. In fp32 with the host's tolerances. In bf16 and fp16 a derivative may
//! be off by 3 % and 0.8 % of the largest plus what the rounding of the outputs explains: see `harness::check`.

use patrickstar::model::ops::{Attention, Segments};
use patrickstar_actors::types::Precision;

use crate::harness::checks;
use crate::harness::masks::{attentions, samples};
use crate::{PRECISIONS, gpu};

macro_rules! in_all_types {
    ($($check:ident),*) => {$(
        #[test]
        fn $check() {
            for precision in PRECISIONS {
                checks::$check(&gpu(precision));
            }
        }
    )*};
}

in_all_types!(
    linear,
    linear_add,
    linear_gelu,
    layer_norm,
    rms_norm,
    swiglu,
    rope,
    gelu,
    embeddings,
    positions,
    cross_entropy,
    dropout,
    add,
    candle
);

/// The narrowest head that kernels take: 16 bytes.
fn narrowest(precision: Precision) -> usize {
    if precision == Precision::Fp32 { 4 } else { 8 }
}

#[test]
fn attention() {
    checks::attention(&gpu(Precision::Fp32), &[[2, 1, 1, 4], [2, 5, 3, 4], [1, 9, 2, 8]]);
    for half in [Precision::Bf16, Precision::Fp16] {
        checks::attention(&gpu(half), &[[2, 1, 1, 8], [2, 5, 2, 8], [1, 9, 2, 16]]);
    }
}

/// Every third of all combinations of heads and masks has each of them beside each other one.
#[test]
fn attention_with_masks() {
    for precision in PRECISIONS {
        let (place, head) = (gpu(precision), narrowest(precision));
        for attention in attentions(4).iter().step_by(3) {
            checks::masked_attention(&place, 2, 4, head, attention);
        }
        checks::attention_twice(&place, head);
    }
}

/// More than one tile of queries and keys, the last of them cut.
#[test]
fn attention_over_several_tiles() {
    const TIME: usize = 137;
    for precision in PRECISIONS {
        let (place, head) = (gpu(precision), narrowest(precision));
        checks::attention(&place, &[[1, TIME, 1, head]]);
        let grouped = Attention { kv_heads: 1, ..Attention::causal(2) };
        let segments = Some(Segments::new(&samples(TIME)[..1]).unwrap());
        let masked = Attention { window: Some(50), segments, ..grouped.clone() };
        for attention in [masked, Attention { causal: false, ..grouped }] {
            checks::masked_attention(&place, 1, TIME, head, &attention);
        }
    }
}

/// Widths of one warp's row and of a block's, aligned or not, and more rows than blocks.
#[test]
fn norms_add_to_gradients() {
    for precision in PRECISIONS {
        for sizes in [[6, 33], [300, 64], [2500, 8], [5, 4096], [3, 12_289], [3, 20_000]] {
            checks::norms_add_to_gradients(&gpu(precision), sizes);
        }
    }
}
