//! Policies that changed after jobs were created. A job that waits, or whose worker has to be started again, gets those that
//! it has missed. They live as long as this process: a new one reads the configuration's file, and jobs begin with their own.

use crate::service::store::Seq;
use crate::service::worker::protocol::Policies;

/// Changes in order, each with the newest job that it concerns.
#[derive(Default)]
pub(super) struct Retuned(Vec<(Seq, Policies)>);

impl Retuned {
    pub fn add(&mut self, policies: Policies, newest: Seq) {
        match self.0.last_mut() {
            // No job came between the two.
            Some((last, before)) if *last == newest => *before = std::mem::take(before).then(&policies),
            _ => self.0.push((newest, policies)),
        }
    }

    /// What a job has missed, if anything.
    pub fn since(&self, job: Seq) -> Option<Policies> {
        let missed = self.0.iter().filter(|(newest, _)| *newest >= job);
        missed.map(|(_, policies)| policies.clone()).reduce(|first, later| first.then(&later))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Policy;

    #[test]
    fn a_job_gets_what_changed_after_it_was_created() {
        let mut retuned = Retuned::default();
        let prefetch = |moments| Policies { prefetch: Some(moments), ..Policies::default() };
        let lru = Policies { policy: Some(Policy::Lru), ..Policies::default() };
        retuned.add(prefetch(1), Seq(3));
        retuned.add(lru.clone(), Seq(3));
        retuned.add(prefetch(2), Seq(5));
        assert_eq!(retuned.since(Seq(2)), Some(prefetch(2).then(&lru)));
        assert_eq!(retuned.since(Seq(4)), Some(prefetch(2)));
        assert_eq!(retuned.since(Seq(6)), None);
        assert_eq!(retuned.0.len(), 2);
    }
}
