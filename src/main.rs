//! The `patrickstar` command.

#![expect(unsafe_code, reason = "sets a variable before there are threads")]

use patrickstar::telemetry::alloc::CountingAllocator;

/// Counts activations of the compute thread, so that the monitor knows non-model memory.
#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// candle's own threads spin for work between element-wise operations, and would take the cores from the optimizer and
/// the copy streams.
const SPIN_LIMIT: &str = "CANDLE_BARRIER_POOL_SPIN_LIMIT";

fn main() -> std::process::ExitCode {
    if std::env::var_os(SPIN_LIMIT).is_none() {
        // SAFETY: no other thread runs yet.
        unsafe { std::env::set_var(SPIN_LIMIT, "0") };
    }
    patrickstar::cli::main()
}
