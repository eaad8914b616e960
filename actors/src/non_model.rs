//! What of the device's memory is not chunks, moment by moment of a step.

use std::sync::{Mutex, PoisonError};

use crate::runtime::Runtime;
use crate::types::{Bytes, Moment};

/// Non-model memory per moment, highest over all steps seen.
#[derive(Default)]
pub(crate) struct NonModel {
    peaks: Mutex<Vec<u64>>,
}

impl NonModel {
    /// Notes a peak that belongs to the accesses before `moment`'s end.
    pub fn note(&self, moment: Moment, peak: Bytes) {
        let mut peaks = self.peaks.lock().unwrap_or_else(PoisonError::into_inner);
        let index = moment.0 as usize;
        if peaks.len() <= index {
            peaks.resize(index + 1, 0);
        }
        peaks[index] = peaks[index].max(peak.0);
    }

    /// Notes that every moment may need so much more than was seen.
    fn expect(&self, more: Bytes) {
        let mut peaks = self.peaks.lock().unwrap_or_else(PoisonError::into_inner);
        peaks.iter_mut().for_each(|peak| *peak += more.0);
    }

    pub fn snapshot(&self) -> Vec<u64> {
        self.peaks.lock().unwrap_or_else(PoisonError::into_inner).clone()
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

    /// From now on any moment may need so much more than was measured: budgets that follow leave room for it before it is used.
    pub fn expect_non_model(&self, more: Bytes) {
        self.non_model.expect(more);
    }
}
