//! Values that another thread works out while the model's goes on.

use std::panic::{AssertUnwindSafe, catch_unwind};

use flume::Receiver;

/// A value that is asked for later.
pub(crate) struct Later<T>(Receiver<T>);

impl<T: Send + 'static> Later<T> {
    /// Works out `value` on a thread of rayon's pool.
    pub fn new(value: impl FnOnce() -> T + Send + 'static) -> Self {
        let (sender, receiver) = flume::bounded(1);
        rayon::spawn(move || {
            // A panic ends the process in rayon's pool; caught, it fails the step of who waits, with its message printed.
            if let Ok(value) = catch_unwind(AssertUnwindSafe(value)) {
                // Nobody asks for it any more where the step has failed.
                let _ = sender.send(value);
            }
        });
        Later(receiver)
    }

    /// The value, waiting for it if need be; `None` where working it out panicked.
    pub fn get(self) -> Option<T> {
        self.0.recv().ok()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_value_is_worked_out_before_anybody_asks_and_waited_for_where_it_is_not() {
        let (began, has_begun) = mpsc::channel();
        let (release, released) = mpsc::channel();
        let later = Later::new(move || {
            began.send(()).unwrap();
            released.recv().unwrap()
        });
        has_begun.recv().unwrap();
        release.send(7).unwrap();
        assert_eq!(later.get(), Some(7));
    }

    #[test]
    fn a_panic_is_no_value() {
        assert_eq!(Later::<u32>::new(|| panic!("on purpose")).get(), None);
    }
}
