//! The handle's part outside of steps: forward passes that are not trained on.

use crate::error::RuntimeError;
use crate::runtime::Runtime;
use crate::shared::Lease;
use crate::table::{Access, Requester};
use crate::types::{ChunkId, Moment, Tier};

impl Runtime {
    /// Leases outside of a step: evaluation and generation. `moment` is the one of a step that leases the same chunks: what
    /// follows it there is fetched ahead, gradients aside.
    pub fn access_untraced(
        &self,
        moment: Moment,
        tier: Tier,
        chunks: Vec<(ChunkId, Access)>,
    ) -> Result<Lease, RuntimeError> {
        self.shared.lock().forward_only = true;
        self.shared.lease_at(Some(moment), Requester::Compute, tier, chunks)
    }
}
