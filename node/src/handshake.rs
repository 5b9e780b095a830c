//! TLS in front of a listener: handshakes, bounded in number by the door and in time here.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use ensign_raft::env::Tasks;
use rustls::ServerConfig;
use rustls::server::{Acceptor, ClientHello};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::{Connected, TcpConnectInfo};
use tracing::{debug, warn};

use crate::door::{Door, Guest};

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Connections whose handshake is done and that nobody has taken over yet.
const READY: usize = 16;
/// Who keeps knocking is complained about this often.
const COMPLAIN_EVERY: Duration = Duration::from_secs(10);

/// What a client's first message is answered with.
pub(crate) type Choose = Arc<dyn Fn(&ClientHello<'_>) -> Arc<ServerConfig> + Send + Sync>;

/// A listener's door, with TLS or without.
pub(crate) enum Entrance {
    /// Without.
    Plain(Door),
    /// With.
    Secure(mpsc::Receiver<(TlsStream<Guest>, SocketAddr)>),
}

impl Entrance {
    /// The door, with handshakes where `choose` is there. Each runs in a task of its own: one that is slow holds nobody up.
    pub(crate) fn new(name: &'static str, door: Door, choose: Option<Choose>, tasks: &Tasks) -> Self {
        let Some(choose) = choose else { return Self::Plain(door) };
        let (ready_tx, ready_rx) = mpsc::channel(READY);
        let (each, seldom) = (tasks.clone(), Arc::new(Seldom::default()));
        tasks.spawn("door", |stop| async move {
            while let Some((guest, address)) = stop.run_until_cancelled(door.accept()).await {
                let (ready, seldom, choose) = (ready_tx.clone(), Arc::clone(&seldom), Arc::clone(&choose));
                each.spawn("handshake", |stop| async move {
                    let shaken = stop.run_until_cancelled(timeout(HANDSHAKE, shake(guest, &choose))).await;
                    match shaken {
                        Some(Ok(Ok(stream))) => {
                            // Fails when the server is gone: then so is everything.
                            let _ = ready.send((stream, address)).await;
                        }
                        Some(Ok(Err(error))) if seldom.now() => warn!(name, %address, %error, "a TLS handshake failed"),
                        Some(Ok(Err(error))) => debug!(name, %address, %error, "a TLS handshake failed"),
                        Some(Err(_)) => debug!(name, %address, "a TLS handshake took too long"),
                        None => {}
                    }
                });
            }
        });
        Self::Secure(ready_rx)
    }

    /// The next connection; none when the server is stopping. Cancel safe.
    pub(crate) async fn next(&mut self) -> Option<(Stream, SocketAddr)> {
        match self {
            Self::Plain(door) => {
                let (guest, address) = door.accept().await;
                Some((Stream::Plain(guest), address))
            }
            Self::Secure(ready) => {
                let (stream, address) = ready.recv().await?;
                Some((Stream::Secure(Box::new(stream)), address))
            }
        }
    }
}

async fn shake(guest: Guest, choose: &Choose) -> io::Result<TlsStream<Guest>> {
    let start = LazyConfigAcceptor::new(Acceptor::default(), guest).await?;
    let config = choose(&start.client_hello());
    start.into_stream(config).await
}

/// A connection that a listener has taken.
pub(crate) enum Stream {
    /// In clear.
    Plain(Guest),
    /// Over TLS.
    Secure(Box<TlsStream<Guest>>),
}

impl Stream {
    /// What goes over it, but for what TLS adds.
    fn inner(self: Pin<&mut Self>) -> Inner<'_> {
        match self.get_mut() {
            Self::Plain(stream) => Inner::Plain(Pin::new(stream)),
            Self::Secure(stream) => Inner::Secure(Pin::new(&mut **stream)),
        }
    }
}

enum Inner<'a> {
    Plain(Pin<&'a mut Guest>),
    Secure(Pin<&'a mut TlsStream<Guest>>),
}

impl Connected for Stream {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        match self {
            Self::Plain(stream) => stream.connect_info(),
            Self::Secure(stream) => stream.get_ref().0.connect_info(),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.inner() {
            Inner::Plain(stream) => stream.poll_read(cx, buf),
            Inner::Secure(stream) => stream.poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.inner() {
            Inner::Plain(stream) => stream.poll_write(cx, buf),
            Inner::Secure(stream) => stream.poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.inner() {
            Inner::Plain(stream) => stream.poll_write_vectored(cx, bufs),
            Inner::Secure(stream) => stream.poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.is_write_vectored(),
            Self::Secure(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.inner() {
            Inner::Plain(stream) => stream.poll_flush(cx),
            Inner::Secure(stream) => stream.poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.inner() {
            Inner::Plain(stream) => stream.poll_shutdown(cx),
            Inner::Secure(stream) => stream.poll_shutdown(cx),
        }
    }
}

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
