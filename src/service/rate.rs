//! How many requests one client may send.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};

/// Requests after which clients that have been quiet are forgotten.
const SWEEP: u32 = 4096;

/// Whose requests are counted together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Client {
    /// The bearer of the token of this number.
    Token(usize),
    /// Somebody without a token that is known.
    Address(IpAddr),
}

/// The limit of all clients, each on its own.
#[derive(Default)]
pub(super) struct RateLimit {
    /// `None` is no limit.
    limiter: RwLock<Option<DefaultKeyedRateLimiter<Client>>>,
    counted: AtomicU32,
}

impl RateLimit {
    /// Begins anew with so many requests a second, a second's worth of them at once; 0 is no limit.
    pub fn set(&self, per_second: u32) {
        let limiter = NonZeroU32::new(per_second).map(|rate| RateLimiter::keyed(Quota::per_second(rate)));
        *self.limiter.write().unwrap_or_else(PoisonError::into_inner) = limiter;
    }

    /// Counts a request; where it is one too many, says after what time the next may come.
    pub fn check(&self, client: Client) -> Result<(), Duration> {
        let limiter = self.limiter.read().unwrap_or_else(PoisonError::into_inner);
        let Some(limiter) = &*limiter else { return Ok(()) };
        if self.counted.fetch_add(1, Ordering::Relaxed) % SWEEP == SWEEP - 1 {
            limiter.retain_recent();
        }
        limiter.check_key(&client).map_err(|too_early| too_early.wait_time_from(DefaultClock::default().now()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_client_has_its_own_limit_which_may_change() {
        let rate = RateLimit::default();
        let client = Client::Token(1);
        let passed = |client: Client| (0..50).filter(|_| rate.check(client).is_ok()).count();
        assert_eq!(passed(client), 50);
        rate.set(2);
        // The test may take long enough for one more.
        assert!((2..=3).contains(&passed(client)));
        assert!(rate.check(client).unwrap_err() <= Duration::from_secs(1));
        assert!((2..=3).contains(&passed(Client::Address([127, 0, 0, 1].into()))));
        rate.set(0);
        assert_eq!(passed(client), 50);
    }
}
