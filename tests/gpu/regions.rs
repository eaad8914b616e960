//! Somebody else on the GPU takes memory and leaves it again: the run goes on with less, with the same bits. Both fill the
//! GPU, so these tests run alone: `gpu --ignored --test-threads=1 regions::`.

#![expect(unsafe_code, reason = "takes memory of the GPU by address")]

use std::time::{Duration, Instant};

use cudarc::driver::{result, sys};
use patrickstar::config::Size;
use patrickstar::data::{TokenBatch, Tokenizer};
use patrickstar::train::model::{build, to_batch};
use patrickstar::{Config, Engine};
use patrickstar_actors::memory::{Backend, SlotIndex};
use patrickstar_actors::types::{Bytes, Tier};

use crate::chunks::backend;
use crate::compare::mix;
use crate::ops;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// What a neighbour asks for at a time.
const PIECE: u64 = 256 * MIB;
/// Long enough for a region to be emptied and for the monitor to be sure that memory stays free.
const PATIENCE: Duration = Duration::from_secs(60);

/// Memory that somebody else has.
struct Neighbour(Vec<sys::CUdeviceptr>);

impl Neighbour {
    fn take(&mut self) -> bool {
        ops().gpu().context().bind_to_thread().unwrap();
        // SAFETY: a plain allocation, freed in `drop`.
        let piece = unsafe { result::malloc_sync(PIECE as usize) };
        piece.map(|piece| self.0.push(piece)).is_ok()
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        // SAFETY: allocated in `take`, and nobody has seen them.
        self.0.drain(..).for_each(|piece| unsafe { result::free_sync(piece) }.unwrap());
    }
}

fn free() -> u64 {
    backend().room().unwrap().unwrap().free.0
}

fn config() -> Config {
    let mut config = Config::default();
    config.model.hidden = 2048;
    config.model.layers = 12;
    config.model.heads = 16;
    config.model.context = 128;
    config.model.vocab = Some(600);
    config.memory.device = Bytes(6 * GIB);
    config.memory.chunk = Size::Bytes(Bytes(64 * MIB));
    config.train.batch = 2;
    config.train.seq_len = 128;
    config
}

fn engine() -> Engine {
    let mut config = config();
    let (_, blocks) = build(&mut config, &Tokenizer::Bytes).unwrap();
    Engine::new(config, blocks).unwrap()
}

/// The bits of the loss of a step.
fn step(engine: &mut Engine, index: u64) -> u64 {
    let tokens: Vec<u32> = (0..257).map(|i| (mix(index << 32 | i) % 600) as u32).collect();
    let batch = TokenBatch { input: tokens[..256].to_vec(), target: tokens[1..].to_vec(), sequences: 2, seq_len: 128 };
    engine.step(&to_batch(&batch, 1).unwrap()).unwrap().loss.to_bits()
}

fn capacity(engine: &Engine) -> u64 {
    engine.runtime().tier_use(Tier::Device).capacity.0
}

#[test]
#[ignore = "fills the GPU; run alone"]
fn a_neighbour_gets_memory_and_gives_it_back() {
    let mut engine_beside = engine();
    let mut losses: Vec<u64> = (0..4).map(|index| step(&mut engine_beside, index)).collect();
    std::thread::sleep(Duration::from_millis(500));
    let whole = capacity(&engine_beside);
    // More than is free, by a gigabyte: it has to come from the chunks.
    let asked = (free() + GIB) / PIECE;
    let mut neighbour = Neighbour(Vec::new());
    let began = Instant::now();
    while (neighbour.0.len() as u64) < asked {
        assert!(began.elapsed() < PATIENCE, "the neighbour got {} of {asked} pieces", neighbour.0.len());
        if !neighbour.take() {
            losses.push(step(&mut engine_beside, losses.len() as u64));
        }
    }
    for _ in 0..4 {
        losses.push(step(&mut engine_beside, losses.len() as u64));
    }
    let beside = capacity(&engine_beside);
    assert!(beside + GIB / 2 <= whole, "chunks keep {beside} of {whole} bytes");
    drop(neighbour);
    let began = Instant::now();
    while capacity(&engine_beside) < whole {
        assert!(began.elapsed() < PATIENCE, "chunks have {} of {whole} bytes again", capacity(&engine_beside));
        losses.push(step(&mut engine_beside, losses.len() as u64));
    }
    drop(engine_beside);
    let mut alone = engine();
    let reference: Vec<u64> = (0..losses.len() as u64).map(|index| step(&mut alone, index)).collect();
    assert_eq!(losses, reference);
}

#[test]
#[ignore = "measures what is free on the GPU; run alone"]
fn regions_go_back_to_the_driver_and_keep_their_addresses() {
    let backend = backend();
    let slot = 48 * MIB;
    let slab = backend.device_slab(40, Bytes(slot)).unwrap();
    let first = slab.slot(SlotIndex(0)).as_ptr();
    let (full, kept) = (free(), slab.region_end(10));
    assert!((10..40).contains(&kept), "{kept}");
    let mut stream = backend.new_stream("test").unwrap();
    let pattern: Vec<u8> = (0..slot).map(|i| mix(i) as u8).collect();
    let mut seen = vec![0u8; slot as usize];
    // SAFETY: slots with memory that nobody else has, and nothing is queued when memory goes.
    unsafe {
        stream.copy(pattern.as_ptr(), first, pattern.len()).unwrap();
        stream.record().unwrap().synchronize().unwrap();
        assert_eq!(slab.back(10).unwrap(), kept);
        assert!(free() >= full + GIB, "{full} bytes were free, now {}", free());
        assert_eq!(slab.back(40).unwrap(), 40);
        let last = slab.slot(SlotIndex(39)).as_ptr();
        stream.copy(first, last, pattern.len()).unwrap();
        stream.copy(last, seen.as_mut_ptr(), seen.len()).unwrap();
        stream.record().unwrap().synchronize().unwrap();
    }
    assert!(seen == pattern);
    drop(slab);
    assert!(free() >= full + 40 * slot - PIECE);
}
