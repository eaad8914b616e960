//! Updates that are due, one queue a side. Not first come, first served: the groups that the next forward pass needs first
//! go first, so that what a slow side has left over at the end of a step is what is needed last.
//!
//! A queue outlives its actor: an update stays in it until it is applied, and messages are only rings.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::reduction::StepGroup;
use crate::types::{GroupId, Tier};

/// There is something in the queue.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UpdateDue;

/// The queues.
#[derive(Default)]
pub(crate) struct Updates {
    due: [Mutex<BTreeMap<GroupId, StepGroup>>; 2],
}

impl Updates {
    fn queue(&self, tier: Tier) -> MutexGuard<'_, BTreeMap<GroupId, StepGroup>> {
        let side = usize::from(tier != Tier::Device);
        self.due[side].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters an update; a second time changes nothing.
    pub fn enter(&self, tier: Tier, update: StepGroup) {
        self.queue(tier).insert(update.group, update);
    }

    /// What is due, in order.
    pub fn due(&self, tier: Tier) -> Vec<StepGroup> {
        self.queue(tier).values().copied().collect()
    }

    /// An update is applied. The next one of the group may be there already.
    pub fn done(&self, tier: Tier, update: StepGroup) {
        let mut queue = self.queue(tier);
        if queue.get(&update.group).is_some_and(|due| due.step == update.step) {
            queue.remove(&update.group);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Step;

    fn update(group: u32) -> StepGroup {
        of_step(1, group)
    }

    fn of_step(step: u64, group: u32) -> StepGroup {
        StepGroup { step: Step(step), group: GroupId(group), scalars: None }
    }

    #[test]
    fn an_update_is_due_once_in_order_until_it_is_done() {
        let updates = Updates::default();
        for group in [7, 5, 2, 5] {
            updates.enter(Tier::Host, update(group));
        }
        updates.enter(Tier::Device, update(1));
        let due = |tier| updates.due(tier).iter().map(|update| update.group.0).collect::<Vec<u32>>();
        assert_eq!(due(Tier::Host), [2, 5, 7]);
        updates.done(Tier::Host, update(5));
        assert_eq!(due(Tier::Host), [2, 7]);
        assert_eq!(due(Tier::Device), [1]);
        // A fast model hands over the next update before the last one is crossed off.
        updates.enter(Tier::Host, of_step(2, 7));
        updates.done(Tier::Host, update(7));
        assert_eq!(due(Tier::Host), [2, 7]);
    }
}
