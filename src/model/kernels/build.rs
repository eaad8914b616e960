//! Compiles the CUDA sources of the model's operations.

#[path = "../../../actors/kernels/compile.rs"]
mod compile;

fn main() {
    compile::compile(
        "src/model/kernels",
        &[
            "norm",
            "activation",
            "embedding",
            "cross_entropy",
            "cast",
            "rope",
            "attention_forward",
            "attention_backward_q",
            "attention_backward_kv",
            "attention_f32",
        ],
    );
}
