//! How long chunks stay on the device, how long they lie idle before they are driven out, and how soon they are used again.
//! A policy that is too eager shows as short stays and short gaps, one that is too lazy as long idle times.

use std::time::{Duration, Instant};

/// Samples of one kind that are kept until somebody takes them; further ones are not: a spread needs no more.
const KEPT: usize = 4096;

/// Samples since they were last taken.
#[derive(Clone, Debug, Default)]
pub struct Ages {
    /// From a chunk's arrival on the device to its leaving.
    pub residency: Vec<Duration>,
    /// From a chunk's last use to its eviction; from its arrival where it was not used.
    pub idle: Vec<Duration>,
    /// From one use of a chunk on the device to the next, without it leaving in between.
    pub reuse: Vec<Duration>,
}

/// Of one chunk on the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stay {
    arrived: Instant,
    used: Option<Instant>,
}

fn push(samples: &mut Vec<Duration>, sample: Duration) {
    if samples.len() < KEPT {
        samples.push(sample);
    }
}

impl Stay {
    pub fn begin() -> Self {
        Stay { arrived: Instant::now(), used: None }
    }

    /// A use begins.
    pub fn used(&mut self, ages: &mut Ages) {
        let now = Instant::now();
        if let Some(before) = self.used.replace(now) {
            push(&mut ages.reuse, now - before);
        }
    }

    /// The chunk leaves; `evicted`: for another one.
    pub fn end(self, evicted: bool, ages: &mut Ages) {
        let now = Instant::now();
        push(&mut ages.residency, now - self.arrived);
        if evicted {
            push(&mut ages.idle, now - self.used.unwrap_or(self.arrived));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stay_has_one_residency_and_a_gap_between_uses() {
        let mut ages = Ages::default();
        let mut stay = Stay::begin();
        stay.used(&mut ages);
        assert!(ages.reuse.is_empty(), "there was no use before");
        std::thread::sleep(Duration::from_millis(2));
        stay.used(&mut ages);
        std::thread::sleep(Duration::from_millis(2));
        stay.end(true, &mut ages);
        let [gap, idle, whole] = [ages.reuse[0], ages.idle[0], ages.residency[0]];
        assert!(gap >= Duration::from_millis(2) && idle >= Duration::from_millis(2), "{gap:?} {idle:?}");
        assert!(whole >= gap.max(idle), "{whole:?}");
        // A chunk whose contents were used up did not make room for anybody.
        Stay::begin().end(false, &mut ages);
        assert_eq!((ages.residency.len(), ages.idle.len()), (2, 1));
    }

    #[test]
    fn samples_that_nobody_takes_do_not_pile_up() {
        let mut ages = Ages::default();
        for _ in 0..2 * KEPT {
            Stay::begin().end(true, &mut ages);
        }
        assert_eq!((ages.residency.len(), ages.idle.len()), (KEPT, KEPT));
    }
}
