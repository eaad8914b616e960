//! Does it fit, and if not, which knob would make it fit.

use patrickstar_actors::types::Bytes;

use super::Plan;
use crate::config::{Config, Placement};

impl Plan {
    /// Device memory below which a job of this plan cannot go on: its largest access beside what is not chunks.
    pub fn least_device(&self) -> Bytes {
        Bytes(u64::from(self.working_set_chunks) * self.chunk.0 + self.reserved.0)
    }

    pub(super) fn verify(&mut self, config: &Config, needed: u32) {
        let chunk = self.chunk.0;
        let bytes = |slots: u32| Bytes(u64::from(slots) * chunk);
        let (device, host, disk) = (self.room.slots, self.slots.host, self.slots.disk);
        let stepped_on_device = self.room.persistent + 1;
        let device_need = match config.actors.optimizer.placement {
            Placement::Device => self.working_set_chunks.max(stepped_on_device),
            Placement::Host | Placement::Hybrid => self.working_set_chunks,
        };
        if device < device_need {
            let non_model = config.memory.device.0.saturating_sub(bytes(device).0);
            let need = Bytes(u64::from(device_need) * chunk + non_model.min(config.memory.device.0));
            self.problems.push(format!(
                "device memory has room for {device} chunks of {} beside {} of activations, the largest block needs {device_need}: \
                 set memory.device to at least {need}, or lower memory.chunk, or raise train.micro_batches",
                Bytes(chunk),
                Bytes(non_model),
            ));
        }
        let host_need = (self.room.persistent + 1).max(self.working_set_chunks).max(self.looked_up_chunks) + 2;
        if host < host_need.min(needed) {
            self.problems.push(format!(
                "host memory has {} for chunks, stepping one group needs {}: set memory.host to at least {}",
                bytes(host),
                bytes(host_need),
                bytes(host_need),
            ));
        } else if host + disk < needed {
            let missing = bytes(needed - host - disk);
            self.problems.push(format!(
                "states and gradients beside the device need {}, host and disk have {}: raise memory.host or memory.disk by {missing}, \
                 or raise memory.device",
                bytes(needed),
                bytes(host + disk),
            ));
        }
    }
}
