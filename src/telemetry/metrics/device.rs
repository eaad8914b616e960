//! Gauges of a GPU: who else uses it, and how it is. What its driver does not tell is absent.

use patrickstar_actors::neighbours::{DeviceReading, Neighbours, Throttle};

use super::names::{Counter, Gauge};
use super::registry::Registry;

/// Shows a GPU as it was found.
pub(crate) fn show_device(registry: &Registry, reading: &DeviceReading) {
    let count = match &reading.neighbours {
        Neighbours::Known(all) => Some(all.len() as f64),
        Neighbours::Mixed { .. } => None,
    };
    for (gauge, value) in [
        (Gauge::DeviceFree, Some(reading.free.0 as f64)),
        (Gauge::DeviceNeighbours, count),
        (Gauge::DeviceNeighbourBytes, reading.neighbours.bytes().map(|bytes| bytes.0 as f64)),
        (Gauge::DeviceBusy, reading.busy),
        (Gauge::DeviceTemperature, reading.celsius),
        (Gauge::DevicePower, reading.watts),
    ] {
        if let Some(value) = value {
            registry.gauge(gauge, &[]).set(value);
        }
    }
    if let Some(joules) = reading.joules {
        registry.counter(Counter::DeviceEnergy, &[]).absolute(joules);
    }
    for throttle in reading.throttles.iter().flat_map(|_| Throttle::ALL) {
        let held_back = reading.throttles.as_ref().is_some_and(|throttles| throttles.contains(&throttle));
        registry.gauge(Gauge::DeviceThrottled, &[throttle.name()]).set(f64::from(u8::from(held_back)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use patrickstar_actors::neighbours::{Neighbour, Pid};
    use patrickstar_actors::types::Bytes;

    fn reading(neighbours: Neighbours) -> DeviceReading {
        DeviceReading {
            free: Bytes(1000),
            total: Bytes(3000),
            neighbours,
            celsius: Some(61.0),
            watts: None,
            joules: Some(7654),
            busy: Some(0.5),
            throttles: Some(vec![Throttle::Heat]),
        }
    }

    #[test]
    fn what_was_found_is_shown_and_nothing_else() {
        let registry = Registry::new(None).unwrap();
        let neighbour = Neighbour { pid: Pid(7), name: None, bytes: Some(Bytes(700)) };
        show_device(&registry, &reading(Neighbours::Known(vec![neighbour])));
        let text = registry.render();
        let shows = |metric: &str, value: &str| text.contains(&format!("\n{metric} {value}\n"));
        assert!(shows(Gauge::DeviceNeighbourBytes.family().name, "700"), "{text}");
        assert!(shows(Gauge::DeviceNeighbours.family().name, "1") && shows(Gauge::DeviceFree.family().name, "1000"));
        assert!(shows(Counter::DeviceEnergy.family().name, "7654"), "{text}");
        let throttled = Gauge::DeviceThrottled.family().name;
        assert!(shows(&format!("{throttled}{{reason=\"heat\"}}"), "1"), "{text}");
        assert!(shows(&format!("{throttled}{{reason=\"power\"}}"), "0"), "{text}");
        assert!(!text.contains(Gauge::DevicePower.family().name), "{text}");
    }

    #[test]
    fn neighbours_that_cannot_be_told_apart_are_not_none() {
        let registry = Registry::new(None).unwrap();
        show_device(&registry, &reading(Neighbours::Mixed { listed: 3 }));
        let text = registry.render();
        assert!(!text.contains(Gauge::DeviceNeighbourBytes.family().name), "{text}");
        assert!(!text.contains(Gauge::DeviceNeighbours.family().name), "{text}");
    }
}
