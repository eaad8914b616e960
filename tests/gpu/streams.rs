//! The GPU as a backend of chunks: copies, zeroes, the order of streams, callbacks.

#![expect(unsafe_code, reason = "tests bind parameters and call kernels by address")]

use std::sync::mpsc;
use std::time::Duration;

use patrickstar::model::ops;
use patrickstar::model::tape::Tape;
use patrickstar_actors::memory::{Arena, Backend, Slab, SlotIndex};
use patrickstar_actors::types::{Bytes, Precision, Tier};

use crate::chunks::backend;
use crate::compare::mix;
use crate::gpu;

const SLOT: usize = 1 << 20;

fn slot(slab: &dyn Slab, index: u32) -> *mut u8 {
    slab.slot(SlotIndex(index)).as_ptr()
}

/// The bytes of a slot in host memory.
fn bytes(slab: &dyn Slab, index: u32) -> Vec<u8> {
    // SAFETY: a slot of main memory that no stream writes to while this reads.
    unsafe { std::slice::from_raw_parts(slot(slab, index), SLOT) }.to_vec()
}

fn fill(slab: &dyn Slab, index: u32, seed: u64) -> Vec<u8> {
    let pattern: Vec<u8> = (0..SLOT as u64).map(|i| mix(seed << 32 | i) as u8).collect();
    // SAFETY: as above.
    unsafe { std::ptr::copy_nonoverlapping(pattern.as_ptr(), slot(slab, index), SLOT) };
    pattern
}

fn host(slots: u32) -> Box<dyn Slab> {
    backend().host_slab(Arena::new(Tier::Host, slots, Bytes(SLOT as u64)).unwrap()).unwrap()
}

#[test]
fn chunks_travel_there_across_and_back() {
    let backend = backend();
    let (host, device) = (host(4), backend.device_slab(3, Bytes(SLOT as u64)).unwrap());
    assert_eq!((device.slots(), device.slot_bytes()), (3, Bytes(SLOT as u64)));
    assert_eq!((host.slots(), host.slot_bytes()), (4, Bytes(SLOT as u64)));
    let pattern = fill(host.as_ref(), 0, 1);
    (1..4).for_each(|index| drop(fill(host.as_ref(), index, 9)));
    let mut stream = backend.new_stream("test").unwrap();
    let (host_at, device_at) = (|index| slot(host.as_ref(), index), |index| slot(device.as_ref(), index));
    // SAFETY: slots of two slabs that nobody else has, all of one size; the odd length leaves the last byte.
    unsafe {
        stream.copy(host_at(0), device_at(0), SLOT).unwrap();
        stream.copy(device_at(0), device_at(1), SLOT).unwrap();
        stream.copy(device_at(1), device_at(2), SLOT).unwrap();
        stream.zero(device_at(2), SLOT - 1).unwrap();
        stream.copy(device_at(1), host_at(1), SLOT).unwrap();
        stream.copy(device_at(2), host_at(2), SLOT).unwrap();
    }
    let event = stream.record().unwrap();
    event.synchronize().unwrap();
    assert!(event.is_complete().unwrap());
    assert!(bytes(host.as_ref(), 1) == pattern, "there, across and back");
    let zeroed = bytes(host.as_ref(), 2);
    assert!(zeroed[..SLOT - 1].iter().all(|&byte| byte == 0) && zeroed[SLOT - 1] == pattern[SLOT - 1], "zeroed");
    assert!(bytes(host.as_ref(), 3) != pattern, "a slot that nobody asked for was written");
}

/// Work of some milliseconds, then the copy that matters: whoever does not wait reads what was there before.
#[test]
fn a_stream_waits_for_another() {
    const LARGE: usize = 256 << 20;
    let backend = backend();
    let host = host(3);
    let device = backend.device_slab(1, Bytes(SLOT as u64)).unwrap();
    let large = backend.device_slab(2, Bytes(LARGE as u64)).unwrap();
    let (mut first, mut second) = (backend.new_stream("first").unwrap(), backend.new_stream("second").unwrap());
    let (old, new) = (fill(host.as_ref(), 0, 1), fill(host.as_ref(), 1, 2));
    assert!(old != new);
    // SAFETY: slots of slabs that nobody else has.
    let (event, busy) = unsafe {
        first.copy(slot(host.as_ref(), 0), slot(device.as_ref(), 0), SLOT).unwrap();
        first.record().unwrap().synchronize().unwrap();
        for _ in 0..400 {
            first.copy(slot(large.as_ref(), 0), slot(large.as_ref(), 1), LARGE).unwrap();
        }
        first.copy(slot(host.as_ref(), 1), slot(device.as_ref(), 0), SLOT).unwrap();
        let event = first.record().unwrap();
        let busy = !event.is_complete().unwrap();
        second.wait(&event).unwrap();
        second.copy(slot(device.as_ref(), 0), slot(host.as_ref(), 2), SLOT).unwrap();
        (event, busy)
    };
    second.record().unwrap().synchronize().unwrap();
    assert!(event.is_complete().unwrap(), "the second stream passed an event that the first had not reached");
    assert!(bytes(host.as_ref(), 2) == new, "the second stream read what was there before");
    assert!(busy, "queueing waited for the work, so this test shows nothing");
}

#[test]
fn a_callback_comes_after_what_was_queued() {
    let backend = backend();
    let (host, device) = (host(2), backend.device_slab(1, Bytes(SLOT as u64)).unwrap());
    let pattern = fill(host.as_ref(), 0, 3);
    drop(fill(host.as_ref(), 1, 4));
    let mut stream = backend.new_stream("test").unwrap();
    let (sender, receiver) = mpsc::channel();
    let back = slot(host.as_ref(), 1) as usize;
    // SAFETY: slots of slabs that nobody else has.
    unsafe {
        stream.copy(slot(host.as_ref(), 0), slot(device.as_ref(), 0), SLOT).unwrap();
        stream.copy(slot(device.as_ref(), 0), slot(host.as_ref(), 1), SLOT).unwrap();
    }
    let second = sender.clone();
    stream
        .on_complete(Box::new(move || {
            // SAFETY: the slab lives until the end of the test, which waits for this.
            let seen = unsafe { std::slice::from_raw_parts(back as *const u8, SLOT) }.to_vec();
            drop(sender.send(seen));
        }))
        .unwrap();
    stream.on_complete(Box::new(move || drop(second.send(Vec::new())))).unwrap();
    let wait = || receiver.recv_timeout(Duration::from_secs(20)).expect("no callback within 20 s");
    assert!(wait() == pattern, "the callback ran before the copy was done");
    assert!(wait().is_empty(), "callbacks of one stream come in order");
}

/// A copy of what the model computes waits for the model.
#[test]
fn the_event_of_the_compute_stream_covers_what_the_model_queued() {
    let (backend, place) = (backend(), gpu(Precision::Fp32));
    let elements = SLOT / 4;
    let host = host(1);
    let mut stream = backend.new_stream("test").unwrap();
    let tape = Tape::forgetting(&place.compute);
    let mut x = tape.constant(place.tensor(&vec![1.0; elements], &[elements]));
    for _ in 0..10 {
        x = ops::add(&x, &x).unwrap();
    }
    let result = x.tensor().unwrap();
    let event = backend.compute_event().unwrap().expect("a GPU computes beside the host");
    stream.wait(&event).unwrap();
    let from = place.compute.address(&result).unwrap();
    // SAFETY: the tensor has that many bytes and lives until the copy is done.
    unsafe { stream.copy(from, slot(host.as_ref(), 0), SLOT) }.unwrap();
    stream.record().unwrap().synchronize().unwrap();
    let seen = bytes(host.as_ref(), 0);
    assert!(seen.chunks_exact(4).all(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]) == 1024.0));
}

#[test]
fn a_tier_larger_than_the_card_is_refused_with_its_size() {
    let error = backend().device_slab(1 << 20, Bytes(1 << 30)).err().expect("a pebibyte").to_string();
    assert!(error.contains("device"), "{error} does not name the tier");
}
