//! Backward against finite differences on the GPU. In fp32 with the host's tolerances. In bf16 and fp16 a derivative may
//! be off by 3 % and 0.8 % of the largest plus what the rounding of the outputs explains: see `harness::check`.

use patrickstar_actors::types::Precision;

use crate::harness::checks;
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
    gelu,
    embeddings,
    positions,
    cross_entropy,
    dropout,
    add,
    candle
);

/// Kernels take heads of a multiple of 16 bytes.
#[test]
fn attention() {
    checks::attention(&gpu(Precision::Fp32), &[[2, 1, 1, 4], [2, 5, 3, 4], [1, 9, 2, 8]]);
    for half in [Precision::Bf16, Precision::Fp16] {
        checks::attention(&gpu(half), &[[2, 1, 1, 8], [2, 5, 2, 8], [1, 9, 2, 16]]);
    }
}
