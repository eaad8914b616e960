//! Against a stand-in for the library: what it says comes through, and its absence is one clear line.

use std::path::PathBuf;
use std::process::Command;

use super::*;

const GIB: u64 = 1 << 30;
const IDENTITY: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 255];

fn stand_in(folder: &tempfile::TempDir) -> PathBuf {
    let library = folder.path().join("libstand-in.so");
    let source = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/cuda/nvml_tests.c");
    let status = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(source).status().unwrap();
    assert!(status.success());
    library
}

#[test]
fn neighbours_and_health_come_from_the_library() {
    let folder = tempfile::tempdir().unwrap();
    let library = stand_in(&folder);
    let opened = Opened::load(&["libnot-there.so", library.to_str().unwrap()], IDENTITY).unwrap();
    let reading = opened.read(Pid(std::process::id())).unwrap();
    let other = |pid, bytes| Neighbour { pid: Pid(pid), name: None, bytes: Some(Bytes(bytes)) };
    assert_eq!(reading.neighbours, Neighbours::Known(vec![other(999_999_999, 29 * GIB), other(999_999_998, GIB)]));
    assert_eq!((reading.free, reading.total), (Bytes(10 * GIB), Bytes(80 * GIB)));
    assert_eq!((reading.celsius, reading.watts, reading.joules), (Some(61.0), Some(412.5), Some(7654)));
    assert_eq!((reading.busy, reading.throttles), (Some(0.98), Some(vec![Throttle::Power, Throttle::Heat])));
    // Under numbers of another namespace this process could be any of them.
    assert_eq!(opened.read(Pid(1)).unwrap().neighbours, Neighbours::Mixed { listed: 3 });
}

#[test]
fn a_missing_library_or_gpu_is_one_line_that_says_what_is_not_seen() {
    let error = Opened::load(&["libnot-there.so"], IDENTITY).map_err(MemoryError::from).err().unwrap().to_string();
    assert!(error.starts_with("NVML could not be loaded") && error.contains("free memory"), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
    let folder = tempfile::tempdir().unwrap();
    let library = stand_in(&folder);
    let error =
        Opened::load(&[library.to_str().unwrap()], [7; 16]).map_err(MemoryError::from).err().unwrap().to_string();
    assert!(error.contains("find the GPU that CUDA uses"), "{error}");
}
