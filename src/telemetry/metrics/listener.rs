//! A scrape endpoint for a process that has no HTTP server of its own: the exporter's.

use std::net::SocketAddr;

use super::registry::{Registry, adopt, builder};
use crate::error::Error;

/// Installs this process's registry for `job_id`, and answers scrapes at `address` until the process ends.
pub fn listen(address: SocketAddr, job_id: &str) -> Result<(), Error> {
    if !address.ip().is_loopback() {
        tracing::warn!(%address, "metrics are readable by everybody who reaches this address");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| unavailable(address, &error.to_string()))?;
    let (recorder, exporter) = {
        let _inside = runtime.enter();
        builder(Some(job_id))?
            .with_http_listener(address)
            .build()
            .map_err(|error| unavailable(address, &error.to_string()))?
    };
    adopt(Registry::of(recorder, true)?)?;
    std::thread::Builder::new()
        .name("ps-metrics-http".into())
        .spawn(move || {
            // Errors of a connection stay inside; what comes out would be the end of the listener.
            if runtime.block_on(exporter).is_err() {
                tracing::error!(%address, "metrics are not served any more");
            }
        })
        .map_err(|error| unavailable(address, &error.to_string()))?;
    Ok(())
}

fn unavailable(address: SocketAddr, why: &str) -> Error {
    Error::Failed(format!("metrics cannot be served at {address}: {why}: choose another address with --metrics"))
}
