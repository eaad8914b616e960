//! How well copies and updates hide under compute, on any machine: a model that only takes time, a link that only takes
//! time, and real actors between them.
//!
//! `cargo run --release -p patrickstar-actors --example pace -- [groups=33] [slots=68] [forward_us=700] [copy_us=560]
//! [streamed=0] [resident=auto] [clip=0] [steps=8]`
//!
//! Each group is a block; its backward takes three times its forward. Host updates are real, so the host's cores set their
//! rate. Prints the time of each step beside its parts.

#![allow(clippy::print_stdout)] // a report
#![expect(unsafe_code, reason = "implements a device")]

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use patrickstar_actors::adam::AdamConfig;
use patrickstar_actors::chunk::{Layout, TensorSpec};
use patrickstar_actors::memory::{
    Backend, CpuBackend, DeviceMath, Event, MemoryError, Rows, Slab, StateAddresses, Stream,
};
use patrickstar_actors::monitor::NoProbe;
use patrickstar_actors::runtime::{Runtime, RuntimeConfig, StepStart};
use patrickstar_actors::schedule::Policy;
use patrickstar_actors::stats::{Direction, StallCause};
use patrickstar_actors::timeline::Timeline;
use patrickstar_actors::types::{Bytes, ChunkId, GroupId, Kind, Precision, Step, Tier};
use patrickstar_actors::{Access, EvictionPolicy, SplitCosts, SplitRoom, spread_sides};

const CHUNK: u64 = 8 << 20;

/// A device whose copies and updates take a fixed time and do nothing.
struct Paced {
    copy: Duration,
}

struct PacedStream {
    copy: Duration,
    queued: Duration,
}

/// Sums and steps at the speed of device memory.
struct PacedMath;

impl Stream for PacedStream {
    unsafe fn copy(&mut self, _: *const u8, _: *mut u8, _: usize) -> Result<(), MemoryError> {
        self.queued += self.copy;
        Ok(())
    }

    unsafe fn zero(&mut self, _: *mut u8, _: usize) -> Result<(), MemoryError> {
        self.queued += self.copy / 20;
        Ok(())
    }

    fn wait(&mut self, _: &Event) -> Result<(), MemoryError> {
        Ok(())
    }

    fn record(&mut self) -> Result<Event, MemoryError> {
        pass(std::mem::take(&mut self.queued));
        CpuBackend.new_stream("paced")?.record()
    }

    fn on_complete(&mut self, callback: Box<dyn FnOnce() + Send>) -> Result<(), MemoryError> {
        callback();
        Ok(())
    }
}

impl DeviceMath for PacedMath {
    unsafe fn step(
        &self,
        _: Precision,
        _: &patrickstar_actors::adam::StepScalars,
        _: bool,
        _: StateAddresses,
        _: usize,
    ) -> Result<(), MemoryError> {
        pass(Duration::from_micros(100));
        Ok(())
    }

    unsafe fn row_sums(&self, _: Precision, gradients: &[Rows]) -> Result<Vec<Vec<f64>>, MemoryError> {
        pass(Duration::from_micros(50));
        Ok(gradients.iter().map(|gradient| vec![1.0; gradient.rows]).collect())
    }

    fn finish(&self) -> Result<(), MemoryError> {
        Ok(())
    }
}

impl Backend for Paced {
    fn new_stream(&self, _: &str) -> Result<Box<dyn Stream>, MemoryError> {
        Ok(Box::new(PacedStream { copy: self.copy, queued: Duration::ZERO }))
    }

    fn device_slab(&self, slots: u32, slot_bytes: Bytes) -> Result<Box<dyn Slab>, MemoryError> {
        CpuBackend.device_slab(slots, slot_bytes)
    }

    fn separates_non_model(&self) -> bool {
        true
    }

    fn math(&self) -> Result<Option<Box<dyn DeviceMath>>, MemoryError> {
        Ok(Some(Box::new(PacedMath)))
    }
}

fn pass(time: Duration) {
    if !time.is_zero() {
        std::thread::sleep(time);
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: HashMap<String, u64> = std::env::args()
        .skip(1)
        .filter_map(|argument| {
            let (name, value) = argument.split_once('=')?;
            Some((name.to_owned(), value.parse().ok()?))
        })
        .collect();
    let get = |name: &str, default: u64| arguments.get(name).copied().unwrap_or(default);
    let (groups, slots, clip) = (get("groups", 33) as u32, get("slots", 68) as u32, get("clip", 0));
    let forward = Duration::from_micros(get("forward_us", 700));
    let copy = Duration::from_micros(get("copy_us", 560));
    let columns = 1024;
    let specs: Vec<TensorSpec> = (0..groups)
        .map(|group| TensorSpec {
            name: format!("t{group}"),
            rows: CHUNK as usize / 2 / columns,
            columns,
            tile_rows: None,
            decay: true,
        })
        .collect();
    let layout = Layout::new(&specs, Precision::Bf16, Bytes(CHUNK))?;
    let room = SplitRoom {
        slots,
        working_set: 2,
        groups,
        persistent: 6,
        together: clip > 0,
        tight: false,
        looked_up: 0,
        below: groups * 7 + 4,
    };
    let costs = SplitCosts {
        compute: forward * groups * 4,
        forward_share: 0.25,
        host_step: Duration::from_millis(3),
        memory_share: 1.0,
        to_device: copy,
        to_host: copy,
    };
    let streamed = get("streamed", 0) as u32;
    let resident =
        get("resident", u64::from(if streamed > 0 { room.resident_beside_a_stream() } else { room.most_resident() }));
    let config = RuntimeConfig {
        device: Bytes(u64::from(slots) * CHUNK),
        non_model: Bytes(0),
        host_slots: groups * 7 + 4,
        disk_slots: 0,
        disk_path: std::env::temp_dir().join("pace"),
        eviction: EvictionPolicy { policy: Policy::Opt, prefetch: get("prefetch", 16) as u32 },
        sides: spread_sides(groups, 0, resident as u32, streamed),
        split: None,
        adam: AdamConfig::default(),
        clip_norm: clip as f64,
        mailbox: 256,
        optimizer_threads: 2,
        fixed_share: false,
        headroom: 0.0,
        monitor_interval: Duration::from_millis(100),
    };
    let (backend, timeline) = (Arc::new(Paced { copy }), Arc::new(Timeline::default()));
    let mut runtime =
        Runtime::start(layout.clone(), config, vec![1; groups as usize], backend, Arc::new(NoProbe), timeline)?;
    for group in (0..groups).map(GroupId) {
        for &kind in Precision::Bf16.persistent_kinds() {
            layout.group_chunks(group, kind).iter().try_for_each(|&chunk| runtime.clear(&[chunk]))?;
        }
    }
    let chunk = |group: u32, kind: Kind| -> ChunkId { layout.group_chunks(GroupId(group), kind)[0] };
    for step in 1..=get("steps", 8) {
        let (began, before) = (Instant::now(), runtime.stats());
        runtime.begin_step(StepStart::new(Step(step), 1e-3))?;
        for group in 0..groups {
            let lease = runtime.access(
                || format!("forward {group}"),
                Tier::Device,
                vec![(chunk(group, Kind::Weight), Access::Read)],
            )?;
            pass(forward);
            runtime.release_forward(lease)?;
        }
        for group in (0..groups).rev() {
            let request =
                vec![(chunk(group, Kind::Weight), Access::Read), (chunk(group, Kind::Gradient), Access::Fresh)];
            let lease = runtime.access(|| format!("backward {group}"), Tier::Device, request)?;
            pass(forward * 3);
            runtime.release_backward(lease)?;
        }
        runtime.end_step()?;
        let stats = runtime.stats().since(&before);
        let moved = |direction: Direction| stats.moves[direction as usize];
        let stalls: Vec<String> = StallCause::ALL
            .into_iter()
            .map(|cause| (cause.name(), stats.stalls[cause as usize].as_secs_f64() * 1e3))
            .filter(|(_, ms)| *ms > 0.5)
            .map(|(name, ms)| format!("{name} {ms:.1}"))
            .collect();
        println!(
            "step {step}: {:.1} ms (compute {:.1}, to device {} in {:.1}, to host {} in {:.1}, host updates {:.1}), waits: {}; wasted {}",
            began.elapsed().as_secs_f64() * 1e3,
            costs.compute.as_secs_f64() * 1e3,
            moved(Direction::HostToDevice),
            stats.busy[Direction::HostToDevice as usize].as_secs_f64() * 1e3,
            moved(Direction::DeviceToHost),
            stats.busy[Direction::DeviceToHost as usize].as_secs_f64() * 1e3,
            stats.stepping_on_host.as_secs_f64() * 1e3,
            stalls.join(", "),
            stats.prefetch_wasted,
        );
    }
    println!("{resident} of {groups} groups live on the device, {streamed} pass through");
    Ok(())
}
