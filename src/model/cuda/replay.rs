//! Calls of a library that come again, at whatever addresses: from then on the kernels that they came to are queued without it.
//! What the library works out in every call, from a plan to the arguments of its kernels, takes the host longer than queuing
//! them.
//!
//! What is queued are the very kernels and arguments of the call, so results have the same bits. Where its addresses are among
//! the arguments is learned from captures at other addresses, which nothing ever reads: every word that is not the same in all
//! of them must be an address of the call or lie a fixed distance from one, or the call stays with the library.

#![expect(unsafe_code, reason = "queues what a library would have queued")]

use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::Hash;

use candle_core::Result;
use candle_core::cuda_backend::cudarc::driver::CudaStream;

use super::capture::{Recorder, Work};
use crate::model::rng::philox;

/// A form is recorded when it comes after so many other calls since the first time: those of a training come again every step,
/// those of a text that grows as often as the model has layers, and then never.
const APART: u64 = 512;
/// More forms than any model has. What is known of one takes a few KiB.
const MOST_FORMS: usize = 4096;
/// Captures at made-up addresses, beside the one at those of the call.
const PROBES: u32 = 3;
/// In bytes: more alignment changes neither a plan nor a kernel.
pub(super) const BEST_ALIGNMENT: u64 = 256;
const BEST_ALIGNED_BITS: u32 = BEST_ALIGNMENT.trailing_zeros();
/// Bits of an address.
const ADDRESS_BITS: u32 = 47;

/// What an implementation may see in an address without reading the memory: that it is none, how it is aligned, and the first
/// that is equal to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct AddressClass {
    is_null: bool,
    alignment: u32,
    first_equal: usize,
}

fn classes<const N: usize>(addresses: &[u64; N]) -> [AddressClass; N] {
    addresses.map(|address| AddressClass {
        is_null: address == 0,
        alignment: address.trailing_zeros().min(BEST_ALIGNED_BITS),
        first_equal: addresses.iter().position(|&other| other == address).unwrap_or_default(),
    })
}

/// Other addresses of the same classes, the same ones for the same probe.
fn made_up<const N: usize>(classes: &[AddressClass; N], probe: u32) -> [u64; N] {
    classes.map(|AddressClass { is_null, alignment, first_equal }| {
        let [low, high, ..] = philox([first_equal as u32, probe, 0, 0], [0, 0]);
        let number = (u64::from(high) << 32 | u64::from(low)) >> (u64::BITS - ADDRESS_BITS);
        let aligned = number >> alignment << alignment;
        // Of less than the best alignment no more than that.
        let address = if alignment < BEST_ALIGNED_BITS { aligned | 1 << alignment } else { aligned };
        if is_null { 0 } else { address }
    })
}

/// A word that is an address of the call, or lies a fixed distance from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    word: usize,
    address: usize,
    distance: u64,
}

/// Which words are addresses, from calls at several addresses each. `None` if a word follows from them in another way.
fn places<const N: usize>(calls: &[([u64; N], &[u64])]) -> Option<Vec<Place>> {
    let (_, first) = calls.first()?;
    let differing = (0..first.len()).filter(|&word| calls.iter().any(|(_, words)| words[word] != first[word]));
    differing
        .map(|word| {
            let distances =
                |address: usize| calls.iter().map(move |(from, words)| words[word].wrapping_sub(from[address]));
            (0..N).find_map(|address| {
                let distance = distances(address).next()?;
                distances(address).all(|other| other == distance).then_some(Place { word, address, distance })
            })
        })
        .collect()
}

/// What a call queues, at whichever addresses.
struct Recording {
    work: Vec<(Work, Vec<Place>)>,
}

impl Recording {
    /// From captures that differ in their addresses alone.
    fn new<const N: usize>(captures: Vec<([u64; N], Vec<Work>)>) -> Option<Self> {
        let (_, first) = captures.first()?;
        let alike = |(_, work): &([u64; N], Vec<Work>)| {
            work.len() == first.len() && work.iter().zip(first).all(|(work, first)| work.is_like(first))
        };
        if !captures.iter().all(alike) {
            return None;
        }
        let places_of = |index: usize| {
            let calls: Vec<_> = captures.iter().map(|(from, work)| (*from, work[index].words.as_slice())).collect();
            places(&calls)
        };
        let all = (0..first.len()).map(places_of).collect::<Option<Vec<_>>>()?;
        let (_, work) = captures.into_iter().next()?;
        Some(Recording { work: work.into_iter().zip(all).collect() })
    }

    /// # Safety
    /// As for the call, at these addresses.
    unsafe fn queue<const N: usize>(&mut self, addresses: &[u64; N], stream: &CudaStream) -> Result<()> {
        for (work, places) in &mut self.work {
            for place in places {
                work.words[place.word] = addresses[place.address].wrapping_add(place.distance);
            }
            // SAFETY: these are the words of the call at these addresses; the caller vouches for the memory.
            unsafe { work.queue(stream) }?;
        }
        Ok(())
    }
}

/// What is known of the calls of one form.
enum Known {
    /// When it came first.
    Since(u64),
    Recorded(Recording),
    /// It is more than is understood here.
    Unrecorded,
}

/// Calls of the library with up to `N` addresses, and what is recorded of them by form: all that decides a call but its
/// addresses.
pub(super) struct Replays<F, const N: usize> {
    known: HashMap<(F, [AddressClass; N]), Known>,
    /// Gone where the library does not let itself be recorded.
    recorder: Option<Recorder>,
    calls: u64,
    replayed: u64,
}

impl<F: Eq + Hash + Clone + Debug, const N: usize> Replays<F, N> {
    /// For `stream`.
    pub fn new(stream: &CudaStream) -> Result<Self> {
        Ok(Replays { known: HashMap::new(), recorder: Some(Recorder::new(stream)?), calls: 0, replayed: 0 })
    }

    /// Queues a call at `addresses` on `stream`, by `anew` or as it was recorded.
    ///
    /// # Safety
    /// What calls of one form queue depends on nothing else but their addresses, and may be queued now. `anew` reads no memory
    /// at the addresses itself.
    pub unsafe fn queue(
        &mut self,
        form: &F,
        addresses: [u64; N],
        stream: &CudaStream,
        mut anew: impl FnMut([u64; N], &CudaStream) -> Result<()>,
    ) -> Result<()> {
        let Some(recorder) = &self.recorder else { return anew(addresses, stream) };
        let classes = classes(&addresses);
        self.calls += 1;
        if self.known.len() >= MOST_FORMS {
            // What came for a while and is gone first.
            self.known.retain(|_, known| matches!(known, Known::Recorded(_)));
            if self.known.len() >= MOST_FORMS {
                self.known.clear();
            }
        }
        let known = self.known.entry((form.clone(), classes)).or_insert(Known::Since(self.calls));
        match known {
            Known::Recorded(recording) => {
                self.replayed += 1;
                // SAFETY: by this function's contract.
                return unsafe { recording.queue(&addresses, stream) };
            }
            Known::Unrecorded => return anew(addresses, stream),
            Known::Since(first) if self.calls - *first < APART => return anew(addresses, stream),
            Known::Since(_) => {}
        }
        match recorder.record(|stream| anew(addresses, stream)) {
            Ok(own) => {
                let probes = (0..PROBES).map(|probe| made_up(&classes, probe)).map(|at| {
                    // The library may refuse an address that is nobody's: then it keeps calls of this form.
                    let work = recorder.record(|stream| anew(at, stream)).ok().flatten();
                    work.map(|work| (at, work))
                });
                let captures: Option<Vec<_>> = [own.map(|work| (addresses, work))].into_iter().chain(probes).collect();
                *known = captures.and_then(Recording::new).map_or(Known::Unrecorded, Known::Recorded);
                if matches!(known, Known::Unrecorded) {
                    tracing::debug!(?form, ?classes, "stays with the library");
                }
            }
            Err(error) => {
                tracing::warn!("matrix products are not recorded, so queuing a step takes longer: {error}");
                self.recorder = None;
                self.known.clear();
            }
        }
        anew(addresses, stream)
    }

    /// How often a recorded call was queued without the library.
    pub fn replayed(&self) -> u64 {
        self.replayed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_up_addresses_are_of_the_classes_of_the_real_ones_and_nothing_else_of_them() {
        let real = [0x7f00_0000_1000, 0, 0x7f00_0000_0010, 0x7f00_0000_1000, 0x7f00_0000_0002, 0x7fff_0000_0100];
        let real_classes = classes(&real);
        let mut seen = Vec::from(real);
        for probe in 0..PROBES {
            let others = made_up(&real_classes, probe);
            assert_eq!(classes(&others), real_classes, "{others:x?}");
            assert!(others[0] == others[3] && others[1] == 0);
            for other in [others[0], others[2], others[4], others[5]] {
                assert!(!seen.contains(&other) && other >> ADDRESS_BITS == 0, "{other:x}");
                seen.push(other);
            }
        }
        // All of their bits are tried both ways, so that what follows from any of them shows.
        let drawn = (0..PROBES).map(|probe| made_up(&real_classes, probe)[0]);
        let (or, and) = drawn.fold((0, u64::MAX), |(or, and), x| (or | x, and & x));
        assert!((or & !and).count_ones() > 20, "{or:x} {and:x}");
    }

    #[test]
    fn words_are_addresses_constants_or_not_understood() {
        let at = |a: u64, b: u64| [a, b, 0];
        let (first, second, third) = (at(0x100, 0x900), at(0x300, 0x700), at(0x500, 0x200));
        let words = |from: [u64; 3]| [7, from[1], from[0], 0x100, from[1]];
        let calls: Vec<_> = [first, second, third].map(|from| (from, words(from))).into();
        let found = |calls: &[([u64; 3], [u64; 5])]| {
            places(&calls.iter().map(|(from, words)| (*from, words.as_slice())).collect::<Vec<_>>())
        };
        let place = |word, address| Place { word, address, distance: 0 };
        assert_eq!(found(&calls), Some(vec![place(1, 1), place(2, 0), place(4, 1)]));
        // Two of the words lie behind an address.
        let mut behind = calls.clone();
        for (_, words) in &mut behind {
            words[1] += 64;
            words[2] -= 8;
        }
        let place = |word, address, distance| Place { word, address, distance };
        assert_eq!(found(&behind), Some(vec![place(1, 1, 64), place(2, 0, 8u64.wrapping_neg()), place(4, 1, 0)]));
        // Something that follows from an address without being it, in one of the calls at least.
        for (call, word, value) in [(0, 2, 0x108), (1, 0, 8), (2, 4, 0x201), (2, 3, 0)] {
            let mut odd = calls.clone();
            odd[call].1[word] = value;
            assert_eq!(found(&odd), None, "word {word} of call {call}");
        }
    }
}
