//! Compiles the CUDA sources of chunk work.

#[path = "compile.rs"]
mod compile;

fn main() {
    compile::compile("kernels", &["adam"]);
}
