//! The way in: how many connections there are at once, and how long a new one may say nothing.
//!
//! A connection costs memory and a file before anyone knows whose it is. So there are only so many places; while all are taken, new
//! clients wait in the kernel's queue. When files run out all the same, accepting pauses instead of turning round and round.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;
use tonic::transport::server::{Connected, TcpConnectInfo};
use tracing::{debug, info, warn};

/// Bytes that every protocol of ours begins with at least: HTTP/2's preface has 24, and an HTTP/1 request has more.
const GREETING: usize = 24;

/// How long they may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long nothing is accepted after the system had no file for a connection.
const PAUSE: Duration = Duration::from_millis(500);

/// Open files below which an operator should know: all places of all listeners, and what the node itself needs.
const FILES_WANTED: u64 = 8192;

/// Raises this process's limit of open files as far as it may, and says so when that is not far.
pub(crate) fn raise_open_files() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    let files = if raised.is_ok() { maximum } else { current };
    match files {
        Some(files) if files < FILES_WANTED => warn!(
            files,
            wanted = FILES_WANTED,
            "this process may open few files, so fewer clients can connect: raise the hard limit (ulimit -Hn, or systemd's LimitNOFILE)"
        ),
        _ => debug!(?files, "the limit of open files"),
    }
}

/// A listener with so many places.
#[derive(Debug)]
pub(crate) struct Door {
    name: &'static str,
    listener: TcpListener,
    places: Arc<Semaphore>,
    patience: Duration,
}

impl Door {
    /// With `places`, or as many as a quarter of the open files that the process may have.
    pub(crate) fn new(name: &'static str, listener: TcpListener, places: usize) -> Self {
        let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let places = places.min(usize::try_from(files / 4).unwrap_or(usize::MAX)).max(1);
        Self { name, listener, places: Arc::new(Semaphore::new(places)), patience: PATIENCE }
    }

    /// The next connection, once there is a place for it. Cancel safe.
    pub(crate) async fn accept(&self) -> (Guest, SocketAddr) {
        let place = self.place().await;
        loop {
            match self.listener.accept().await {
                Ok((stream, peer)) => {
                    // Answers are small and must not wait for one another.
                    let _ = stream.set_nodelay(true);
                    let greeting = Some((Box::pin(tokio::time::sleep(self.patience)), GREETING));
                    return (Guest { stream, greeting, _place: place, more: None }, peer);
                }
                Err(error) if is_the_clients(&error) => {
                    debug!(name = self.name, %error, "a client left before it was let in");
                }
                Err(error) => {
                    warn!(
                        name = self.name,
                        %error,
                        "a connection cannot be taken; trying again soon. Are there too few open files (ulimit -n)?"
                    );
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    async fn place(&self) -> OwnedSemaphorePermit {
        if let Ok(place) = Arc::clone(&self.places).try_acquire_owned() {
            return place;
        }
        warn!(name = self.name, "every place for a connection is taken; new clients wait until one leaves");
        let place = Arc::clone(&self.places).acquire_owned().await.expect("the places are never closed");
        info!(name = self.name, "a place for a connection is free again");
        place
    }
}

fn is_the_clients(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// A connection in its place, which is free again once this is dropped.
#[derive(Debug)]
pub(crate) struct Guest {
    stream: TcpStream,
    /// Until when the rest of the greeting has to come.
    greeting: Option<(Pin<Box<Sleep>>, usize)>,
    _place: OwnedSemaphorePermit,
    #[allow(dead_code, reason = "held until the connection is dropped")]
    more: Option<OwnedSemaphorePermit>,
}

impl Guest {
    /// Another place, which is free again with this one.
    pub(crate) fn hold(&mut self, place: OwnedSemaphorePermit) {
        self.more = Some(place);
    }

    /// Has another runtime wait for what comes and goes on this connection. Only once the greeting is over.
    ///
    /// # Errors
    /// The process has too many open files.
    pub(crate) fn move_to(&mut self, runtime: &Handle) -> io::Result<()> {
        let stream = std::net::TcpStream::from(self.stream.as_fd().try_clone_to_owned()?);
        let _entered = runtime.enter();
        self.stream = TcpStream::from_std(stream)?;
        Ok(())
    }
}

impl Connected for Guest {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Guest {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        let Some((deadline, left)) = &mut self.greeting else { return read };
        if read.is_pending() {
            return deadline.as_mut().poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into()));
        }
        *left = left.saturating_sub(buf.filled().len() - before);
        if *left == 0 {
            self.greeting = None;
        }
        read
    }
}

impl AsyncWrite for Guest {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    async fn door(places: usize, patience: Duration) -> (Door, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        (Door { patience, ..Door::new("test", listener, places) }, address)
    }

    #[tokio::test]
    async fn who_finds_no_place_waits_until_one_leaves() {
        let (door, address) = door(1, PATIENCE).await;
        let _one = TcpStream::connect(address).await.unwrap();
        let two = TcpStream::connect(address).await.unwrap();
        let (inside, _) = door.accept().await;
        let mut next = std::pin::pin!(door.accept());
        assert!((&mut next).now_or_never().is_none());
        drop(inside);
        let (_, peer) = next.await;
        assert_eq!(peer, two.local_addr().unwrap());
    }

    #[tokio::test]
    async fn who_does_not_greet_is_put_out() {
        let (door, address) = door(1, Duration::from_millis(1)).await;
        for said in [0, 1, GREETING - 1] {
            let mut client = TcpStream::connect(address).await.unwrap();
            client.write_all(&vec![b'P'; said]).await.unwrap();
            let (mut guest, _) = door.accept().await;
            let error = guest.read_exact(&mut [0; GREETING]).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{said}");
        }
    }

    #[tokio::test]
    async fn who_has_greeted_may_be_silent() {
        let (door, address) = door(1, PATIENCE).await;
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(&[b'P'; GREETING]).await.unwrap();
        let (mut guest, _) = door.accept().await;
        guest.read_exact(&mut [0; GREETING]).await.unwrap();
        assert!(guest.greeting.is_none());
    }
}
