//! How long the device had nothing to do between two blocks, and why.
//!
//! A model that is queued ahead of the device hides short waits of the compute thread. So a gap is measured on the device,
//! from the end of what was queued before to the beginning of the next block, and shared out over what the thread waited
//! for in between. Where the model computes before it returns, its thread's waits are the device's.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::error::RuntimeError;
use crate::memory::Event;
use crate::stats::StallCause;

/// Time by [`StallCause`].
pub(crate) type Waits = [Duration; StallCause::ALL.len()];

/// Gaps between blocks.
#[derive(Default)]
pub(crate) struct IdleTime {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// End of the block that was queued last.
    end: Option<Event>,
    /// What the compute thread has waited for since.
    waits: Waits,
    /// Gaps that the device may not have passed yet: the end before, the beginning after.
    open: VecDeque<(Event, Event, Waits)>,
    /// Measured and not taken.
    idle: Waits,
}

impl IdleTime {
    fn with<R>(&self, work: impl FnOnce(&mut State) -> R) -> R {
        work(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The compute thread waited.
    pub fn waited(&self, cause: StallCause, time: Duration) {
        self.with(|state| state.waits[cause as usize] += time);
    }

    /// A block begins after what is queued so far; `None` where nothing is ever queued.
    pub fn begin(&self, start: Option<Event>) {
        self.with(|state| {
            let waits = std::mem::take(&mut state.waits);
            match (state.end.take(), start) {
                (Some(end), Some(start)) => state.open.push_back((end, start, waits)),
                _ => add(&mut state.idle, &waits),
            }
        });
    }

    /// What was queued for a block ends here.
    pub fn end(&self, end: &Event) {
        self.with(|state| state.end = Some(Event::clone(end)));
    }

    /// What has been measured since the last call.
    pub fn take(&self) -> Result<Waits, RuntimeError> {
        self.with(|state| {
            while let Some((end, start, waits)) = state.open.front() {
                if !start.is_complete()? {
                    break;
                }
                let gap = start.elapsed_since(end)?.unwrap_or_else(|| waits.iter().sum());
                add(&mut state.idle, &share(gap, waits));
                state.open.pop_front();
            }
            if state.end.is_none() && state.open.is_empty() {
                let waits = std::mem::take(&mut state.waits);
                add(&mut state.idle, &waits);
            }
            Ok(std::mem::take(&mut state.idle))
        })
    }
}

fn add(sum: &mut Waits, more: &Waits) {
    sum.iter_mut().zip(more).for_each(|(sum, more)| *sum += *more);
}

/// A gap by cause: in proportion to the waits, if they were longer; else what they leave is the compute thread's own.
fn share(gap: Duration, waits: &Waits) -> Waits {
    let waited: Duration = waits.iter().sum();
    if waited <= gap {
        let mut shared = *waits;
        shared[StallCause::Queue as usize] += gap - waited;
        return shared;
    }
    let part = gap.as_secs_f64() / waited.as_secs_f64();
    waits.map(|wait| wait.mul_f64(part))
}

#[cfg(test)]
mod tests {
    use std::any::Any;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::memory::{DeviceEvent, MemoryError};

    struct At(Duration, AtomicBool);

    impl DeviceEvent for At {
        fn is_complete(&self) -> Result<bool, MemoryError> {
            Ok(self.1.load(Ordering::Relaxed))
        }

        fn synchronize(&self) -> Result<(), MemoryError> {
            Ok(())
        }

        fn elapsed_since(&self, earlier: &Event) -> Result<Option<Duration>, MemoryError> {
            let earlier: &dyn Any = earlier.as_ref();
            Ok(earlier.downcast_ref::<At>().map(|earlier| self.0 - earlier.0))
        }
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn at(time: u64, passed: bool) -> Arc<At> {
        Arc::new(At(ms(time), AtomicBool::new(passed)))
    }

    #[test]
    fn a_gap_is_shared_by_what_was_waited_for() {
        let idle = IdleTime::default();
        idle.begin(Some(at(0, true)));
        let end: Event = at(10, true);
        idle.end(&end);
        // Waits that the queue hid: 40 ms of waiting, 10 ms without work.
        idle.waited(StallCause::Copy, ms(30));
        idle.waited(StallCause::Optimizer, ms(10));
        idle.begin(Some(at(20, true)));
        let waits = idle.take().unwrap();
        assert_eq!(waits[StallCause::Copy as usize], ms(10).mul_f64(0.75));
        assert_eq!(waits.iter().sum::<Duration>(), ms(10));
        // A gap longer than the waits is the thread's.
        let end: Event = at(30, true);
        idle.end(&end);
        idle.waited(StallCause::Slot, ms(1));
        let start = at(35, false);
        idle.begin(Some(start.clone()));
        assert_eq!(idle.take().unwrap(), Waits::default(), "the device has not passed the gap");
        start.1.store(true, Ordering::Relaxed);
        let waits = idle.take().unwrap();
        assert_eq!((waits[StallCause::Slot as usize], waits[StallCause::Queue as usize]), (ms(1), ms(4)));
        assert_eq!(idle.take().unwrap(), Waits::default());
    }

    #[test]
    fn where_nothing_is_queued_waits_count_as_they_are() {
        let idle = IdleTime::default();
        idle.waited(StallCause::Copy, ms(3));
        idle.begin(None);
        idle.waited(StallCause::Reduction, ms(2));
        let waits = idle.take().unwrap();
        assert_eq!((waits[StallCause::Copy as usize], waits[StallCause::Reduction as usize]), (ms(3), ms(2)));
    }
}
