//! The peer port: handshakes, bounded in number and in time, before anything is read that a stranger could have sent.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ensign_raft::env::Tasks;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tracing::{debug, warn};

use super::tls::PeerTls;
use crate::door::{Door, Guest};

/// Connections of peers at once, and of who wants to be taken for one.
const PLACES: usize = 1024;
/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Connections whose handshake is done and that the server has not taken over yet.
const READY: usize = 16;

/// Who keeps knocking is complained about this often.
const COMPLAIN_EVERY: Duration = Duration::from_secs(10);

/// Whether it is time to complain again.
#[derive(Default)]
struct Seldom(Mutex<Option<Instant>>);

impl Seldom {
    fn now(&self) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let due = last.is_none_or(|last| last.elapsed() >= COMPLAIN_EVERY);
        if due {
            *last = Some(Instant::now());
        }
        due
    }
}

/// The connections of those who proved to be certified by the cluster's authority.
pub(super) fn handshakes(listener: TcpListener, tls: PeerTls, tasks: &Tasks) -> ReceiverStream<TlsStream<Guest>> {
    let (ready_tx, ready_rx) = mpsc::channel(READY);
    let door = Door::new("peer-server", listener, PLACES);
    let (each, seldom) = (tasks.clone(), Arc::new(Seldom::default()));
    tasks.spawn("peer-door", |stop| async move {
        while let Some((guest, address)) = stop.run_until_cancelled(door.accept()).await {
            let acceptor = TlsAcceptor::from(tls.server());
            let (ready, seldom) = (ready_tx.clone(), Arc::clone(&seldom));
            each.spawn("peer-handshake", |stop| async move {
                let shaken = stop.run_until_cancelled(timeout(HANDSHAKE, acceptor.accept(guest))).await;
                match shaken {
                    Some(Ok(Ok(stream))) => {
                        // Fails when the server is gone: then so is everything.
                        let _ = ready.send(stream).await;
                    }
                    Some(Ok(Err(error))) if seldom.now() => {
                        warn!(%address, %error, "a connection to the peer port was refused: only nodes with a valid certificate of this cluster's authority may speak");
                    }
                    Some(Ok(Err(error))) => debug!(%address, %error, "a connection to the peer port was refused"),
                    Some(Err(_)) => debug!(%address, "a handshake on the peer port took too long"),
                    None => {}
                }
            });
        }
    });
    ReceiverStream::new(ready_rx)
}
