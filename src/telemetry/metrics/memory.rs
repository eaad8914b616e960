//! Gauges of the most that memory has held: known when a step has ended. What it holds now is in `live`.

use super::names::Gauge;
use super::registry::Registry;
use crate::train::Engine;

/// Shows the peaks up to now.
pub(super) fn show_peaks(registry: &Registry, engine: &Engine) {
    let runtime = engine.runtime();
    let non_model = runtime.non_model_by_moment().into_iter().max().unwrap_or(0);
    registry.gauge(Gauge::DeviceLimit, &[]).set(runtime.device().0 as f64);
    registry.gauge(Gauge::DevicePeak, &[]).set(runtime.device_peak().0 as f64);
    registry.gauge(Gauge::NonModelPeak, &[]).set(non_model as f64);
}
