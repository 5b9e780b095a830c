//! The listeners that clients and operators use.

use std::time::Duration;

use axum::Router;
use ensign_raft::env::Tasks;
use futures::StreamExt as _;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::service::Routes;
use tonic::transport::Server;
use tracing::error;

/// Serves gRPC until the tasks stop; calls in progress then end by themselves (streams watch the node's phase).
pub(crate) fn serve_grpc(listener: TcpListener, routes: Routes, tasks: &Tasks) {
    let server = Server::builder()
        .initial_stream_window_size(8 << 20)
        .initial_connection_window_size(16 << 20)
        .max_frame_size(1 << 20)
        // Each stream costs memory: a client that wants more opens another connection.
        .max_concurrent_streams(1024)
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .http2_keepalive_timeout(Some(Duration::from_secs(20)))
        .tcp_nodelay(true)
        .add_routes(routes);
    let incoming = TcpListenerStream::new(listener).map(|connection| {
        connection.inspect(|stream| {
            // Acks are small and must not wait for one another.
            let _ = stream.set_nodelay(true);
        })
    });
    tasks.spawn("grpc-server", |stop| async move {
        if let Err(error) = server.serve_with_incoming_shutdown(incoming, stop.cancelled_owned()).await {
            error!(%error, "the gRPC listener failed");
        }
    });
}

/// Serves HTTP until the tasks stop.
pub(crate) fn serve_http(name: &'static str, listener: TcpListener, router: Router, tasks: &Tasks) {
    tasks.spawn(name, |stop| async move {
        let service = router.into_make_service_with_connect_info::<std::net::SocketAddr>();
        if let Err(error) = axum::serve(listener, service).with_graceful_shutdown(stop.cancelled_owned()).await {
            error!(%error, name, "an HTTP listener failed");
        }
    });
}
