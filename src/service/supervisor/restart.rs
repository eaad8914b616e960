//! When a job whose worker died may try again.

use std::time::Duration;

use crate::service::settings::Limits;

/// Longest wait between two tries.
const LONGEST: Duration = Duration::from_secs(300);

/// What follows a death.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Another worker, after this long.
    After(Duration),
    /// The job fails.
    GiveUp,
}

/// `deaths` counts this one, since the last new checkpoint: a job that gets on may die any number of times.
pub(super) fn judge(deaths: u32, limits: &Limits) -> Verdict {
    if deaths > limits.restarts {
        return Verdict::GiveUp;
    }
    let doublings = deaths.saturating_sub(1).min(20);
    Verdict::After(limits.restart_delay.saturating_mul(1 << doublings).min(LONGEST))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_and_end() {
        let limits = Limits { restarts: 12, restart_delay: Duration::from_secs(1), ..Limits::default() };
        let waits: Vec<Verdict> = (1..=13).map(|deaths| judge(deaths, &limits)).collect();
        let seconds = |seconds| Verdict::After(Duration::from_secs(seconds));
        assert_eq!(waits[..4], [seconds(1), seconds(2), seconds(4), seconds(8)]);
        assert_eq!(waits[11..], [seconds(300), Verdict::GiveUp]);
    }
}
