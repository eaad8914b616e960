//! Where each group is stepped and where its states live meanwhile.

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

/// Sides of `groups` groups: the first `resident` live on the device, for the forward pass begins with them and they are
/// updated at once; of the others `streamed` are spread evenly, so that both sides have work throughout the backward pass.
pub fn spread_sides(groups: u32, resident: u32, streamed: u32) -> Vec<Side> {
    let resident = resident.min(groups);
    let others = u64::from(groups - resident);
    let streamed = u64::from(streamed).min(others);
    (0..groups)
        .map(|group| match group.checked_sub(resident) {
            None => Side::Resident,
            Some(index) => {
                // Whole parts of index * streamed / others grow by one where a streamed group lies.
                let before = |index: u64| index * streamed / others;
                let index = u64::from(index);
                if before(index + 1) > before(index) { Side::Streamed } else { Side::Host }
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_as_many_as_asked_for_and_evenly_spread() {
        for groups in [0, 1, 7, 64] {
            for resident in [0, 1, 5, 64] {
                for streamed in [0, 1, 3, 40, 100] {
                    let sides = spread_sides(groups, resident, streamed);
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
}
