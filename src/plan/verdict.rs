//! Does it fit, and if not, which knob would make it fit.

use patrickstar_actors::types::Bytes;

use super::Plan;
use super::split::{Slots, Spread};
use crate::config::{Config, Placement, Share};

impl Plan {
    /// Device memory below which a job of this plan cannot go on: its largest access beside what is not chunks.
    pub fn least_device(&self) -> Bytes {
        Bytes(self.least_chunks().0 + self.reserved.0)
    }

    /// The chunks of the largest access of a block, or of a group that is stepped on the device.
    pub fn least_chunks(&self) -> Bytes {
        let Spread { room, split, .. } = self.spread;
        let stepped = if split.resident + split.streamed > 0 { room.persistent + 1 } else { 0 };
        Bytes(u64::from(self.working_set_chunks.max(stepped)) * self.chunk.0)
    }

    /// The `memory.chunk_share` that leaves activations what they have now, were the device's budget `device`.
    pub fn chunk_share(&self, device: Bytes) -> f64 {
        device.0.saturating_sub(self.reserved.0) as f64 / device.0.max(1) as f64
    }

    pub(super) fn verify(&mut self, config: &Config) {
        let chunk = self.chunk.0;
        let bytes = |slots: u32| Bytes(u64::from(slots) * chunk);
        let Spread { room, slots: Slots { host, disk }, needed, .. } = self.spread;
        let device = room.slots;
        let stepped_on_device = room.persistent + 1;
        let device_need = match config.actors.optimizer.placement {
            Placement::Device => self.working_set_chunks.max(stepped_on_device),
            Placement::Host | Placement::Hybrid => self.working_set_chunks,
        };
        if device < device_need {
            let non_model = self.reserved.0;
            // Models of the user's own are left a quarter of the device, however large it is.
            let own = self.flops.is_none();
            let chunks = u64::from(device_need) * chunk;
            let share = config.memory.chunk_share;
            let (need, knob) = match config.memory.share {
                Share::Dynamic => (
                    if own { chunks.div_ceil(3) * 4 } else { chunks + non_model },
                    "raise train.micro_batches".to_owned(),
                ),
                Share::Static => {
                    ((chunks as f64 / share).ceil() as u64, format!("raise memory.chunk_share above {share}"))
                }
            };
            let need = Bytes(need).as_setting();
            self.problems.push(format!(
                "device memory has room for {device} chunks of {} beside {} of activations, the largest block needs {device_need}: \
                 set memory.device to at least {need}, or lower memory.chunk, or {knob}",
                Bytes(chunk),
                Bytes(non_model),
            ));
        }
        let host_need = (room.persistent + 1).max(self.working_set_chunks).max(self.looked_up_chunks) + 2;
        if host < host_need.min(needed) {
            self.problems.push(format!(
                "host memory has {} for chunks, stepping one group needs {}: set memory.host to at least {}",
                bytes(host),
                bytes(host_need),
                Bytes(bytes(host_need).0 + self.activations_on_host.0).as_setting(),
            ));
        } else if host + disk < needed {
            let missing = bytes(needed - host - disk).as_setting();
            self.problems.push(format!(
                "states and gradients beside the device need {}, host and disk have {}: raise memory.host or memory.disk by {missing}, \
                 or raise memory.device",
                bytes(needed),
                bytes(host + disk),
            ));
        }
    }
}

/// Why activations that need so much do not fit into the `rest` that a static share leaves them.
pub(super) fn too_little_beside_chunks(config: &Config, need: Bytes, rest: Bytes) -> String {
    let most = 1.0 - need.0 as f64 / config.memory.device.0.max(1) as f64;
    let knob = match most > 0.0 {
        // Rounded down: it must leave enough.
        true => format!("lower memory.chunk_share to {:.3}", (most * 1e3).floor() / 1e3),
        false => format!("set memory.device to more than {}", need.as_setting()),
    };
    format!(
        "activations need {need}, the static share of chunks leaves them {rest}: {knob}, or raise train.micro_batches, \
         or set memory.share = \"dynamic\""
    )
}
