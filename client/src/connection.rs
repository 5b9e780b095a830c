//! The way to the cluster: HTTP/2 channels to its nodes, and calls that survive one of them.

use std::future::Future;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Request, Response, Status};

use crate::backoff::Backoff;
use crate::error::{CallError, ConnectError, chain, is_broken_connection, is_never_sent, speaks_no_tls};
use crate::options::{BeginWith, Options};
use crate::random;
use crate::token::TokenSource;

/// Room for many events in flight: with the protocol's own 64 KiB a stream reaches half the throughput.
const STREAM_WINDOW: u32 = 8 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
const FRAME: u32 = 1 << 20;
/// The largest event is 5,243,000 bytes; wrapped, it must still fit.
pub(crate) const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// Whether a call may be sent a second time when nobody knows what became of the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Repeat {
    /// It changes nothing, or nothing more the second time.
    Harmless,
    /// Only if it certainly did not reach a server.
    OnlyIfUnsent,
}

/// Channels to every configured node and the token to use them with.
pub(crate) struct Connection {
    channels: Vec<Channel>,
    current: AtomicUsize,
    pub(crate) tokens: TokenSource,
    pub(crate) client_id: String,
    call_timeout: Duration,
}

impl Connection {
    pub(crate) fn new(options: Options) -> Result<Self, ConnectError> {
        if options.endpoints.is_empty() {
            return Err(ConnectError::Missing { what: "endpoint" });
        }
        if options.auth_urls.is_empty() {
            return Err(ConnectError::Missing { what: "auth URL" });
        }
        let pem = options.ca_file.as_deref().map(read_certificates).transpose()?;
        let channels: Vec<Channel> = options
            .endpoints
            .iter()
            .map(|address| channel(address, &options, pem.as_deref()))
            .collect::<Result<_, _>>()?;
        for url in &options.auth_urls {
            let valid = reqwest::Url::parse(url).is_ok_and(|url| matches!(url.scheme(), "http" | "https"));
            if !valid {
                let what = "auth URL (http://… or https://…)";
                return Err(ConnectError::Address { what, address: url.clone() });
            }
        }
        let http = http_client(&options, pem.as_deref())?;
        let begin = |length| match options.begin_with {
            BeginWith::Any => random::place(length),
            BeginWith::First => 0,
        };
        let mut auth_urls = options.auth_urls;
        let first = begin(auth_urls.len());
        auth_urls.rotate_left(first);
        let tokens = TokenSource::new(http, auth_urls, options.credentials, options.connect_timeout);
        Ok(Self {
            current: AtomicUsize::new(begin(channels.len())),
            channels,
            tokens,
            client_id: options.client_id,
            call_timeout: options.call_timeout,
        })
    }

    /// The channel to use now, and its number for [`Connection::avoid`].
    pub(crate) fn channel(&self) -> (usize, Channel) {
        let number = self.current.load(Ordering::Relaxed) % self.channels.len();
        (number, self.channels[number].clone())
    }

    /// Moves on to the next node, unless someone else did since `number` was given out.
    pub(crate) fn avoid(&self, number: usize) {
        let next = (number + 1) % self.channels.len();
        // Lost the race: the other caller has moved on already, which is what we wanted.
        let _ = self.current.compare_exchange(number, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// How long one call may take, retries included.
    pub(crate) fn call_timeout(&self) -> Duration {
        self.call_timeout
    }

    /// `message` with our token.
    pub(crate) fn authorize<T>(message: T, bearer: MetadataValue<Ascii>) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", bearer);
        request
    }

    /// Makes one unary call, or opens one reply stream: with a token, over any node that can be reached, until the time is up.
    pub(crate) async fn call<T, R, F>(
        &self,
        repeat: Repeat,
        message: T,
        send: impl Fn(Channel, Request<T>) -> F,
    ) -> Result<R, CallError>
    where
        T: Clone,
        F: Future<Output = Result<Response<R>, Status>>,
    {
        self.call_within(self.call_timeout, repeat, message, send).await
    }

    /// [`Connection::call`] for what takes its own time.
    pub(crate) async fn call_within<T, R, F>(
        &self,
        timeout: Duration,
        repeat: Repeat,
        message: T,
        send: impl Fn(Channel, Request<T>) -> F,
    ) -> Result<R, CallError>
    where
        T: Clone,
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let deadline = Instant::now() + timeout;
        let mut backoff = Backoff::reconnect();
        let mut fresh_token_tried = false;
        loop {
            let bearer = self.tokens.bearer().await?;
            let (number, channel) = self.channel();
            let mut request = Self::authorize(message.clone(), bearer.clone());
            request.set_timeout(deadline.saturating_duration_since(Instant::now()));
            let status = match timeout_at(deadline, send(channel, request)).await {
                Ok(Ok(response)) => return Ok(response.into_inner()),
                Ok(Err(status)) => status,
                Err(_) => return Err(out_of_time(timeout, repeat)),
            };
            if status.code() == Code::Unauthenticated && !fresh_token_tried {
                fresh_token_tried = true;
                self.tokens.reject(&bearer);
                continue;
            }
            if is_broken_connection(&status) {
                self.avoid(number);
            }
            let transient =
                (status.code() == Code::Unavailable || is_broken_connection(&status)) && !speaks_no_tls(&status);
            // The server's own UNAVAILABLE promises that nothing was done; the transport's promises nothing.
            let undone = is_never_sent(&status) || !is_broken_connection(&status);
            let again = transient && (repeat == Repeat::Harmless || undone);
            let pause = backoff.delay();
            if !again && transient {
                return Err(CallError::OutcomeUnknown { message: status.message().to_owned() });
            }
            if repeat == Repeat::Harmless && matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled) {
                // Nothing was to be done, so there is no outcome that somebody could not know.
                return Err(out_of_time(timeout, repeat));
            }
            if !again || Instant::now() + pause >= deadline {
                return Err(status.into());
            }
            sleep(pause).await;
        }
    }
}

fn out_of_time(timeout: Duration, repeat: Repeat) -> CallError {
    let message = format!("no answer within {timeout:?}");
    match repeat {
        Repeat::Harmless => CallError::Unavailable { message },
        Repeat::OnlyIfUnsent => CallError::OutcomeUnknown { message },
    }
}

fn read_certificates(path: &Path) -> Result<Vec<u8>, ConnectError> {
    std::fs::read(path).map_err(|error| ConnectError::Certificates { path: path.to_owned(), cause: error.to_string() })
}

fn channel(address: &str, options: &Options, ca: Option<&[u8]>) -> Result<Channel, ConnectError> {
    let invalid = || ConnectError::Address { what: "endpoint (host:port)", address: address.to_owned() };
    let authority: http::uri::Authority = address.parse().map_err(|_| invalid())?;
    if authority.port_u16().is_none() || address.contains('@') {
        return Err(invalid());
    }
    let scheme = if options.insecure { "http" } else { "https" };
    let mut endpoint = Endpoint::from_shared(format!("{scheme}://{authority}"))
        .map_err(|_| invalid())?
        .connect_timeout(options.connect_timeout)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .tcp_nodelay(true)
        // A node that is paused or cut off closes nothing: only unanswered pings tell.
        .http2_keep_alive_interval(Duration::from_secs(5))
        .keep_alive_timeout(Duration::from_secs(5));
    if !options.insecure {
        let mut tls = ClientTlsConfig::new().with_native_roots();
        if let Some(pem) = ca {
            tls = tls.ca_certificate(Certificate::from_pem(pem));
        }
        endpoint = endpoint.tls_config(tls).map_err(|error| ConnectError::Tls { cause: chain(&error) })?;
    }
    Ok(endpoint.connect_lazy())
}

fn http_client(options: &Options, ca: Option<&[u8]>) -> Result<reqwest::Client, ConnectError> {
    let mut builder = reqwest::Client::builder()
        .user_agent(options.client_id.clone())
        .connect_timeout(options.connect_timeout)
        // A login is never redirected: it would carry the secret elsewhere.
        .redirect(reqwest::redirect::Policy::none());
    if let (Some(pem), Some(path)) = (ca, &options.ca_file) {
        let certificates = reqwest::Certificate::from_pem_bundle(pem)
            .map_err(|error| ConnectError::Certificates { path: path.clone(), cause: chain(&error) })?;
        builder = builder.tls_certs_merge(certificates);
    }
    builder.build().map_err(|error| ConnectError::Tls { cause: chain(&error) })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::credentials::Credentials;

    const NODES: usize = 4;

    /// A client of four nodes; nothing is sent.
    fn client(begin_with: BeginWith) -> Connection {
        let mut options = Options { begin_with, ..Options::new(Credentials::new("id", "secret")) };
        options.endpoints = (1..=NODES).map(|node| format!("node-{node}:5356")).collect();
        options.auth_urls = (1..=NODES).map(|node| format!("http://node-{node}:8088")).collect();
        Connection::new(options).unwrap()
    }

    #[tokio::test]
    async fn clients_with_the_same_list_begin_at_different_nodes_and_go_round_all() {
        let (mut endpoints, mut urls) = (BTreeSet::new(), BTreeSet::new());
        // That one of the four is never drawn happens once in ten billion runs.
        for _ in 0..90 {
            let client = client(BeginWith::Any);
            endpoints.insert(client.channel().0);
            urls.insert(client.tokens.urls()[0].clone());
            let round = (0..NODES).map(|_| {
                let number = client.channel().0;
                client.avoid(number);
                number
            });
            assert_eq!(round.collect::<BTreeSet<_>>(), (0..NODES).collect(), "a node is passed over");
            assert_eq!(client.tokens.urls().iter().collect::<BTreeSet<_>>().len(), NODES);
        }
        assert_eq!((endpoints.len(), urls.len()), (NODES, NODES));
    }

    #[tokio::test]
    async fn a_client_begins_with_the_first_node_of_its_list_if_it_is_told_to() {
        for _ in 0..20 {
            let client = client(BeginWith::First);
            assert_eq!((client.channel().0, &*client.tokens.urls()[0]), (0, "http://node-1:8088"));
        }
    }
}
