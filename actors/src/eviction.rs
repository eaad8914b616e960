//! The eviction actor: owns placement. It is woken after every change, plans moves in the table and rings the streams.

use std::sync::Arc;

use crate::copy::MovesPlanned;
use crate::error::RuntimeError;
use crate::health::ActorName;
use crate::moves::MoveStatus;
use crate::planner::Planner;
use crate::shared::Shared;

/// Rings of the copy streams.
#[derive(Clone)]
pub(crate) struct Streams {
    pub host_to_device: flume::Sender<MovesPlanned>,
    pub device_to_host: flume::Sender<MovesPlanned>,
    pub disk: flume::Sender<MovesPlanned>,
}

/// Plans moves. It keeps no state that a panic could lose: plans are made from the table, and lie in it.
pub(crate) struct Eviction {
    shared: Arc<Shared>,
    streams: Streams,
}

impl Eviction {
    pub fn new(shared: Arc<Shared>, streams: Streams) -> Self {
        Eviction { shared, streams }
    }

    /// One pass of planning; rings every stream that something is planned for.
    pub fn run(&mut self) -> Result<(), RuntimeError> {
        let streams: Vec<ActorName> = {
            let mut table = self.shared.lock();
            Planner::new(&self.shared, &mut table).run()?;
            table.moves.values().filter(|planned| planned.status == MoveStatus::Planned).map(|p| p.stream()).collect()
        };
        // Planned and not yet told to any stream: where a death would hurt most.
        self.shared.health.fault_point(ActorName::Eviction);
        // Budgets and drops may have freed a waiter.
        self.shared.changed.notify_all();
        for (name, bell) in [
            (ActorName::HostToDevice, &self.streams.host_to_device),
            (ActorName::DeviceToHost, &self.streams.device_to_host),
            (ActorName::Disk, &self.streams.disk),
        ] {
            // Full means that the stream has a ring to hear.
            if streams.contains(&name)
                && let Err(flume::TrySendError::Disconnected(_)) = bell.try_send(MovesPlanned)
            {
                return Err(RuntimeError::Stopped("a copy stream is gone".into()));
            }
        }
        Ok(())
    }
}
