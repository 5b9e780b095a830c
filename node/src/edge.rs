//! The listeners that clients and operators use.

use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
use ensign_raft::env::{Stop, Tasks};
use futures::FutureExt as _;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tonic::service::Routes;
use tonic::transport::Server;
use tower::ServiceExt as _;
use tracing::{debug, error};

use crate::certificates::ClientTls;
use crate::door::Door;
use crate::handshake::Entrance;

/// gRPC connections at once.
const GRPC_PLACES: usize = 4096;

/// Streams and calls of one connection at once: each costs memory, and a client that wants more opens another connection. Not fewer,
/// since a proxy may put all of its clients on one.
const STREAMS: u32 = 1024;

/// Connections of an HTTP listener at once.
const HTTP_PLACES: usize = 1024;

/// How connections to an HTTP listener are bounded in time.
#[derive(Debug, Clone, Copy)]
struct Patience {
    /// For the head of a request, and between requests.
    head: Duration,
    /// For a connection.
    age: Duration,
    /// For what is under way when it has to end.
    last: Duration,
}

const PATIENCE: Patience =
    Patience { head: Duration::from_secs(30), age: Duration::from_mins(10), last: Duration::from_secs(5) };

/// Whether the other side of a silent connection is still there is asked this often, and has to be answered as soon.
const KEEPALIVE: Duration = Duration::from_secs(20);

/// Serves gRPC until the tasks stop; calls in progress then end by themselves (streams watch the node's phase).
pub(crate) fn serve_grpc(listener: TcpListener, tls: Option<&ClientTls>, routes: Routes, tasks: &Tasks) {
    let server = Server::builder()
        .initial_stream_window_size(8 << 20)
        .initial_connection_window_size(16 << 20)
        .max_frame_size(1 << 20)
        .max_concurrent_streams(STREAMS)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .add_routes(routes);
    let door = Door::new("grpc-server", listener, GRPC_PLACES);
    let entrance = Entrance::new("grpc-server", door, tls.map(ClientTls::choose), tasks);
    let incoming = futures::stream::unfold(entrance, |mut entrance| async move {
        let (stream, _) = entrance.next().await?;
        Some((Ok::<_, std::io::Error>(stream), entrance))
    });
    tasks.spawn("grpc-server", |stop| async move {
        if let Err(error) = server.serve_with_incoming_shutdown(incoming, stop.cancelled_owned()).await {
            error!(%error, "the gRPC listener failed");
        }
    });
}

/// Serves HTTP until the tasks stop.
pub(crate) fn serve_http(
    name: &'static str,
    listener: TcpListener,
    tls: Option<&ClientTls>,
    router: Router,
    tasks: &Tasks,
) {
    let door = Door::new(name, listener, HTTP_PLACES);
    let mut entrance = Entrance::new(name, door, tls.map(ClientTls::choose), tasks);
    let connections = tasks.clone();
    tasks.spawn(name, |stop| async move {
        while let Some(Some((guest, peer))) = stop.run_until_cancelled(entrance.next()).await {
            let router = router.clone();
            connections.spawn("http-connection", |stop| async move {
                let served = AssertUnwindSafe(serve_connection(guest, peer, router, PATIENCE, stop)).catch_unwind();
                if served.await.is_err() {
                    // What one request brings about is the end of its connection, not of the node.
                    error!(name, %peer, "an HTTP handler panicked");
                }
            });
        }
    });
}

async fn serve_connection<I>(io: I, peer: SocketAddr, router: Router, patience: Patience, stop: Stop)
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let mut request = request.map(axum::body::Body::new);
        request.extensions_mut().insert(ConnectInfo(peer));
        router.clone().oneshot(request)
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(patience.head);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .max_concurrent_streams(STREAMS);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(io), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        () = stop.cancelled() => None,
        () = tokio::time::sleep(patience.age) => None,
    };
    let ended = if let Some(ended) = ended {
        Ok(ended)
    } else {
        connection.as_mut().graceful_shutdown();
        tokio::time::timeout(patience.last, connection).await
    };
    if let Ok(Err(error)) = ended {
        debug!(%peer, %error, "an HTTP connection broke off");
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    const LONG: Duration = Duration::from_hours(1);
    const SHORT: Duration = Duration::from_millis(1);
    const PEER: SocketAddr = SocketAddr::V4(std::net::SocketAddrV4::new(std::net::Ipv4Addr::LOCALHOST, 1));

    fn router() -> Router {
        Router::new().route("/", get(async |ConnectInfo(peer): ConnectInfo<SocketAddr>| peer.to_string()))
    }

    #[tokio::test]
    async fn a_request_is_answered_and_its_handler_knows_who_asks() {
        let (mut client, server) = tokio::io::duplex(4096);
        client.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        let patience = Patience { head: LONG, age: LONG, last: LONG };
        serve_connection(server, PEER, router(), patience, Stop::new()).await;
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("127.0.0.1:1"), "{answer}");
    }

    #[tokio::test]
    async fn a_connection_ends_whatever_its_client_withholds() {
        let cases: [(&[u8], Patience); 3] = [
            (b"GET / HTTP/1.1\r\nhost: x\r\nx-slow: ", Patience { head: SHORT, age: LONG, last: LONG }),
            (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", Patience { head: SHORT, age: LONG, last: LONG }),
            (b"GET / HTTP/1.1\r\nhost: x\r\nx-slow: ", Patience { head: LONG, age: SHORT, last: SHORT }),
        ];
        for (sent, patience) in cases {
            let (mut client, server) = tokio::io::duplex(4096);
            client.write_all(sent).await.unwrap();
            // Returns, though the client neither goes on nor goes away.
            serve_connection(server, PEER, router(), patience, Stop::new()).await;
        }
        let (mut client, server) = tokio::io::duplex(4096);
        client.write_all(b"POST").await.unwrap();
        let stop = Stop::new();
        stop.cancel();
        serve_connection(server, PEER, router(), Patience { head: LONG, age: LONG, last: SHORT }, stop).await;
    }
}
