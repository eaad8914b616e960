//! What of the device's memory is not chunks, moment by moment of a step.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::runtime::Runtime;
use crate::types::{Bytes, Moment};

/// Non-model memory per moment, highest over all steps seen.
#[derive(Default)]
pub(crate) struct NonModel {
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    peaks: Vec<u64>,
    /// More than was seen in any moment may be needed.
    expected: u64,
    /// Ends of steps after which that will have been seen.
    steps_left: u32,
}

impl NonModel {
    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a peak that belongs to the accesses before `moment`'s end.
    pub fn note(&self, moment: Moment, peak: Bytes) {
        let peaks = &mut self.lock().peaks;
        let index = moment.0 as usize;
        if peaks.len() <= index {
            peaks.resize(index + 1, 0);
        }
        peaks[index] = peaks[index].max(peak.0);
    }

    /// Expects so much more, from the end of this step to that of the next.
    fn expect(&self, more: Bytes) {
        let mut seen = self.lock();
        (seen.expected, seen.steps_left) = (more.0, 2);
    }

    /// A step is over.
    pub fn step_over(&self) {
        let mut seen = self.lock();
        seen.steps_left = seen.steps_left.saturating_sub(1);
        if seen.steps_left == 0 {
            seen.expected = 0;
        }
    }

    /// What was seen.
    pub fn snapshot(&self) -> Vec<u64> {
        self.lock().peaks.clone()
    }

    /// What must be there.
    pub fn needed(&self) -> Vec<u64> {
        let seen = self.lock();
        seen.peaks.iter().map(|peak| peak + seen.expected).collect()
    }

    pub fn peak(&self) -> Bytes {
        Bytes(self.snapshot().into_iter().max().unwrap_or(0))
    }
}

impl Runtime {
    /// Non-model memory in use now.
    pub fn non_model_live(&self) -> Bytes {
        self.probe.live()
    }

    /// Non-model memory per moment, measured so far.
    pub fn non_model_by_moment(&self) -> Vec<u64> {
        self.non_model.snapshot()
    }

    /// In the next step any moment may need so much more than was measured so far: budgets leave room for it before it is used.
    /// Told within a step.
    pub fn expect_non_model(&self, more: Bytes) {
        self.non_model.expect(more);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_expected_is_needed_until_a_step_has_shown_it() {
        let non_model = NonModel::default();
        non_model.note(Moment(1), Bytes(5));
        non_model.expect(Bytes(10));
        non_model.note(Moment(2), Bytes(1));
        non_model.step_over();
        assert_eq!((non_model.snapshot(), non_model.needed()), (vec![0, 5, 1], vec![10, 15, 11]));
        non_model.note(Moment(1), Bytes(12));
        non_model.step_over();
        assert_eq!(non_model.needed(), [0, 12, 1]);
        assert_eq!(non_model.peak(), Bytes(12));
    }
}
