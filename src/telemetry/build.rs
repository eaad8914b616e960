//! Which program this is: what a graph or a report of an error needs to be traced to its source.

pub use patrickstar_build_info::REVISION;

/// As releases are counted.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The CUDA version that the program was built for, such as "13.0"; "none" without the feature `cuda`.
pub fn cuda() -> String {
    #[cfg(feature = "cuda")]
    return dotted(cudarc::driver::sys::CUDA_VERSION);
    #[cfg(not(feature = "cuda"))]
    "none".to_owned()
}

/// As the toolkit counts: 1000 for the first number, 10 for the second.
#[cfg(any(test, feature = "cuda"))]
fn dotted(version: u32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

#[cfg(test)]
mod tests {
    #[test]
    fn versions_are_written_as_their_toolkit_is_called() {
        assert_eq!(super::dotted(12_080), "12.8");
        assert_eq!(super::dotted(13_000), "13.0");
    }
}
