//! What the driver's library says of this GPU, and of a process that takes memory beside this one.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use patrickstar_actors::memory::Backend;
use patrickstar_actors::neighbours::{DeviceReading, Neighbours};
use patrickstar_actors::types::Bytes;

use crate::chunks::backend;
use crate::ops;

/// In the environment of a copy of this program: it is the neighbour, and takes so many bytes.
const TAKES: &str = "PATRICKSTAR_GPU_NEIGHBOUR";
const BYTES: u64 = 3 << 30;

/// A test in name only: what the neighbour does until its input ends.
#[test]
fn a_neighbour_holds_memory() {
    let Ok(bytes) = std::env::var(TAKES) else { return };
    let slab = backend().device_slab(1, Bytes(bytes.parse().unwrap())).unwrap();
    println!("holding");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    drop(slab);
}

struct Neighbour(Child);

impl Neighbour {
    fn start() -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["neighbours::a_neighbour_holds_memory", "--exact", "--nocapture"])
            .env(TAKES, BYTES.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.map_while(Result::ok).any(|line| line.contains("holding")), "the neighbour got no memory");
        Neighbour(child)
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn others(reading: &DeviceReading) -> u64 {
    reading.neighbours.bytes().map_or(0, |bytes| bytes.0)
}

#[test]
fn a_neighbour_is_seen_by_name_and_gone_when_it_ends() {
    let gpu = ops().gpu().clone();
    let began = Instant::now();
    let before = gpu.inspect().unwrap();
    println!("the first look took {:?}: {before:?}", began.elapsed());
    let began = Instant::now();
    assert!(gpu.inspect().is_ok());
    println!("one more took {:?}", began.elapsed());
    let neighbour = Neighbour::start();
    let with = gpu.inspect().unwrap();
    println!("with a neighbour: {}", with.neighbours);
    assert!(with.free.0 + BYTES <= before.free.0 + (256 << 20), "{before:?} {with:?}");
    match &with.neighbours {
        Neighbours::Known(all) => {
            let found = all.iter().find(|process| process.pid.0 == neighbour.0.id()).expect("the neighbour is listed");
            assert!(found.bytes.is_some_and(|bytes| bytes.0 >= BYTES), "{found:?}");
            assert!(found.name.as_deref().is_some_and(|name| name.starts_with("gpu")), "{found:?}");
        }
        // Where processes have other numbers, as in most containers, nothing may be claimed.
        Neighbours::Mixed { .. } => assert!(with.neighbours.bytes().is_none()),
    }
    // The message of what does not fit names it too.
    let error = backend().device_slab(1, Bytes(with.total.0)).err().unwrap().to_string();
    assert!(error.contains(&with.neighbours.to_string()), "{error}");
    drop(neighbour);
    let deadline = Instant::now() + Duration::from_secs(20);
    while others(&gpu.inspect().unwrap()) > others(&before) {
        assert!(Instant::now() < deadline, "the neighbour ended and is still listed");
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn the_gpu_says_how_it_is() {
    let reading = ops().gpu().inspect().unwrap();
    assert!(reading.celsius.is_some_and(|celsius| (5.0..120.0).contains(&celsius)), "{reading:?}");
    assert!(reading.watts.is_some_and(|watts| (1.0..2000.0).contains(&watts)), "{reading:?}");
    assert!(reading.busy.is_some_and(|busy| (0.0..=1.0).contains(&busy)), "{reading:?}");
    assert!(reading.joules.is_some() && reading.throttles.is_some(), "{reading:?}");
    assert!(reading.free < reading.total);
}
