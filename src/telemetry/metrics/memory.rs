//! Gauges of memory: what every tier may hold, holds and has held.

use patrickstar_actors::types::{Kind, Tier};

use super::names::Gauge;
use super::registry::Registry;
use crate::train::Engine;

/// Shows the tiers as they are now.
pub(super) fn show(registry: &Registry, engine: &Engine) {
    let runtime = engine.runtime();
    let by_kind = runtime.use_by_kind();
    let kinds = engine.precision().persistent_kinds().iter().copied().chain([Kind::Gradient]);
    for tier in Tier::ALL {
        let (used, name) = (runtime.tier_use(tier), tier.to_string());
        for (gauge, bytes) in
            [(Gauge::MemoryCapacity, used.capacity), (Gauge::MemoryBudget, used.budget), (Gauge::MemoryPeak, used.peak)]
        {
            registry.gauge(gauge, &[&name]).set(bytes.0 as f64);
        }
        for kind in kinds.clone() {
            let bytes = by_kind[tier.index()][kind.index()];
            registry.gauge(Gauge::MemoryUsed, &[&name, kind.name()]).set(bytes as f64);
        }
    }
    let non_model = runtime.non_model_by_moment().into_iter().max().unwrap_or(0);
    registry.gauge(Gauge::DeviceLimit, &[]).set(runtime.device().0 as f64);
    registry.gauge(Gauge::DevicePeak, &[]).set(runtime.device_peak().0 as f64);
    registry.gauge(Gauge::NonModelPeak, &[]).set(non_model as f64);
}
