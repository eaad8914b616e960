//! Compiles CUDA sources to cubins in `OUT_DIR`; shared by the build scripts of both packages.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

/// Compiles `folder/NAME.cu` to `OUT_DIR/NAME.cubin` for the architecture in `CUDA_COMPUTE_CAP` (90 by default), if the
/// feature `cuda` is on.
pub fn compile(folder: &str, names: &[&str]) {
    println!("cargo::rerun-if-changed={folder}");
    for variable in ["NVCC", "CUDA_HOME", "CUDA_COMPUTE_CAP"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let Some(out) = env::var_os("OUT_DIR").map(PathBuf::from) else { panic!("OUT_DIR is not set: build with cargo") };
    let capability = env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| "90".to_owned());
    // The tensor core instructions of compute capability 9.0 need its architecture-specific code.
    let architecture = if capability == "90" { "sm_90a".to_owned() } else { format!("sm_{capability}") };
    let nvcc = compiler();
    thread::scope(|scope| {
        for name in names {
            let source = Path::new(folder).join(format!("{name}.cu"));
            let target = out.join(format!("{name}.cubin"));
            let (nvcc, architecture) = (&nvcc, &architecture);
            scope.spawn(move || {
                let status = Command::new(nvcc)
                    .args(["-cubin", "-O3", "-std=c++17", "-arch", architecture, "-o"])
                    .arg(&target)
                    .arg(&source)
                    .status();
                match status {
                    Ok(status) if status.success() => {}
                    Ok(status) => panic!("{} failed on {}: {status}", nvcc.display(), source.display()),
                    Err(error) => panic!(
                        "the feature `cuda` needs nvcc, and {} does not start: {error}; install the CUDA toolkit or set NVCC",
                        nvcc.display()
                    ),
                }
            });
        }
    });
}

fn compiler() -> PathBuf {
    if let Some(nvcc) = env::var_os("NVCC") {
        return nvcc.into();
    }
    match env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc")) {
        Some(nvcc) if nvcc.exists() => nvcc,
        _ => "nvcc".into(),
    }
}
