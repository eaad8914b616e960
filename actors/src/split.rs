//! The split of groups between sides while training: chosen from what the parts of a step were measured to cost, and again
//! when the device's budget changes. The bits do not depend on it.

use std::time::Duration;

use crate::error::RuntimeError;
use crate::placement::{Side, Split, SplitCosts, SplitRoom, spread_sides};
use crate::stats::{Direction, Stats};

/// Every group has a side.
pub(crate) fn check_sides(sides: &[Side], groups: usize) -> Result<(), RuntimeError> {
    let given = sides.len();
    if given == groups {
        return Ok(());
    }
    Err(RuntimeError::Misuse(format!("sides are given for {given} groups of {groups}")))
}

/// Steps after which the split is chosen anew: the first is the warm-up, and its successor still works it off.
const CHOSEN_AFTER: u64 = 3;
/// Steps that a new split is tried for, of which the first ones move groups and work off what the old one left.
const TRIED_FOR: u64 = 3;
/// A split is only left for one predicted to be faster by this part: moving groups costs a step.
const WORTH_IT: f64 = 0.03;

/// Chooses sides.
#[derive(Clone, Debug)]
pub(crate) struct Splitter {
    room: SplitRoom,
    costs: SplitCosts,
    split: Split,
    steps: u64,
    /// Parameters of a group, on average.
    parameters: f64,
    /// The last step, which others of the same split follow.
    latest: Duration,
    since_change: u64,
    /// A split that was left for one predicted to be faster, and its last step.
    trial: Option<(Split, Duration)>,
}

impl Splitter {
    pub fn new(room: SplitRoom, costs: SplitCosts, sides: &[Side], parameters: u64) -> Self {
        let count = |side: Side| sides.iter().filter(|&&other| other == side).count() as u32;
        let split = Split { resident: count(Side::Resident), streamed: count(Side::Streamed) };
        Splitter {
            room,
            costs,
            split,
            steps: 0,
            parameters: parameters as f64 / f64::from(room.groups.max(1)),
            latest: Duration::ZERO,
            since_change: 0,
            trial: None,
        }
    }

    /// Takes note of a step, and returns new sides if others are better by now. `slots` is what the budget allows in the
    /// moment that leaves least to chunks.
    pub fn after(&mut self, stats: &Stats, elapsed: Duration, slots: u32) -> Option<Vec<Side>> {
        self.steps += 1;
        self.since_change += 1;
        if self.since_change > 1 {
            self.measure(stats, elapsed);
        }
        self.latest = elapsed;
        let budget_changed = slots != self.room.slots;
        // A budget is first known after the warm-up step; a smaller one leaves no choice.
        self.room.slots = slots;
        if self.split.resident > self.room.most_resident() {
            self.trial = None;
            return self.change_to(self.room.split(&self.costs));
        }
        if self.steps == CHOSEN_AFTER || budget_changed && self.steps > CHOSEN_AFTER {
            let best = self.room.split(&self.costs);
            if self.step(best) < self.step(self.split).mul_f64(1.0 - WORTH_IT) {
                // Under another budget the split before may not fit any more.
                self.trial = (!budget_changed).then_some((self.split, self.latest));
                return self.change_to(best);
            }
        }
        // The prediction does not know everything that copies and updates hold each other up with.
        if self.since_change == TRIED_FOR
            && let Some((before, latest)) = self.trial.take()
            && latest < self.latest
        {
            return self.change_to(before);
        }
        None
    }

    fn change_to(&mut self, split: Split) -> Option<Vec<Side>> {
        if split == self.split {
            return None;
        }
        tracing::info!(?split, before = ?self.split, costs = ?self.costs, latest = ?self.latest, "groups change sides");
        self.split = split;
        self.since_change = 0;
        Some(spread_sides(self.room.groups, self.room.looked_up, split.resident, split.streamed))
    }

    fn step(&self, split: Split) -> Duration {
        self.room.step(&self.costs, split)
    }

    fn measure(&mut self, stats: &Stats, elapsed: Duration) {
        // The first measurement takes the place of an estimate.
        let first = self.steps == 2;
        let average = |old: Duration, new: Duration| if first { new } else { (old + new) / 2 };
        self.costs.compute = average(self.costs.compute, elapsed.saturating_sub(stats.stall()));
        let copy = |direction: Direction| {
            let moves = stats.moves[direction as usize] as u32;
            (moves > 0).then(|| stats.busy[direction as usize] / moves)
        };
        if let Some(each) = copy(Direction::HostToDevice) {
            self.costs.to_device = average(self.costs.to_device, each);
        }
        if let Some(each) = copy(Direction::DeviceToHost) {
            self.costs.to_host = average(self.costs.to_host, each);
        }
        if stats.stepped_on_host > 0 {
            // Copies that took the host's memory meanwhile would have been part of an update.
            let copies =
                (stats.moves[Direction::HostToDevice as usize] + stats.moves[Direction::DeviceToHost as usize]) as f64;
            let meanwhile = (stats.stepping_on_host.as_secs_f64() / elapsed.as_secs_f64().max(1e-9)).min(1.0);
            let groups = stats.stepped_on_host as f64 / self.parameters;
            let updates = self.costs.updates(groups, &self.room.work(self.split), copies * meanwhile);
            self.costs.host_step = average(self.costs.host_step, stats.stepping_on_host.div_f64(updates));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_host_hands_groups_to_the_device_and_a_small_budget_takes_residents() {
        let room = SplitRoom::EXAMPLE;
        let ms = Duration::from_millis;
        let costs = SplitCosts {
            compute: ms(1000),
            forward_share: 0.25,
            host_step: ms(10),
            memory_share: 0.25,
            to_device: ms(5),
            to_host: ms(5),
        };
        let split = room.split(&costs);
        assert_eq!(split.streamed, 0);
        let sides = spread_sides(32, 0, split.resident, split.streamed);
        let slow_host = |stepped: u64| {
            let mut stats = Stats { stepped_on_host: stepped * 1000, ..Stats::default() };
            stats.stepping_on_host = ms(stepped * 80);
            stats.moves[Direction::HostToDevice as usize] = 48;
            stats.busy[Direction::HostToDevice as usize] = ms(48 * 5);
            stats
        };
        let mut splitter = Splitter::new(room, costs, &sides, 32_000);
        let stats = slow_host(24);
        assert_eq!(splitter.after(&stats, ms(3000), 60), None);
        assert_eq!(splitter.after(&stats, ms(1000), 60), None);
        let streaming = splitter.after(&stats, ms(1050), 60).expect("the host is too slow");
        assert!(streaming.contains(&Side::Streamed));
        // It stays as long as steps are no slower.
        let mut kept = splitter.clone();
        for elapsed in [2500, 1500, 950, 2500, 2500, 2500] {
            assert_eq!(kept.after(&stats, ms(elapsed), 60), None);
        }
        // Steps turned out slower than before: the last one of the trial counts.
        let mut left = splitter.clone();
        assert_eq!(left.after(&stats, ms(9000), 60), None);
        assert_eq!(left.after(&stats, ms(1300), 60), None);
        let sides = left.after(&stats, ms(1200), 60).expect("it was faster before");
        assert!(!sides.contains(&Side::Streamed));
        assert_eq!(left.after(&stats, ms(1200), 60), None);
        // A neighbour takes most of the device.
        let sides = splitter.after(&stats, ms(1000), 12).expect("residents must leave");
        assert!(!sides.contains(&Side::Resident));
    }
}
