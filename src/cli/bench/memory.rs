//! `bench adam` and `bench copy`.

use patrickstar_actors::error::RuntimeError;
use patrickstar_actors::memory::MemoryError;
use patrickstar_actors::memory::bandwidth::{adam_bandwidth, copy_bandwidth, triad_bandwidth};
use patrickstar_actors::types::{Bytes, Precision};
use serde_json::{Value, json};

use crate::Error;

fn failed(error: MemoryError) -> Error {
    RuntimeError::from(error).into()
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Elements of each state: far larger than any cache.
const ELEMENTS: usize = 32 << 20;
const REPEATS: usize = 5;

/// The fused update against the triad, both on all cores.
pub fn adam() -> Result<Value, Error> {
    let triad = triad_bandwidth(Bytes(4 * ELEMENTS as u64), threads()).map_err(failed)?;
    let mut value = json!({"threads": threads(), "triad_gbps": triad / 1e9});
    for (name, precision) in [("fp32", Precision::Fp32), ("bf16", Precision::Bf16), ("fp16", Precision::Fp16)] {
        let rate = adam_bandwidth(precision, ELEMENTS, REPEATS).map_err(failed)?;
        value[format!("{name}_gbps")] = (rate.bytes_per_s / 1e9).into();
        value[format!("{name}_mparams_per_s")] = (rate.params_per_s / 1e6).into();
        value[format!("{name}_of_triad")] = (rate.bytes_per_s / triad).into();
    }
    Ok(value)
}

/// What copies between tiers could reach on this machine.
pub fn copy() -> Result<Value, Error> {
    let bytes = Bytes(256 << 20);
    let one = copy_bandwidth(bytes, 1).map_err(failed)?;
    let all = copy_bandwidth(bytes, threads()).map_err(failed)?;
    Ok(json!({"one_stream_gbps": one / 1e9, "all_cores_gbps": all / 1e9, "ratio": one / all}))
}
