//! Where each group is stepped and where its states live meanwhile.

use std::time::Duration;

use serde::Serialize;

use crate::types::Tier;

/// Where a group is stepped. The bits do not depend on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// On the device, where its states stay: nothing of it crosses the link.
    Resident,
    /// On the device, through which its states pass: the link carries them both ways, the host computes nothing.
    Streamed,
    /// In host memory, where its gradient is brought.
    #[default]
    Host,
}

impl Side {
    /// The tier in which the update is computed.
    pub fn tier(self) -> Tier {
        match self {
            Side::Resident | Side::Streamed => Tier::Device,
            Side::Host => Tier::Host,
        }
    }
}

/// Sides of `groups` groups: the first `resident` that are not `looked_up` in host memory live on the device, for the forward
/// pass begins with them and they are updated at once; of the others `streamed` are spread evenly, so that both sides have
/// work throughout the backward pass.
pub fn spread_sides(groups: u32, looked_up: u32, resident: u32, streamed: u32) -> Vec<Side> {
    let resident = resident.min(groups.saturating_sub(looked_up));
    let others = u64::from(groups - resident);
    let streamed = u64::from(streamed).min(others);
    (0..groups)
        .map(|group| {
            if (looked_up..looked_up + resident).contains(&group) {
                return Side::Resident;
            }
            // Whole parts of index * streamed / others grow by one where a streamed group lies.
            let before = |index: u64| index * streamed / others;
            let index = u64::from(if group < looked_up { group } else { group - resident });
            if before(index + 1) > before(index) { Side::Streamed } else { Side::Host }
        })
        .collect()
}

/// Gradients for which the tiers below have places at least.
const LEAST_GRADIENTS: u32 = 4;
/// Groups pass through the device where that is predicted to shorten a step by this part: they take slots from residents and
/// from prefetching, and their copies take nearly as much of the host's memory bandwidth as its own updates, which the
/// prediction does not count. The steps that follow show whether it was right.
const STREAMING_GAIN: f64 = 0.1;
/// Moves of a streamed group as a multiple of those that it needs: what `examples/pace` shows on a link in full use.
const STREAMING_DETOUR: f64 = 1.4;

/// Of numbers of streamed groups predicted to be as good within this part of a step, the lowest.
const AS_GOOD: f64 = 0.01;
/// How parts of a step that overlap add up: the norm of this order. The longest counts nearly alone, and one that is as long
/// holds it up by a fourteenth. Measured on an H200: a step of 0.92 s whose parts take 0.85 and 0.87 s, one of 1.05 s whose
/// parts take 1.02 and 0.94 s, and one of 2.20 s whose parts take 2.18 and 1.78 s.
const OVERLAP_ORDER: f64 = 10.0;

/// What a split has to share out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SplitWork {
    /// Groups that do not live on the device.
    pub groups: u32,
    /// Groups that do.
    pub resident: u32,
    /// Chunks of a group that stay across steps, of which one is the weight.
    pub persistent: u32,
    /// All updates wait for the last gradient, and the next forward pass for them.
    pub together: bool,
    /// Gradients of the host's updates for which some tier has a place while they wait.
    pub waiting: u32,
    /// Weights of groups that do not live on the device for which it has a place before they are used.
    pub ahead: u32,
}

/// What the parts of a step cost, as measured or estimated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SplitCosts {
    /// Forward, recompute and backward without any wait.
    pub compute: Duration,
    /// The share of `compute` before the first gradient.
    pub forward_share: f64,
    /// The update of a group by the host's cores, were nothing copied meanwhile.
    pub host_step: Duration,
    /// The part of `host_step` in which memory is what the cores wait for: 1 where all cores step.
    pub memory_share: f64,
    /// A chunk on its way to the device, while others come back.
    pub to_device: Duration,
    /// A chunk on its way back.
    pub to_host: Duration,
}

impl SplitWork {
    /// What a copied chunk is of the bytes that an update of a group moves in host memory: its states are read and written,
    /// its gradient is read.
    fn of_an_update(&self) -> f64 {
        1.0 / f64::from(2 * self.persistent + 1)
    }

    fn resident_share(&self) -> f64 {
        f64::from(self.resident) / f64::from((self.resident + self.groups).max(1))
    }
}

impl SplitCosts {
    /// Predicted time of a step in which `streamed` groups pass through the device: computing, copying and stepping in host
    /// memory overlap. Updates and copies share the host's memory: a group that passes through the device moves as many bytes
    /// there as its update by the host's cores, so that it is of use where cores are few.
    pub fn step(&self, work: &SplitWork, streamed: u32) -> Duration {
        let of = |count: u32, each: Duration| each * count;
        let on_host = work.groups.saturating_sub(streamed);
        let passing = STREAMING_DETOUR * f64::from(streamed);
        let (states_in, all_back) = (f64::from(work.persistent - 1), f64::from(work.persistent));
        // Each pass brings the weights that do not live on the device.
        let (forward, backward) =
            (self.compute.mul_f64(self.forward_share), self.compute.mul_f64(1.0 - self.forward_share));
        let weights = of(work.groups, self.to_device);
        let late_weights = of(work.groups.saturating_sub(work.ahead), self.to_device);
        // Some of what passes through comes twice: the compute thread may take its place.
        let states = self.to_device.mul_f64(passing * states_in);
        let gradients = of(on_host, self.to_host);
        let back = self.to_host.mul_f64(passing * all_back);
        let weight_passes = if work.together { 1 } else { 2 };
        let copied = f64::from(weight_passes * work.groups + on_host) + passing * (states_in + all_back);
        let host = self.host_step.mul_f64(self.updates(f64::from(on_host), work, copied));
        // What lives on the device begins a forward pass and ends a backward pass: only the others' compute hides copies.
        let resident = work.resident_share();
        let pass = |compute: Duration, copies: Duration| {
            compute.mul_f64(resident) + overlap(&[compute.mul_f64(1.0 - resident), copies])
        };
        if work.together {
            // No weight is there before its update.
            return overlap(&[pass(forward, weights), host, weights + states, back])
                + overlap(&[pass(backward, late_weights), gradients]);
        }
        // Updates run under the backward pass and under the next forward pass, which begins with what was updated last. Where
        // their gradients have no place to wait the backward pass does, and what lives on the device comes after them.
        let used_at_once = f64::from(on_host.saturating_sub(work.waiting)) / f64::from(on_host.max(1));
        let held_up =
            if used_at_once > 0.0 { host.mul_f64(used_at_once) + backward.mul_f64(resident) } else { Duration::ZERO };
        let passes = pass(forward, late_weights) + pass(backward, late_weights).max(weights + states).max(held_up);
        overlap(&[passes, host, gradients + back])
    }

    /// The updates by the host's cores that take as long as `updates` beside so many copied chunks.
    pub(crate) fn updates(&self, updates: f64, work: &SplitWork, copied: f64) -> f64 {
        updates.max(self.memory_share * (updates + work.of_an_update() * copied))
    }

    /// The number of streamed groups, up to `most`, with which a step is predicted to be shortest; the fewest
    /// of those that are about as good.
    pub fn best_streamed(&self, work: &SplitWork, most: u32) -> u32 {
        let steps = || (0..=most.min(work.groups)).map(|streamed| self.step(work, streamed));
        let enough = steps().min().unwrap_or_default().mul_f64(1.0 + AS_GOOD);
        steps().position(|step| step <= enough).unwrap_or(0) as u32
    }
}

/// How long parts take that run beside each other.
fn overlap(parts: &[Duration]) -> Duration {
    let longest = parts.iter().max().copied().unwrap_or_default();
    let share = |part: &Duration| part.as_secs_f64() / longest.as_secs_f64().max(f64::MIN_POSITIVE);
    let sum: f64 = parts.iter().map(|part| share(part).powf(OVERLAP_ORDER)).sum();
    longest.mul_f64(sum.max(1.0).powf(1.0 / OVERLAP_ORDER))
}

/// Sides of groups under a budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Split {
    /// Groups that live on the device.
    pub resident: u32,
    /// Groups that pass through it.
    pub streamed: u32,
}

/// Device chunks that a split may count on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SplitRoom {
    /// Chunks that the budget allows.
    pub slots: u32,
    /// Chunks of the largest access.
    pub working_set: u32,
    /// Groups of the model.
    pub groups: u32,
    /// Chunks of a group that stay across steps.
    pub persistent: u32,
    /// All gradients live until the last one is known.
    pub together: bool,
    /// The tiers below have no place for what a comfortable split leaves them.
    pub tight: bool,
    /// The first groups, whose rows the model looks up in host memory: they do not live on the device.
    pub looked_up: u32,
    /// Chunks for which the tiers below have a place.
    pub below: u32,
}

impl SplitRoom {
    /// Slots for one access and the one fetched beside it; where it is tight, for one access and a little of the next.
    fn passing(&self) -> u32 {
        self.working_set + if self.tight { self.working_set.div_ceil(8) } else { self.working_set }
    }

    /// Slots of one group on its way through the device while the next one comes.
    pub fn stream(&self) -> u32 {
        2 * (self.persistent + 1)
    }

    fn resident_beside(&self, reserve: u32) -> u32 {
        let most = self.groups.saturating_sub(self.looked_up);
        // Where every chunk has a slot, gradients included, nothing passes.
        if self.slots >= self.groups * (self.persistent + 1) {
            return most;
        }
        let each = self.persistent + u32::from(self.together);
        (self.slots.saturating_sub(reserve) / each.max(1)).min(most)
    }

    /// Whether everything that may live on the device does.
    pub fn holds_all(&self) -> bool {
        self.most_resident() + self.looked_up >= self.groups
    }

    /// Groups that may live on the device if all others are stepped on the host.
    pub fn most_resident(&self) -> u32 {
        self.resident_beside(self.passing())
    }

    /// As many as may live on the device while others pass through it.
    pub fn resident_beside_a_stream(&self) -> u32 {
        let all = self.most_resident();
        if self.holds_all() { all } else { self.resident_beside(self.passing() + self.stream()) }
    }

    /// Slots below the device for a chunk on its way out while another is on its way in, and for a resident group that a
    /// checkpoint reads.
    pub fn spare(&self) -> u32 {
        2 + self.persistent
    }

    /// Gradients of so many groups below whose number both sides would wait for each other. Rows that are looked up have theirs
    /// all at once.
    pub fn least_gradients(&self, away: u32) -> u32 {
        away.min(LEAST_GRADIENTS.max(self.looked_up))
    }

    /// Slots that the tiers below must have: states of what does not live on the device, and gradients. Those that wait for the
    /// last one all lie somewhere; others are used up as they come, and where there is no place for them the model waits.
    pub fn needed_below(&self, split: Split) -> u32 {
        let away = self.groups.saturating_sub(split.resident);
        let gradients = if self.together { away } else { self.least_gradients(away) };
        self.persistent * away + self.spare() + gradients
    }

    /// What there is to do. Gradients of groups that do not live on the device wait for their update below it, beside the
    /// states, and on it beside the residents and what passes. Weights that come ahead of time take the same places on it: the
    /// prediction counts on both.
    pub fn work(&self, Split { resident, streamed }: Split) -> SplitWork {
        let SplitRoom { persistent, together, .. } = *self;
        let groups = self.groups.saturating_sub(resident);
        let below = self.below.saturating_sub(persistent * groups + self.spare());
        let passing = self.working_set + if streamed > 0 { self.stream() } else { 0 };
        let ahead = self.slots.saturating_sub(persistent * resident + passing);
        SplitWork { groups, resident, persistent, together, waiting: below.saturating_add(ahead), ahead }
    }

    /// Predicted time of a step with this split.
    pub fn step(&self, costs: &SplitCosts, split: Split) -> Duration {
        costs.step(&self.work(split), split.streamed)
    }

    /// The split that `costs` favour.
    pub fn split(&self, costs: &SplitCosts) -> Split {
        let without = Split { resident: self.most_resident(), streamed: 0 };
        if self.holds_all() || self.slots < self.passing() + self.stream() {
            return without;
        }
        let resident = self.resident_beside_a_stream();
        let beside = self.work(Split { resident, streamed: 1 });
        let with = Split { resident, streamed: costs.best_streamed(&beside, beside.groups) };
        let worth_it = self.step(costs, with) < self.step(costs, without).mul_f64(1.0 - STREAMING_GAIN);
        if with.streamed > 0 && worth_it && self.needed_below(with) <= self.below { with } else { without }
    }
}

#[cfg(test)]
impl SplitRoom {
    /// Room for a quarter of the groups.
    pub const EXAMPLE: SplitRoom = SplitRoom {
        slots: 60,
        working_set: 4,
        groups: 32,
        persistent: 6,
        together: false,
        tight: false,
        looked_up: 0,
        below: u32::MAX,
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_as_many_as_asked_for_and_evenly_spread() {
        for groups in [0, 1, 7, 64] {
            for resident in [0, 1, 5, 64] {
                for streamed in [0, 1, 3, 40, 100] {
                    let sides = spread_sides(groups, 0, resident, streamed);
                    let count = |side: Side| sides.iter().filter(|&&other| other == side).count() as u32;
                    assert_eq!(sides.len() as u32, groups);
                    assert_eq!(count(Side::Resident), resident.min(groups));
                    assert_eq!(count(Side::Streamed), streamed.min(groups - resident.min(groups)));
                    assert!(sides.iter().take(resident as usize).all(|&side| side == Side::Resident));
                    // No stretch of the others has more than its share, rounded up.
                    let others = &sides[(resident.min(groups)) as usize..];
                    let share = f64::from(count(Side::Streamed)) / others.len().max(1) as f64;
                    for window in others.windows(8) {
                        let here = window.iter().filter(|&&side| side == Side::Streamed).count() as f64;
                        assert!((here - 8.0 * share).abs() <= 1.0, "{sides:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn groups_that_are_looked_up_do_not_live_on_the_device() {
        use Side::{Host, Resident, Streamed};
        assert_eq!(spread_sides(5, 2, 2, 0), [Host, Host, Resident, Resident, Host]);
        assert_eq!(spread_sides(5, 2, 9, 0), [Host, Host, Resident, Resident, Resident]);
        assert_eq!(spread_sides(5, 2, 2, 3), [Streamed, Streamed, Resident, Resident, Streamed]);
        let room = SplitRoom { slots: 400, looked_up: 3, ..SplitRoom::EXAMPLE };
        assert_eq!(room.split(&costs(60, 5)), Split { resident: 29, streamed: 0 });
    }

    /// Of a host whose memory is four times as fast as its cores.
    fn costs(host_ms: u64, chunk_ms: u64) -> SplitCosts {
        SplitCosts {
            compute: Duration::from_millis(1000),
            forward_share: 0.25,
            host_step: Duration::from_millis(host_ms),
            memory_share: 0.25,
            to_device: Duration::from_millis(chunk_ms),
            to_host: Duration::from_millis(chunk_ms),
        }
    }

    #[test]
    fn the_host_gets_what_it_can_do_in_time_and_the_link_the_rest() {
        let work = SplitRoom::EXAMPLE.work(Split { resident: 0, streamed: 0 });
        // The host alone hides under compute: nothing is streamed.
        assert_eq!(costs(20, 5).best_streamed(&work, 32), 0);
        // It does not: as few as bring it under.
        let streamed = costs(40, 5).best_streamed(&work, 32);
        assert!((7..16).contains(&streamed), "{streamed}");
        let step = costs(40, 5).step(&work, streamed);
        assert!(step < Duration::from_millis(1080) && step < costs(40, 5).step(&work, 0), "{step:?}");
        // Where memory is what the cores wait for, passing through the device takes as much of it.
        let all_cores = SplitCosts { memory_share: 1.0, ..costs(40, 5) };
        assert_eq!(all_cores.best_streamed(&work, 32), 0);
        assert!(all_cores.step(&work, 0) > costs(40, 5).step(&work, 0), "copies take some of the memory");
        // A slow link makes streaming pointless, however slow the host.
        assert_eq!(costs(40, 60).best_streamed(&work, 32), 0);
        // When updates wait for the last gradient both sides share the forward pass.
        let together = SplitWork { together: true, ..work };
        let both = costs(40, 5).best_streamed(&together, 32);
        assert!(both > streamed, "{both}");
        assert!(costs(40, 5).step(&together, both) < costs(40, 5).step(&together, 0));
    }

    #[test]
    fn a_backward_pass_whose_gradients_find_no_place_waits_for_the_updates() {
        // 24 updates of 40 ms each beside copies that take memory too; compute is 250 ms and 750 ms.
        let costs = SplitCosts { memory_share: 1.0, ..costs(40, 5) };
        let work = SplitRoom::EXAMPLE.work(Split { resident: 8, streamed: 0 });
        // Weights come twice, gradients leave once.
        let host = costs.host_step.mul_f64(costs.updates(24.0, &work, 72.0));
        assert!(host > Duration::from_millis(24 * 40));
        let with = |waiting| costs.step(&SplitWork { waiting, ..work }, 0);
        // Without harm while what comes after them, and the next forward pass, take longer.
        assert!(with(24) > host && with(24) < host.mul_f64(1.1), "{:?}", with(24));
        assert_eq!(with(16), with(24));
        // A quarter of the backward pass is that of the residents.
        let passes = Duration::from_millis(250) + host.mul_f64(20.0 / 24.0) + Duration::from_millis(750) / 4;
        let expected = overlap(&[passes, host]);
        assert!(passes > host && expected > with(24));
        assert!(with(4) > expected.mul_f64(0.99) && with(4) < expected.mul_f64(1.01), "{:?}", with(4));
        assert!(with(0) > with(4));
    }

    #[test]
    fn gradients_wait_where_states_leave_a_place() {
        // 24 groups of 6 chunks in host memory, 8 spare ones; on the device 48 of residents and 4 of an access.
        let room = SplitRoom { below: 24 * 6 + 8 + 5, ..SplitRoom::EXAMPLE };
        let waiting = |split| room.work(split).waiting;
        assert_eq!(waiting(Split { resident: 8, streamed: 0 }), 5 + 60 - 48 - 4);
        assert_eq!(waiting(Split { resident: 7, streamed: 2 }), 0, "what passes takes 14");
        // What passes takes places of residents, whose states need others below.
        assert!(SplitRoom::EXAMPLE.split(&costs(60, 5)).streamed > 0);
        let full = SplitRoom { below: 24 * 6 + 8 + 4, ..SplitRoom::EXAMPLE };
        assert_eq!(full.split(&costs(60, 5)), Split { resident: 8, streamed: 0 });
    }

    #[test]
    fn residents_leave_room_for_what_passes() {
        let room = SplitRoom::EXAMPLE;
        assert_eq!(room.split(&costs(1, 5)), Split { resident: 8, streamed: 0 });
        let split = room.split(&costs(60, 5));
        assert_eq!(split.resident, (60 - 8 - 14) / 6);
        assert!(split.streamed > 0);
        // With everything on the device nothing passes, and a small device cannot afford it.
        assert_eq!(SplitRoom { slots: 400, ..room }.split(&costs(60, 5)), Split { resident: 32, streamed: 0 });
        assert_eq!(SplitRoom { slots: 12, ..room }.split(&costs(60, 5)), Split { resident: 0, streamed: 0 });
        // Where it is tight less is left to what passes.
        assert_eq!(SplitRoom { tight: true, ..room }.most_resident(), (60 - 5) / 6);
        // Gradients that wait for the last one take a slot each.
        assert_eq!(SplitRoom { together: true, ..room }.most_resident(), 7);
        // Where each of the 32 groups has a slot for its 6 chunks and its gradient nothing passes, however much an access takes.
        let full = SplitRoom { slots: 32 * 7, working_set: 40, together: true, ..room };
        assert!(full.holds_all());
        assert!(!SplitRoom { slots: full.slots - 1, ..full }.holds_all());
    }
}
