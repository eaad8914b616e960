//! Backward against finite differences on the GPU. In fp32 with the host's tolerances. In bf16 a derivative may be off by
//! 3 % of the largest plus what the rounding of the outputs explains: see `harness::check`.

use patrickstar_actors::types::Precision;

use crate::harness::checks;
use crate::{PRECISIONS, gpu};

macro_rules! in_both_types {
    ($($check:ident),*) => {$(
        #[test]
        fn $check() {
            for precision in PRECISIONS {
                checks::$check(&gpu(precision));
            }
        }
    )*};
}

in_both_types!(
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
    checks::attention(&gpu(Precision::Bf16), &[[2, 1, 1, 8], [2, 5, 2, 8], [1, 9, 2, 16]]);
}
