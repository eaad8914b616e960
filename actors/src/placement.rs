//! Which groups are stepped on the device and which in host memory.

use serde::Serialize;

use crate::chunk::Layout;
use crate::runtime::RuntimeConfig;
use crate::table::Table;
use crate::types::{GroupId, Tier};

/// Where groups are stepped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Placement {
    /// All in device memory; states that do not fit travel.
    Device,
    /// All in host memory.
    Host,
    /// As many as stay on the device beside what the model needs; the rest in host memory.
    Hybrid,
}

/// Chooses the side on which each group is stepped, and pins the states of groups that stay on the device.
pub(crate) fn place_groups(table: &mut Table, layout: &Layout, config: &RuntimeConfig) {
    let groups = layout.group_count() as u32;
    let persistent: u32 = layout.precision().persistent_kinds().iter().map(|&kind| layout.parts(kind)).sum();
    let on_device = match config.placement {
        Placement::Device => groups,
        Placement::Host => 0,
        Placement::Hybrid => {
            // Room for one access and the one prefetched beside it stays free.
            let reserve = 2 * config.working_set;
            (table.budget[Tier::Device.index()].saturating_sub(reserve) / persistent.max(1)).min(groups)
        }
    };
    for index in 0..on_device {
        let group = GroupId(index);
        table.group_mut(group).on_device = true;
        if config.placement == Placement::Hybrid {
            for &kind in layout.precision().persistent_kinds() {
                for &chunk in layout.group_chunks(group, kind) {
                    table.entry_mut(chunk).pinned = true;
                }
            }
        }
    }
}
