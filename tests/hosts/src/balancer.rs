//! A TCP balancer, for clients that know one address: round robin over the nodes whose `/readyz` says that they may be sent work.
//!
//! A node that says it is not ready gets no new connections and keeps those it has: it ends them itself when it stops. One that says
//! nothing at all for three checks has its connections broken, as a balancer does whose server is gone.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

/// Between two checks of a node; also how long it may take to answer.
const CHECK: Duration = Duration::from_millis(500);
const SILENT_CHECKS: u8 = 3;

/// One node, as a balancer sees it.
#[derive(Debug)]
struct Backend {
    address: SocketAddr,
    readyz: String,
    ready: watch::Sender<bool>,
    /// Checks without any answer, one after the other.
    silent: AtomicU8,
    /// Changes when its connections are to be broken.
    gone: watch::Sender<u64>,
}

/// A balancer at work. Ends when it is dropped.
#[derive(Debug)]
pub struct Balancer {
    address: SocketAddr,
    _tasks: JoinSet<()>,
}

impl Balancer {
    /// In front of these nodes: where each is to be reached, and its metrics listener.
    ///
    /// # Errors
    /// No port is free.
    pub async fn start(nodes: impl IntoIterator<Item = (SocketAddr, SocketAddr)>) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let backends: Arc<[Backend]> = nodes
            .into_iter()
            .map(|(address, metrics)| Backend {
                address,
                readyz: format!("http://{metrics}/readyz"),
                ready: watch::channel(false).0,
                silent: AtomicU8::new(0),
                gone: watch::channel(0).0,
            })
            .collect();
        let mut tasks = JoinSet::new();
        let client = reqwest::Client::builder().timeout(CHECK).build().context("no HTTP client")?;
        for place in 0..backends.len() {
            tasks.spawn(check(Arc::clone(&backends), place, client.clone()));
        }
        tasks.spawn(accept(listener, backends));
        Ok(Self { address, _tasks: tasks })
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

async fn check(backends: Arc<[Backend]>, place: usize, client: reqwest::Client) {
    let backend = &backends[place];
    let mut ticks = interval(CHECK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let reply = client.get(&backend.readyz).send().await;
        backend.ready.send_replace(reply.as_ref().is_ok_and(|reply| reply.status().is_success()));
        if reply.is_ok() {
            backend.silent.store(0, Ordering::Relaxed);
        } else if backend.silent.fetch_add(1, Ordering::Relaxed) + 1 == SILENT_CHECKS {
            backend.gone.send_modify(|gone| *gone += 1);
        }
    }
}

async fn accept(listener: TcpListener, backends: Arc<[Backend]>) {
    let turn = Arc::new(AtomicUsize::new(0));
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Ok((inbound, _)) = listener.accept() => {
                connections.spawn(carry(inbound, Arc::clone(&backends), Arc::clone(&turn)));
            }
            Some(_) = connections.join_next() => {}
            else => sleep(Duration::from_millis(10)).await,
        }
    }
}

async fn carry(mut inbound: TcpStream, backends: Arc<[Backend]>, turn: Arc<AtomicUsize>) {
    for _ in 0..backends.len() {
        let place = turn.fetch_add(1, Ordering::Relaxed) % backends.len();
        let backend = &backends[place];
        if !*backend.ready.borrow() {
            continue;
        }
        let Ok(Ok(mut outbound)) = timeout(CHECK, TcpStream::connect(backend.address)).await else { continue };
        let _ = inbound.set_nodelay(true).and(outbound.set_nodelay(true));
        let mut gone = backend.gone.subscribe();
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut inbound, &mut outbound) => {}
            _ = gone.changed() => {}
        }
        return;
    }
    // Nobody is ready: the connection is closed, and the client tries again.
}
