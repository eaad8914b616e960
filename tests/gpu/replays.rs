//! Products that come again with the same addresses are queued without the library.

use candle_core::Tensor;
use patrickstar::model::compute::Compute;
use patrickstar::model::ops;
use patrickstar::model::param::Param;
use patrickstar::model::tape::Tape;
use patrickstar_actors::types::{Bytes, Precision};

use crate::compare::{assert_same_bits, representable};
use crate::gpu;
use crate::harness::{Owned, Place, floats_of};

const SHAPE: [usize; 3] = [96, 64, 128]; // tokens, inner and outer width

fn owned() -> [Owned; 2] {
    let [_, inner, outer] = SHAPE;
    let values = |name: &'static str, shape: &[usize]| {
        Owned::from_values(name, shape, Precision::Bf16, &representable(Precision::Bf16, name, shape.iter().product()))
    };
    [values("w", &[outer, inner]), values("b", &[outer])]
}

fn numbers(place: &Place, name: &str) -> Tensor {
    let [tokens, inner, _] = SHAPE;
    place.tensor(&representable(Precision::Bf16, name, tokens * inner), &[tokens, inner])
}

/// A product with a bias; its result is free again for the next one.
fn product(place: &Place, x: &Tensor, params: &[Param]) -> Vec<f32> {
    let x = Tape::recording(&place.compute).constant(x.clone());
    let y = ops::linear(&x, &params[0], Some(&params[1])).and_then(|y| y.tensor()).unwrap();
    floats_of(&y)
}

#[test]
fn a_product_that_comes_again_is_recorded_and_reads_what_is_there_now() {
    let place = gpu(Precision::Bf16);
    place.compute.keep_buffers(Bytes(1 << 20)).unwrap();
    let replayed = || match &place.compute {
        Compute::Cuda(ops) => ops.replayed_products().unwrap(),
        Compute::Cpu => panic!("a place on the GPU computes on the host"),
    };
    place.with_params(&mut owned(), false, |params| {
        let [x, other] = ["first", "second"].map(|name| numbers(&place, name));
        // The first time and at a place where nothing has come the library is asked.
        let [first, second] = [&x, &other].map(|x| product(&place, x, params));
        assert!(first != second);
        let before = replayed();
        // More often than needed: an engine of another test may take the results' memory away between two of them.
        for time in 0..40 {
            assert_same_bits(&format!("time {time}"), &product(&place, &x, params), &first);
        }
        // Other tests may have theirs on the same GPU meanwhile: this counts for certain where the test runs alone.
        assert!(replayed() >= before + 20);
        // Other numbers at the same place.
        x.slice_set(&other, 0, 0).unwrap();
        assert_same_bits("of other numbers", &product(&place, &x, params), &second);
        // And the first ones elsewhere.
        assert_same_bits("elsewhere", &product(&place, &numbers(&place, "first"), params), &first);
    });
}
