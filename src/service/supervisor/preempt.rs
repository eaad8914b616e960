//! A job of higher priority need not wait for one of lower priority: that one saves a checkpoint, leaves its device and goes
//! back to the queue, from where it goes on with the same bits.

use super::Supervisor;
use crate::service::error::ServiceError;
use crate::service::store::{JobRow, NewEvent, Status, UnixTime};
use crate::service::worker::protocol::ToWorker;

impl Supervisor {
    /// Sends running jobs back to the queue whose device somebody more important waits for, and says whether there were any.
    /// The device is free when the worker has left, as after a pause.
    pub(super) async fn preempt(&self, jobs: &[(JobRow, UnixTime)]) -> Result<bool, ServiceError> {
        let mut any = false;
        for (job, other) in outranked(jobs) {
            let text = format!("Makes way for job {} of priority {}, and goes on after it", other.id, other.priority);
            let (id, event) = (job.id.clone(), NewEvent::info(text));
            // It may have ended meanwhile.
            let queued = self.store.write(move |store| store.change_status(&id, Status::Queued, &event)).await?;
            if queued.is_some() {
                self.running.order(&job.id, ToWorker::Pause);
                any = true;
            }
        }
        Ok(any)
    }
}

/// Running jobs, each with the first of those queued for its device, where that one has a higher priority.
fn outranked(jobs: &[(JobRow, UnixTime)]) -> impl Iterator<Item = (&JobRow, &JobRow)> {
    let of = |status: Status| jobs.iter().map(|(job, _)| job).filter(move |job| job.status == status);
    of(Status::Running).filter_map(move |job| {
        // The queue is in order of priority.
        let next = of(Status::Queued).find(|other| other.device == job.device)?;
        (next.priority > job.priority).then_some((job, next))
    })
}
