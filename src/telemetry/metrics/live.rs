//! What is shown while a step runs, hangs or fails: where chunks are, what tiers hold, how actors get on. A thread looks at
//! the runtime from outside about once a second, so that a step has nothing to do for it.

use std::collections::BTreeMap;
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use patrickstar_actors::health::ActorStatus;
use patrickstar_actors::types::{Kind, Tier};
use patrickstar_actors::view::{Residency, RuntimeView};

use super::names::Gauge;
use super::registry::Registry;
use crate::telemetry::periodic::Periodic;

/// Nobody scrapes more often.
const INTERVAL: Duration = Duration::from_secs(1);

/// Starts the thread; what is there now is shown before this returns. `kinds` are those that the training has.
pub(super) fn start(registry: Arc<Registry>, view: RuntimeView, kinds: Vec<Kind>) -> io::Result<Periodic> {
    let mut states = States::default();
    let mut look = move || {
        let (Some(residency), Some(actors)) = (view.residency(), view.actors()) else {
            return ControlFlow::Break(());
        };
        show_tiers(&registry, &residency, &kinds);
        states.show(&registry, &residency);
        actors.iter().for_each(|status| show_actor(&registry, status));
        ControlFlow::Continue(())
    };
    // A runtime that is gone already has nothing to show; the thread finds that out as well.
    let _ = look();
    Periodic::start("ps-live", INTERVAL, look)
}

fn show_tiers(registry: &Registry, residency: &Residency, kinds: &[Kind]) {
    for (tier, used) in Tier::ALL.into_iter().zip(residency.tiers) {
        let name = tier.to_string();
        for (gauge, bytes) in
            [(Gauge::MemoryCapacity, used.capacity), (Gauge::MemoryBudget, used.budget), (Gauge::MemoryPeak, used.peak)]
        {
            registry.gauge(gauge, &[&name]).set(bytes.0 as f64);
        }
        for kind in kinds {
            let bytes = residency.by_kind[tier.index()][kind.index()];
            registry.gauge(Gauge::MemoryUsed, &[&name, kind.name()]).set(bytes as f64);
        }
    }
}

fn show_actor(registry: &Registry, status: &ActorStatus) {
    registry.gauge(Gauge::ActorMailbox, &[status.actor]).set(status.waiting as f64);
    registry.gauge(Gauge::ActorMailboxCapacity, &[status.actor]).set(status.capacity as f64);
    if let Some(time) = status.last_progress {
        registry.gauge(Gauge::ActorLastProgress, &[status.actor]).set(time);
    }
}

/// Chunks by tier, kind and state. What was counted once stays, at 0: its series would else keep its last number for ever.
#[derive(Default)]
struct States(BTreeMap<(Option<Tier>, &'static str, &'static str), u32>);

impl States {
    fn show(&mut self, registry: &Registry, residency: &Residency) {
        self.0.values_mut().for_each(|count| *count = 0);
        for chunk in &residency.chunks {
            *self.0.entry((chunk.tier, chunk.kind.name(), chunk.state)).or_default() += 1;
        }
        for (&(tier, kind, state), &count) in &self.0 {
            let tier = tier.map_or("none".to_owned(), |tier| tier.to_string());
            registry.gauge(Gauge::Chunks, &[&tier, kind, state]).set(f64::from(count));
        }
    }
}
