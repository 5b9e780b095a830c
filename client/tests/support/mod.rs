//! A small server that misbehaves on demand: what a client must survive, without a cluster.
#![allow(dead_code, reason = "every test file uses its own part")]
#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use ensign_client::{Client, Credentials, Options};
use ensign_proto::pb::ensign::v1beta1 as pb;
use ensign_proto::pb::ensign::v1beta1::ensign_server::{Ensign, EnsignServer};
use ensign_proto::{Rlid, TopicId};
use futures::{Stream, StreamExt as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

/// Where a server stands that has forgotten a session, in milliseconds: far in the future.
pub(crate) const SESSION_AFTER: u64 = 4_000_000_000_000;
pub(crate) const TOPIC: TopicId = TopicId::from_bytes([7; 16]);

/// What the server holds and how it shall fail next.
#[derive(Default)]
pub(crate) struct State {
    /// Stored events: producer session, sequence, bytes.
    pub(crate) stored: Vec<(Bytes, u64, Bytes)>,
    /// Every event that arrived, also those that were stored before.
    pub(crate) arrived: u64,
    /// For each publish stream to come: after how many events it breaks, storing the last one but answering none of a batch.
    pub(crate) break_publish_after: VecDeque<u64>,
    /// For each publish stream to come: after how many events it has forgotten the session, storing nothing more.
    pub(crate) forget_session_after: VecDeque<u64>,
    /// Stores, but answers nothing.
    pub(crate) mute: bool,
    /// Sequences to refuse.
    pub(crate) refuse: Vec<u64>,
    /// For each subscribe stream to come: after how many events it breaks.
    pub(crate) break_subscribe_after: VecDeque<u64>,
    /// Refuses every stream that is opened.
    pub(crate) away: bool,
    /// Offsets that are skipped when delivering.
    pub(crate) skip: Vec<u64>,
    /// Delivers this many of the newest events a second time on a resumed stream.
    pub(crate) repeat: u64,
    /// Starts that subscribers asked for.
    pub(crate) starts: Vec<Option<pb::subscription::Start>>,
    /// Every token that calls carried.
    pub(crate) seen: Vec<String>,
    /// Tokens that are refused.
    pub(crate) rejected: Vec<String>,
    /// How long access tokens live, in seconds.
    pub(crate) token_life: u64,
    /// How many calls `Status` answers UNAVAILABLE before it works.
    pub(crate) unavailable: u64,
    /// Every client id and secret that tried to log in, and every refresh.
    pub(crate) logins: Vec<String>,
    /// Login replies to give before working: HTTP status lines.
    pub(crate) login_failures: VecDeque<&'static str>,
}

/// A running server. It ends with the value.
pub(crate) struct Server {
    pub(crate) state: Arc<Mutex<State>>,
    pub(crate) grpc: SocketAddr,
    pub(crate) http: SocketAddr,
    tasks: JoinSet<()>,
}

#[derive(Clone)]
struct Service(Arc<Mutex<State>>);

static TOKENS: AtomicU64 = AtomicU64::new(1);

impl Server {
    pub(crate) async fn start() -> Self {
        let state = Arc::new(Mutex::new(State { token_life: 3600, ..State::default() }));
        let grpc = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let http = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (grpc_addr, http_addr) = (grpc.local_addr().unwrap(), http.local_addr().unwrap());
        let mut tasks = JoinSet::new();
        let service = EnsignServer::new(Service(Arc::clone(&state)));
        tasks.spawn(async move {
            let router = tonic::transport::Server::builder().add_service(service);
            router.serve_with_incoming(TcpListenerStream::new(grpc)).await.unwrap();
        });
        let login_state = Arc::clone(&state);
        tasks.spawn(async move {
            loop {
                let (stream, _) = http.accept().await.unwrap();
                // One at a time is enough, and shows that logins are not made twice.
                let _ = answer_login(stream, &login_state).await;
            }
        });
        Self { state, grpc: grpc_addr, http: http_addr, tasks }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn options(&self) -> Options {
        let mut options = Options::new(Credentials::new("id", "secret"));
        options.endpoints = vec![self.grpc.to_string()];
        options.auth_urls = vec![format!("http://{}", self.http)];
        options.call_timeout = Duration::from_secs(10);
        options
    }

    pub(crate) fn client(&self) -> Client {
        Client::connect(self.options()).unwrap()
    }

    /// The payload of every stored event, in order.
    pub(crate) fn payloads(&self) -> Vec<String> {
        let state = self.state();
        let events = state.stored.iter().map(|(_, _, event)| ensign_client::Event::decode(event.clone()).unwrap());
        events.map(|event| String::from_utf8(event.data.to_vec()).unwrap()).collect()
    }
}

async fn answer_login(mut stream: tokio::net::TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut request = Vec::new();
    let body = loop {
        let mut chunk = [0; 4096];
        let read = stream.read(&mut chunk).await?;
        request.extend_from_slice(&chunk[..read]);
        let text = String::from_utf8_lossy(&request).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length =
                head.to_lowercase().lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
            if body.len() >= length.unwrap_or(0) {
                break body.to_owned();
            }
        }
        if read == 0 {
            return Ok(());
        }
    };
    let (status, reply) = {
        let mut state = state.lock().unwrap();
        state.logins.push(body.clone());
        let body: serde_json::Value = serde_json::from_str(&body).unwrap_or_default();
        match state.login_failures.pop_front() {
            Some(status) => (status, r#"{"success":false,"error":"as told"}"#.to_owned()),
            None if body["client_secret"] == "secret" || body["refresh_token"].is_string() => {
                ("200 OK", tokens(state.token_life))
            }
            None => ("403 Forbidden", r#"{"success":false,"error":"invalid credentials"}"#.to_owned()),
        }
    };
    let answer = format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{reply}",
        reply.len()
    );
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await
}

/// Access and refresh token; the access token's last part makes each one different.
fn tokens(life: u64) -> String {
    // The year 2001: a client that trusted its wall clock would find every token expired.
    let now = 1_000_000_000;
    let jwt = |payload: serde_json::Value| {
        let number = TOKENS.fetch_add(1, Ordering::Relaxed);
        format!("e30.{}.{number}", URL_SAFE_NO_PAD.encode(payload.to_string()))
    };
    let access = jwt(serde_json::json!({"iat": now, "nbf": now, "exp": now + life}));
    let refresh = jwt(serde_json::json!({"iat": now, "nbf": now + life / 2, "exp": now + 2 * life}));
    serde_json::json!({"access_token": access, "refresh_token": refresh}).to_string()
}

impl Service {
    fn check<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let token = request.metadata().get("authorization").and_then(|value| value.to_str().ok()).unwrap_or_default();
        let mut state = self.0.lock().unwrap();
        let rejected = state.rejected.iter().any(|it| it == token);
        state.seen.push(token.to_owned());
        if token.is_empty() || rejected { Err(Status::unauthenticated("invalid credentials")) } else { Ok(()) }
    }
}

fn ready() -> pb::StreamReady {
    let topics = HashMap::from([("topic".to_owned(), Bytes::copy_from_slice(TOPIC.as_bytes()))]);
    pb::StreamReady { topics, ..pb::StreamReady::default() }
}

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Ensign for Service {
    type PublishStream = Replies<pb::PublisherReply>;
    type SubscribeStream = Replies<pb::SubscribeReply>;
    type EnSQLStream = Replies<pb::EventWrapper>;

    async fn publish(
        &self,
        request: Request<Streaming<pb::PublisherRequest>>,
    ) -> Result<Response<Self::PublishStream>, Status> {
        use pb::publisher_reply::Embed as Out;
        use pb::publisher_request::Embed as In;
        self.check(&request)?;
        let mut requests = request.into_inner();
        let Some(In::OpenStream(open)) = requests.message().await?.and_then(|it| it.embed) else {
            return Err(Status::failed_precondition("open first"));
        };
        let break_after = self.0.lock().unwrap().break_publish_after.pop_front();
        let forget_after = self.0.lock().unwrap().forget_session_after.pop_front();
        let state = Arc::clone(&self.0);
        let (replies, stream) = mpsc::channel(64);
        let _ = replies.send(Ok(pb::PublisherReply { embed: Some(Out::Ready(ready())) })).await;
        let work = async move {
            let mut count = 0;
            while let Ok(Some(message)) = requests.message().await {
                let Some(In::Event(event)) = message.embed else { continue };
                if forget_after == Some(count) {
                    let mut status = Status::aborted("the producer session is no longer remembered");
                    status.metadata_mut().insert("ensign-session-after", SESSION_AFTER.into());
                    let _ = replies.send(Err(status)).await;
                    return;
                }
                count += 1;
                let answer = {
                    let mut state = state.lock().unwrap();
                    state.arrived += 1;
                    if state.refuse.contains(&event.producer_sequence) {
                        Out::Nack(pb::Nack {
                            id: event.local_id.clone(),
                            code: pb::nack::Code::TopicArchived as i32,
                            error: "archived".to_owned(),
                        })
                    } else {
                        let place = |(session, sequence, _): &(Bytes, u64, Bytes)| {
                            *session == open.producer_session && *sequence == event.producer_sequence
                        };
                        let offset = state.stored.iter().position(place).unwrap_or_else(|| {
                            state.stored.push((open.producer_session.clone(), event.producer_sequence, event.event));
                            state.stored.len() - 1
                        });
                        Out::Ack(pb::Ack {
                            id: event.local_id.clone(),
                            offset: offset as u64 + 1,
                            ..pb::Ack::default()
                        })
                    }
                };
                if break_after == Some(count) {
                    // The event is stored, its answer is lost.
                    let _ = replies.send(Err(Status::unavailable("going away"))).await;
                    return;
                }
                let mute = state.lock().unwrap().mute;
                if !mute && replies.send(Ok(pb::PublisherReply { embed: Some(answer) })).await.is_err() {
                    return;
                }
            }
            let _ = replies
                .send(Ok(pb::PublisherReply { embed: Some(Out::CloseStream(pb::CloseStream::default())) }))
                .await;
        };
        Ok(Response::new(Box::pin(with_work(stream, work))))
    }

    async fn subscribe(
        &self,
        request: Request<Streaming<pb::SubscribeRequest>>,
    ) -> Result<Response<Self::SubscribeStream>, Status> {
        use pb::subscribe_reply::Embed as Out;
        use pb::subscribe_request::Embed as In;
        self.check(&request)?;
        let mut requests = request.into_inner();
        let Some(In::Subscription(subscription)) = requests.message().await?.and_then(|it| it.embed) else {
            return Err(Status::failed_precondition("subscribe first"));
        };
        let (break_after, mut next, mut ready) = {
            let mut state = self.0.lock().unwrap();
            if state.away {
                return Err(Status::unavailable("the node is shutting down"));
            }
            state.starts.push(subscription.start.clone());
            let live = state.stored.len() as u64 + 1;
            let next = match subscription.start {
                Some(pb::subscription::Start::Offset(offset)) => offset.saturating_sub(state.repeat).max(1),
                Some(pb::subscription::Start::Earliest(_)) => 1,
                _ => live,
            };
            (state.break_subscribe_after.pop_front(), next, ready())
        };
        if subscription.start.is_none() {
            ready.next_offsets.insert("topic".to_owned(), next);
        }
        let state = Arc::clone(&self.0);
        let (replies, stream) = mpsc::channel(64);
        let work = async move {
            let _ = replies.send(Ok(pb::SubscribeReply { embed: Some(Out::Ready(ready)) })).await;
            let mut count = 0;
            loop {
                let event = {
                    let state = state.lock().unwrap();
                    if state.skip.contains(&next) {
                        next += 1;
                    }
                    state.stored.get(next as usize - 1).map(|(_, _, event)| event.clone())
                };
                if break_after == Some(count) {
                    let _ = replies.send(Err(Status::unavailable("going away"))).await;
                    return;
                }
                let Some(event) = event else {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    if replies.is_closed() {
                        return;
                    }
                    continue;
                };
                let wrapper = pb::EventWrapper {
                    id: Bytes::copy_from_slice(Rlid::new(1, next as u32).as_bytes()),
                    topic_id: Bytes::copy_from_slice(TOPIC.as_bytes()),
                    offset: next,
                    event,
                    ..pb::EventWrapper::default()
                };
                if replies.send(Ok(pb::SubscribeReply { embed: Some(Out::Event(wrapper)) })).await.is_err() {
                    return;
                }
                (count, next) = (count + 1, next + 1);
            }
        };
        Ok(Response::new(Box::pin(with_work(stream, work))))
    }

    async fn status(&self, request: Request<pb::HealthCheck>) -> Result<Response<pb::ServiceState>, Status> {
        self.check(&request)?;
        let mut state = self.0.lock().unwrap();
        if state.unavailable > 0 {
            state.unavailable -= 1;
            return Err(Status::unavailable("not yet"));
        }
        let status = pb::service_state::Status::Healthy as i32;
        Ok(Response::new(pb::ServiceState { status, version: "fake".to_owned(), ..pb::ServiceState::default() }))
    }

    async fn create_topic(&self, _: Request<pb::Topic>) -> Result<Response<pb::Topic>, Status> {
        let mut state = self.0.lock().unwrap();
        state.arrived += 1;
        Err(Status::deadline_exceeded("who knows"))
    }

    async fn list_topics(&self, request: Request<pb::PageInfo>) -> Result<Response<pb::TopicsPage>, Status> {
        // Three topics on two pages.
        let first: usize = request.into_inner().next_page_token.parse().unwrap_or(0);
        let topic = |number: usize| pb::Topic {
            id: Bytes::copy_from_slice(&[number as u8 + 1; 16]),
            project_id: Bytes::copy_from_slice(&[9; 16]),
            name: format!("topic-{number}"),
            ..pb::Topic::default()
        };
        let topics = (first..(first + 2).min(3)).map(topic).collect();
        let next_page_token = if first == 0 { "2".to_owned() } else { String::new() };
        Ok(Response::new(pb::TopicsPage { topics, next_page_token }))
    }

    async fn en_sql(&self, _: Request<pb::Query>) -> Result<Response<Self::EnSQLStream>, Status> {
        Err(Status::invalid_argument("unknown query"))
    }

    async fn explain(&self, _: Request<pb::Query>) -> Result<Response<pb::QueryExplanation>, Status> {
        Err(Status::unimplemented("explain"))
    }

    async fn retrieve_topic(&self, _: Request<pb::Topic>) -> Result<Response<pb::Topic>, Status> {
        Err(Status::not_found("topic not found"))
    }

    async fn delete_topic(&self, _: Request<pb::TopicMod>) -> Result<Response<pb::TopicStatus>, Status> {
        Err(Status::unimplemented("delete"))
    }

    async fn topic_names(&self, _: Request<pb::PageInfo>) -> Result<Response<pb::TopicNamesPage>, Status> {
        Err(Status::unimplemented("names"))
    }

    async fn topic_exists(&self, _: Request<pb::TopicName>) -> Result<Response<pb::TopicExistsInfo>, Status> {
        Err(Status::deadline_exceeded("who knows"))
    }

    async fn set_topic_policy(&self, _: Request<pb::TopicPolicy>) -> Result<Response<pb::TopicStatus>, Status> {
        Err(Status::unimplemented("policy"))
    }

    async fn info(&self, _: Request<pb::InfoRequest>) -> Result<Response<pb::ProjectInfo>, Status> {
        Err(Status::unimplemented("info"))
    }
}

/// The replies, with the work that makes them: both end with the stream.
fn with_work<T: Send + 'static>(
    replies: mpsc::Receiver<Result<T, Status>>,
    work: impl Future<Output = ()> + Send + 'static,
) -> impl Stream<Item = Result<T, Status>> + Send {
    let mut tasks = JoinSet::new();
    tasks.spawn(work);
    ReceiverStream::new(replies).map(move |reply| {
        let _keep = &tasks;
        reply
    })
}
