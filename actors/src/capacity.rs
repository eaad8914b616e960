//! The memory of the device's slots follows the budget: what is above it goes back to the device once nobody uses it.

#![expect(unsafe_code, reason = "takes memory from slots")]

use crate::error::RuntimeError;
use crate::memory::SlotIndex;
use crate::shared::Shared;
use crate::types::Tier;

/// Gives memory to the first `wanted` device slots and takes it from those above that are free. Only the monitor calls
/// this: nobody else moves the limit of what is handed out. Returns how many slots have memory now.
pub(crate) fn resize(shared: &Shared, wanted: u32) -> Result<u32, RuntimeError> {
    let device = Tier::Device.index();
    let keep = shared.device.region_end(wanted);
    let (backed, end) = {
        let mut table = shared.lock();
        let backed = table.backed;
        table.slots[device].set_limit(keep.min(backed));
        (backed, table.slots[device].end())
    };
    // Slots from `keep` on are handed out no more: those that are free stay so, and nothing more is queued on them.
    let target =
        if keep < backed { shared.device.region_end(quiet_from(shared, keep.max(end), backed)?) } else { keep };
    if target == backed {
        return Ok(backed);
    }
    // SAFETY: slots above `target` are free, are not handed out as the limit is below, and what the model queued on them
    // is over; copies and updates are over before their slots are freed.
    let now = unsafe { shared.device.back(target) }?;
    let mut table = shared.lock();
    table.backed = now;
    table.slots[device].set_limit(keep.min(now));
    drop(table);
    tracing::info!(
        before = %crate::types::Bytes(u64::from(backed) * shared.chunk_bytes().0),
        now = %crate::types::Bytes(u64::from(now) * shared.chunk_bytes().0),
        "the memory of the device's chunks follows the budget"
    );
    shared.ring();
    Ok(now)
}

/// The first slot from `from` on such that the model is done with it and with all up to `to`.
fn quiet_from(shared: &Shared, from: u32, to: u32) -> Result<u32, RuntimeError> {
    let events: Vec<_> = {
        let table = shared.lock();
        (from..to).map(|slot| table.slot_event(Tier::Device, SlotIndex(slot))).collect()
    };
    for (slot, event) in (from..to).zip(events).rev() {
        if let Some(event) = event
            && !event.is_complete()?
        {
            return Ok(slot + 1);
        }
    }
    Ok(from)
}
