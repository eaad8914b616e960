//! How much of a device's memory is ours while others take and leave theirs. Pure.

use std::time::Duration;

use crate::types::Bytes;

/// Kept free for others to begin with, where the device had it free: who needs more takes it piece by piece.
const MOST_SPARE: u64 = 1 << 30;
/// Changes below this are noise: contexts and modules of the driver.
const NOISE: u64 = 128 << 20;
/// What is left free by others for so long is taken.
const GROW_AFTER: Duration = Duration::from_secs(3);

/// Follows what neighbours leave: gives at once, takes back when they have left it for a while.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Share {
    /// Known from the first look on.
    spare: Option<u64>,
    /// Since when more has been free, and the least that was.
    growing: Option<(Duration, u64)>,
}

impl Share {
    /// What we may have at `now`, who have `given` of the `asked`: `reachable` is that and what is free, and without
    /// `least` the work cannot go on.
    pub fn follow(&mut self, asked: Bytes, given: Bytes, least: Bytes, reachable: Bytes, now: Duration) -> Bytes {
        let spare = *self.spare.get_or_insert(reachable.0.saturating_sub(asked.0).min(MOST_SPARE));
        let left = reachable.0.saturating_sub(spare).clamp(least.0.min(asked.0), asked.0);
        let given = given.0.min(asked.0);
        if left <= given {
            self.growing = None;
            return Bytes(if given - left >= NOISE.min(spare / 2) { left } else { given });
        }
        let (since, lowest) = self.growing.unwrap_or((now, left));
        let lowest = lowest.min(left);
        self.growing = Some((since, lowest));
        let enough = lowest == asked.0 || lowest - given.min(lowest) >= NOISE;
        if now.saturating_sub(since) < GROW_AFTER || !enough {
            return Bytes(given);
        }
        self.growing = None;
        Bytes(lowest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn what_a_neighbour_takes_is_given_and_what_it_leaves_is_taken_after_a_while() {
        let mut share = Share::default();
        let mut given = Bytes(60 * GIB);
        let mut look = |reachable: u64, second: u64| {
            given =
                share.follow(Bytes(60 * GIB), given, Bytes(10 * GIB), Bytes(reachable), Duration::from_secs(second));
            given.0
        };
        assert_eq!(look(61 * GIB, 0), 60 * GIB);
        // A context is no neighbour yet; a gigabyte is.
        assert_eq!(look(61 * GIB - (50 << 20), 1), 60 * GIB);
        assert_eq!(look(60 * GIB, 2), 59 * GIB);
        assert_eq!(look(31 * GIB, 3), 30 * GIB);
        // Below what the work needs nothing is given.
        assert_eq!(look(4 * GIB, 4), 10 * GIB);
        // It leaves, and comes back for a moment.
        assert_eq!(look(61 * GIB, 5), 10 * GIB);
        assert_eq!(look(9 * GIB, 6), 10 * GIB);
        assert_eq!(look(61 * GIB, 7), 10 * GIB);
        assert_eq!(look(41 * GIB, 9), 10 * GIB);
        assert_eq!(look(61 * GIB, 10), 40 * GIB);
        assert_eq!(look(61 * GIB, 11), 40 * GIB);
        assert_eq!(look(61 * GIB, 14), 60 * GIB);
    }

    #[test]
    fn where_nothing_was_free_only_what_is_taken_from_us_counts() {
        let mut share = Share::default();
        let asked = Bytes(60 * GIB);
        let mut look = |reachable| share.follow(asked, asked, Bytes(0), Bytes(reachable), Duration::ZERO).0;
        assert_eq!(look(60 * GIB), 60 * GIB);
        assert_eq!(look(60 * GIB - 4096), 60 * GIB - 4096);
    }
}
