//! Compiles the CUDA sources of the model's operations.

#[path = "../../../actors/kernels/compile.rs"]
mod compile;

fn main() {
    // What is stored beside weights, which the chunks' kernels know.
    println!("cargo::rerun-if-changed=actors/kernels/stored.cuh");
    compile::compile(
        "src/model/kernels",
        &[
            "norm",
            "activation",
            "embedding",
            "cross_entropy",
            "cast",
            "draw",
            "rope",
            "attention_forward",
            "attention_backward_q",
            "attention_backward_kv",
            "attention_f32",
        ],
    );
}
