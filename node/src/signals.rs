//! SIGINT and SIGTERM ask the process to stop; a second one ends it at once.

use std::time::Duration;

use ensign_raft::env::{Stop, Tasks};
use rustix::process::Signal;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;
use tracing::{error, info, warn};

/// Signals this close to the first are the same request.
const ONE_REQUEST: Duration = Duration::from_secs(1);

/// How long an orderly end may take, whatever the settings: three stages of at most a minute each, and some air.
const LAST: Duration = Duration::from_mins(4);

/// A token that is cancelled at the first SIGINT or SIGTERM.
///
/// # Errors
/// The signals cannot be watched.
pub(crate) fn stop() -> std::io::Result<Stop> {
    let stop = Stop::new();
    let asked = stop.clone();
    // A limit on the size of files is a full disk: writes shall fail and be answered, not end the process.
    let _handled_from_now_on = signal(SignalKind::from_raw(Signal::XFSZ.as_raw()))?;
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    // Lives as long as the process: it must still hear the second signal while everything else shuts down.
    Tasks::new().spawn("signals", |_| async move {
        let mut first: Option<Instant> = None;
        loop {
            let name = tokio::select! {
                _ = interrupt.recv() => "SIGINT",
                _ = terminate.recv() => "SIGTERM",
            };
            if let Some(first) = first {
                // A terminal and a supervisor may both pass one request on.
                if first.elapsed() < ONE_REQUEST {
                    continue;
                }
                warn!(signal = name, "asked to stop a second time: ending at once, without a clean close");
                std::process::exit(130);
            }
            info!(signal = name, "asked to stop: draining");
            first = Some(Instant::now());
            end_at_last();
            asked.cancel();
        }
    });
    Ok(stop)
}

/// Ends the process if an orderly end takes beyond all patience: a supervisor must not need SIGKILL.
fn end_at_last() {
    let watching = std::thread::Builder::new().name("stop-watchdog".to_owned()).spawn(|| {
        std::thread::sleep(LAST);
        error!(after = ?LAST, "the orderly end hangs: ending at once, without a clean close");
        std::process::exit(1);
    });
    if let Err(error) = watching {
        warn!(%error, "nothing watches that the process ends");
    }
}
