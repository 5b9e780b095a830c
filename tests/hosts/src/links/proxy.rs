//! Links through a TCP proxy of our own: one listener for each ordered pair of nodes.
//!
//! ```text
//! node 1 ── listener (1, 2) ══ 1→2 ══> node 2        a connection has two directions, and each belongs to a way of its own:
//!        <════════════ 2→1 ═══════════               whoever opened it, what node 2 sends passes the way (2, 1)
//! ```
//!
//! While a way is cut its bytes wait, as TCP would make them wait by sending them again. A connection is made once both of its ways
//! are open. The end of a connection travels as its bytes do. Not here: lost or reordered packets, which TCP hides from both ends.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use super::{Links, Shape, Way};

/// What is read at once, and how many such pieces wait in one direction of one connection; more wait in the sender.
const PIECE: usize = 64 << 10;
const PIECES: usize = 128;

type Shapes = Arc<BTreeMap<Way, watch::Sender<Shape>>>;

/// The proxy. Its tasks run on threads of their own, so that a busy test delays no link.
#[derive(Debug)]
pub struct Proxy {
    shapes: Shapes,
    runtime: Option<Runtime>,
}

impl Proxy {
    /// A proxy for these ways, and where each is to be reached: `target(to)` is the node's real address.
    ///
    /// # Errors
    /// No free port, or no thread.
    pub fn start(
        ways: impl IntoIterator<Item = Way>,
        target: impl Fn(super::Node) -> SocketAddr,
    ) -> anyhow::Result<(Self, BTreeMap<Way, SocketAddr>)> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let ways: Vec<Way> = ways.into_iter().collect();
        let shapes: Shapes = Arc::new(ways.iter().map(|way| (*way, watch::channel(Shape::default()).0)).collect());
        let mut addresses = BTreeMap::new();
        for (from, to) in ways {
            let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
            listener.set_nonblocking(true)?;
            addresses.insert((from, to), listener.local_addr()?);
            let there = shapes.get(&(from, to)).context("a way is there")?.subscribe();
            let back = shapes.get(&(to, from)).context("every way has a way back")?.subscribe();
            // Ends with the runtime.
            runtime.spawn(accept(listener, target(to), there, back));
        }
        Ok((Self { shapes, runtime: Some(runtime) }, addresses))
    }
}

impl Links for Proxy {
    fn shape(&mut self, way: Way, shape: Shape) -> anyhow::Result<()> {
        self.shapes.get(&way).with_context(|| format!("there is no way {way:?}"))?.send_replace(shape);
        Ok(())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Waits for nothing, so that it may happen inside of another runtime.
            runtime.shutdown_background();
        }
    }
}

async fn accept(
    listener: std::net::TcpListener,
    target: SocketAddr,
    there: watch::Receiver<Shape>,
    back: watch::Receiver<Shape>,
) {
    let Ok(listener) = TcpListener::from_std(listener) else { return };
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Ok((inbound, _)) = listener.accept() => {
                connections.spawn(carry(inbound, target, there.clone(), back.clone()));
            }
            Some(_) = connections.join_next() => {}
            else => sleep(Duration::from_millis(10)).await,
        }
    }
}

async fn open(way: &mut watch::Receiver<Shape>) -> Duration {
    // The sender lives as long as the proxy does.
    way.wait_for(|shape| !shape.cut).await.map(|shape| shape.delay).unwrap_or_default()
}

async fn carry(
    inbound: TcpStream,
    target: SocketAddr,
    mut there: watch::Receiver<Shape>,
    mut back: watch::Receiver<Shape>,
) {
    // The handshake is one round trip.
    let round_trip = open(&mut there).await + open(&mut back).await;
    sleep(round_trip).await;
    // Nobody listens: the connection that was accepted breaks.
    let Ok(outbound) = TcpStream::connect(target).await else { return };
    if inbound.set_nodelay(true).and(outbound.set_nodelay(true)).is_err() {
        return;
    }
    let (inbound_read, inbound_write) = inbound.into_split();
    let (outbound_read, outbound_write) = outbound.into_split();
    tokio::join!(pump(inbound_read, outbound_write, there), pump(outbound_read, inbound_write, back));
}

async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut way: watch::Receiver<Shape>) {
    let (sender, mut pieces) = mpsc::channel::<(Instant, Bytes)>(PIECES);
    let delay = way.clone();
    let reading = async move {
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(PIECE);
            let ended = !matches!(from.read_buf(&mut buffer).await, Ok(1..));
            let due = Instant::now() + delay.borrow().delay;
            // An empty piece is the end, which must not overtake what was sent before it.
            if sender.send((due, buffer.split().freeze())).await.is_err() || ended {
                return;
            }
        }
    };
    let writing = async move {
        while let Some((due, piece)) = pieces.recv().await {
            sleep_until(due).await;
            open(&mut way).await;
            if piece.is_empty() || to.write_all(&piece).await.is_err() {
                break;
            }
            let rate = way.borrow().bytes_per_second;
            if let Some(rate) = rate {
                sleep(Duration::from_secs_f64(piece.len() as f64 / rate as f64)).await;
            }
        }
        let _ = to.shutdown().await;
    };
    tokio::join!(reading, writing);
}
