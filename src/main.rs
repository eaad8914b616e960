//! The `patrickstar` command.

use patrickstar::telemetry::alloc::CountingAllocator;

/// Counts activations of the compute thread, so that the monitor knows non-model memory.
#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

fn main() -> std::process::ExitCode {
    patrickstar::cli::main()
}
