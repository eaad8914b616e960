//! Tells systemd how the service is. Where nobody asked to be told, nothing happens.

use std::time::Duration;

use sd_notify::NotifyState;

use super::supervisor::SupervisorHandle;

/// Requests are answered.
pub(super) fn ready() {
    tell(NotifyState::Ready);
}

/// The service begins to end.
pub(super) fn stopping() {
    tell(NotifyState::Stopping);
}

/// Says that all is well as often as the watchdog wants to hear it, as long as that is true: the supervisor has read the
/// queue since the last time. One that hangs, or a database that does not answer, is silence, and systemd starts the service
/// again. Never returns.
pub(super) async fn keep_alive(supervisor: SupervisorHandle) {
    let Some(patience) = sd_notify::watchdog_enabled() else { return std::future::pending().await };
    let interval = (patience / 3).max(Duration::from_millis(1));
    let mut seen = 0;
    loop {
        tokio::time::sleep(interval).await;
        let rounds = supervisor.rounds();
        if rounds != seen {
            seen = rounds;
            tell(NotifyState::Watchdog);
        }
    }
}

fn tell(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!("systemd cannot be told how the service is: {error}");
    }
}
