//! `bench kernels`: time of each kernel at the sizes of a training, beside its floor. The floor is the bytes a kernel must
//! move over the rate of a large copy, or its operations over the rate of a large product, both measured in the same run.
//! Beside it stands a copy that moves as many bytes as the kernel, with what starting it costs.

#[cfg(feature = "cuda")]
mod cases;
#[cfg(feature = "cuda")]
mod clock;
#[cfg(feature = "cuda")]
mod torch;

use std::path::Path;

use serde_json::Value;

use crate::Error;

/// An array with an object for each kernel; the first two are the copy and the product that give the floors. With `python`
/// attention has PyTorch's time beside it.
#[cfg(feature = "cuda")]
pub fn run(python: Option<&Path>) -> Result<Value, Error> {
    let mut rows = cases::measure()?;
    if let Some(python) = python {
        torch::add(&mut rows, python)?;
    }
    Ok(Value::Array(rows))
}

#[cfg(not(feature = "cuda"))]
pub fn run(_: Option<&Path>) -> Result<Value, Error> {
    Err(Error::Failed(
        "bench kernels times a GPU, and this program was built for the host: build with cargo build --release --features cuda".into(),
    ))
}

/// The array as lines for people.
pub fn table(rows: &[Value]) -> Vec<String> {
    let header = format!("{:28} {:>24} {:>10} {:>10} {:>6}  {}", "kernel", "shape", "ms", "floor ms", "ratio", "rate");
    let line = |row: &Value| {
        let text = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
        let number = |key: &str| row[key].as_f64().unwrap_or(f64::NAN);
        let rate = match row["tflops"].as_f64() {
            Some(tflops) => format!("{tflops:.0} TFLOP/s"),
            None => format!("{:.0} GB/s", number("gbps")),
        };
        let (ms, floor) = (number("s") * 1e3, number("floor_s") * 1e3);
        let of_copy = row["of_copy"]
            .as_f64()
            .map_or(String::new(), |ratio| format!("  {ratio:.2} of the speed of a copy as large"));
        let of_sdpa =
            row["of_sdpa"].as_f64().map_or(String::new(), |ratio| format!("  {ratio:.2} times PyTorch's speed"));
        let (name, shape, ratio) = (text("name"), text("shape"), number("ratio"));
        format!("{name:28} {shape:>24} {ms:>10.4} {floor:>10.4} {ratio:>6.3}  {rate}{of_copy}{of_sdpa}")
    };
    std::iter::once(header).chain(rows.iter().map(line)).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_table_has_a_line_a_kernel() {
        let rows = [
            json!({"name": "sum", "shape": "16384 x 2048", "s": 2e-4, "floor_s": 1e-4, "ratio": 0.5, "gbps": 1500.0}),
            json!({"name": "qkv_forward", "shape": "1 x 2 x 3", "s": 1e-3, "floor_s": 1e-3, "ratio": 1.0, "tflops": 700.0}),
        ];
        let lines = table(&rows);
        assert_eq!(lines.len(), 3);
        assert!(
            lines[1].contains("0.2000") && lines[1].contains("0.500") && lines[1].ends_with("1500 GB/s"),
            "{lines:?}"
        );
        assert!(lines[2].ends_with("700 TFLOP/s"), "{lines:?}");
        let attention = json!({"name": "attention_forward", "shape": "1 x 1 x 1 x 64", "s": 1e-3, "floor_s": 5e-4, "ratio": 0.5,
            "tflops": 300.0, "sdpa_s": 2e-3, "of_sdpa": 2.0});
        let small = json!({"name": "sum", "shape": "1 x 8", "s": 2e-6, "floor_s": 1e-7, "ratio": 0.05, "gbps": 1.0,
            "copy_s": 1.8e-6, "of_copy": 0.9});
        assert!(table(&[small])[1].ends_with("1 GB/s  0.90 of the speed of a copy as large"));
        assert!(table(&[attention])[1].ends_with("300 TFLOP/s  2.00 times PyTorch's speed"));
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_program_for_the_host_says_what_to_build() {
        assert!(run(None).unwrap_err().to_string().contains("--features cuda"));
    }
}
