//! One end of a pipe, played by hand.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::{ClusterVersion, GroupId, NodeId, Term};
use ensign_storage::{MemoryLog, NodeLog as _};
use futures::future::BoxFuture;
use openraft::EntryPayload;
use openraft::raft::{StreamAppendError, VoteRequest};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::config::{GroupSpec, Mode, RuntimeConfig, Timing};
use crate::env::{Lane, Pipe, SeededRng, SystemClock, Tasks, Transport, TransportError};
use crate::liveness::Liveness;
use crate::net::message::{self, Answer, Body, Frame, Message, Refusal, Request};
use crate::net::serve::{Local, serve};
use crate::net::sleeper::Sleeper;
use crate::runtime::Runtime;
use crate::testing::{Journal, MemoryNet, quick};
use crate::types::{AppendRequest, LogId, RaftEntry, Vote};

/// A peer that writes its frames itself.
struct Peer {
    to: mpsc::Sender<Bytes>,
    from: mpsc::Receiver<Bytes>,
    runtime: Runtime,
}

fn node_1_hears_node(peer: u64) -> Peer {
    let net = MemoryNet::new();
    let rng = Arc::new(SeededRng::new(1));
    let runtime = Runtime::new(quick(NodeId(1)), net.transport(NodeId(1)), Arc::new(SystemClock), rng, Tasks::new());
    let ((to, incoming), (outgoing, from)) = (mpsc::channel(8), mpsc::channel(8));
    runtime.accept(NodeId(peer), Lane::Control, Pipe { outgoing, incoming, version: ClusterVersion::NEWEST });
    Peer { to, from, runtime }
}

impl Peer {
    async fn send(&self, request: Request) {
        self.to.send(framed(7, request)).await.unwrap();
    }

    /// The next answer, or `None` when the pipe was closed.
    async fn answer(&mut self) -> Option<(u64, Answer)> {
        let frame = timeout(Duration::from_secs(5), self.from.recv()).await.expect("an answer, or the end")?;
        Some(answers(frame).remove(0))
    }
}

fn framed(call: u64, request: Request) -> Bytes {
    let mut frame = Frame::new();
    frame.push(&Message { group: GroupId(99), call, body: Body::Request(request) });
    frame.take().0
}

fn answers(frame: Bytes) -> Vec<(u64, Answer)> {
    let answer = |message: Message| {
        let Body::Answer(answer) = message.body else { panic!("a request on a pipe that we opened") };
        (message.call, answer)
    };
    message::decode(frame, Vec::new()).unwrap().into_iter().map(answer).collect()
}

#[tokio::test]
async fn a_ping_is_answered_without_a_group() {
    let mut peer = node_1_hears_node(2);
    peer.send(Request::Ping).await;
    assert!(matches!(peer.answer().await, Some((7, Answer::Pong))));
}

#[tokio::test]
async fn a_node_tells_which_of_its_lives_answers() {
    let mut peer = node_1_hears_node(2);
    peer.send(Request::Alive { incarnation: 5 }).await;
    assert!(matches!(peer.answer().await, Some((7, Answer::Alive { incarnation: 1 }))));
}

/// What a peer asks to learn whether this node lives and what it knows of groups that sleep, each with its number.
fn signs_of_life() -> [Request; 4] {
    let sleeper = Sleeper { group: GroupId(99), term: Term(3), last: None };
    [
        Request::Ping,
        Request::Alive { incarnation: 5 },
        Request::Sleep(vec![sleeper.clone()]),
        Request::Check(vec![sleeper]),
    ]
}

#[tokio::test(start_paused = true)]
async fn a_node_whose_threads_are_stuck_gives_no_sign_of_life_until_they_work_again() {
    let tasks = Tasks::new();
    let timing = Timing::LAN;
    let liveness = Liveness::new(NodeId(1), 1, timing, tasks.clone());
    // A pipe that is served, and nothing else that runs.
    let local = Local::new(RuntimeConfig::new(NodeId(1)).limits, liveness.clone(), tasks.clone());
    let ((to, incoming), (outgoing, mut from)) = (mpsc::channel(8), mpsc::channel(8));
    let pipe = Pipe { outgoing, incoming, version: ClusterVersion::NEWEST };
    tasks.spawn("serve", move |stop| async move {
        stop.run_until_cancelled(serve(&local, NodeId(2), Lane::Control, pipe)).await;
    });
    // All of them, and last a vote, which is for the core of a group to answer or not.
    let ask = async || {
        for (call, request) in (1..).zip(signs_of_life()) {
            to.send(framed(call, request)).await.unwrap();
        }
        to.send(framed(9, Request::Vote(VoteRequest::new(Vote::new(3, 2), None)))).await.unwrap();
    };
    let mut hear = async || -> Vec<(u64, Answer)> {
        let mut heard = Vec::new();
        while heard.last().is_none_or(|(call, _)| *call != 9) {
            let frame = timeout(Duration::from_secs(5), from.recv()).await.expect("an answer to the vote");
            heard.extend(answers(frame.expect("the pipe stays open")));
        }
        heard
    };
    let all_answered = |heard: &[(u64, Answer)]| {
        matches!(
            heard,
            [
                (1, Answer::Pong),
                (2, Answer::Alive { incarnation: 1 }),
                (3, Answer::Asleep(_)),
                (4, Answer::Checked(_)),
                (9, Answer::Refused(Refusal::UnknownGroup)),
            ]
        )
    };
    ask().await;
    let heard = hear().await;
    assert!(all_answered(&heard), "{heard:?}");

    tokio::time::advance(timing.election_min * 5).await;
    ask().await;
    let heard = hear().await;
    assert!(matches!(heard[..], [(9, Answer::Refused(Refusal::UnknownGroup))]), "it counts as alive: {heard:?}");

    liveness.pulse();
    ask().await;
    let heard = hear().await;
    assert!(all_answered(&heard), "{heard:?}");
}

#[tokio::test(start_paused = true)]
async fn a_node_at_work_answers_however_long_it_has_run() {
    let mut peer = node_1_hears_node(2);
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_mins(10)).await;
        peer.send(Request::Alive { incarnation: 5 }).await;
        assert!(matches!(peer.answer().await, Some((7, Answer::Alive { incarnation: 1 }))));
    }
}

#[tokio::test]
async fn a_request_of_a_newer_peer_is_refused_and_the_pipe_stays_open() {
    let mut peer = node_1_hears_node(2);
    peer.send(Request::Unknown { kind: 0x7f }).await;
    assert!(matches!(peer.answer().await, Some((7, Answer::Refused(Refusal::UnknownKind)))));
    peer.send(Request::Ping).await;
    assert!(matches!(peer.answer().await, Some((7, Answer::Pong))));
}

#[tokio::test]
async fn a_request_for_a_group_that_is_not_here_says_so() {
    let mut peer = node_1_hears_node(2);
    peer.send(Request::Vote(VoteRequest::new(Vote::new(3, 2), None))).await;
    assert!(matches!(peer.answer().await, Some((7, Answer::Refused(Refusal::UnknownGroup)))));
}

#[tokio::test]
async fn a_peer_that_speaks_for_another_node_loses_its_pipe() {
    let mut peer = node_1_hears_node(2);
    peer.send(Request::Vote(VoteRequest::new(Vote::new(3, 3), None))).await;
    assert!(peer.answer().await.is_none());
}

#[tokio::test]
async fn a_peer_that_sends_garbage_loses_its_pipe() {
    for garbage in [&b"\x01"[..], b"\x02\0\0", b"\x01\0\0\0\0\0\x01\xff", b"\x01\0\0", b""] {
        let mut peer = node_1_hears_node(2);
        peer.to.send(Bytes::copy_from_slice(garbage)).await.unwrap();
        assert!(peer.answer().await.is_none(), "{garbage:?}");
    }
}

#[tokio::test]
async fn a_peer_that_leads_or_stands_in_a_term_that_is_over_changes_nothing_and_hears_of_the_newer_one() {
    let mut peer = node_1_hears_node(2);
    let log = MemoryLog::new();
    let spec = GroupSpec { id: GroupId(99), voters: BTreeSet::new(), mode: Mode::Member };
    peer.runtime.start(spec, log.group(GroupId(99)), Journal::default()).await.unwrap();
    let blank = |term| {
        let (id, payload) = (LogId::new_term_index(term, 0), EntryPayload::Blank);
        let request = AppendRequest {
            vote: Vote::new_committed(term, 2),
            prev_log_id: None,
            entries: vec![RaftEntry { log_id: id, payload }],
            leader_commit: None,
        };
        Request::Append { stream: 0, request }
    };
    peer.send(blank(5)).await;
    let first = peer.answer().await;
    assert!(matches!(first, Some((7, Answer::Append(Ok(_))))), "term 5 is the first it hears of: {first:?}");
    let held = log.group(GroupId(99)).state();

    let newer = Vote::new_committed(5, 2);
    peer.send(blank(3)).await;
    let Some((7, Answer::Append(Err(StreamAppendError::HigherVote(told))))) = peer.answer().await else {
        panic!("an old leader was heard")
    };
    assert_eq!(told, newer);
    peer.send(Request::Vote(VoteRequest::new(Vote::new(4, 2), Some(LogId::new_term_index(4, 9))))).await;
    let Some((7, Answer::Vote(answer))) = peer.answer().await else { panic!("no answer to a candidate") };
    assert!(!answer.vote_granted && answer.vote == newer, "{answer:?}");
    assert_eq!(log.group(GroupId(99)).state(), held, "its log and vote are as they were");
}

/// Pipes to a peer that says it speaks this, and what comes out of them.
struct Dialled {
    version: ClusterVersion,
    ends: mpsc::UnboundedSender<(mpsc::Sender<Bytes>, mpsc::Receiver<Bytes>)>,
}

impl Transport for Dialled {
    fn connect(&self, _peer: NodeId, _lane: Lane) -> BoxFuture<'static, Result<Pipe, TransportError>> {
        let ((outgoing, theirs), (to, incoming)) = (mpsc::channel(8), mpsc::channel(8));
        let _ = self.ends.send((to, theirs));
        let version = self.version;
        Box::pin(async move { Ok(Pipe { outgoing, incoming, version }) })
    }
}

/// What node 1 asks node 2 first, and the pipe to answer on.
async fn first_question_to(version: ClusterVersion) -> (Runtime, Message, mpsc::Sender<Bytes>) {
    let (ends, mut dialled) = mpsc::unbounded_channel();
    let rng = Arc::new(SeededRng::new(1));
    let transport = Arc::new(Dialled { version, ends });
    let runtime = Runtime::new(quick(NodeId(1)), transport, Arc::new(SystemClock), rng, Tasks::new());
    runtime.watch_peers([NodeId(2)].into());
    let (to, mut from) = timeout(Duration::from_secs(5), dialled.recv()).await.unwrap().unwrap();
    let frame = timeout(Duration::from_secs(5), from.recv()).await.unwrap().unwrap();
    (runtime, message::decode(frame, Vec::new()).unwrap().remove(0), to)
}

#[tokio::test]
async fn a_peer_of_the_first_version_is_asked_only_what_it_knows_and_counts_as_alive() {
    let (_runtime, asked, _to) = first_question_to(ClusterVersion::V2).await;
    assert!(matches!(asked.body, Body::Request(Request::Alive { incarnation: 1 })));

    let (runtime, asked, to) = first_question_to(ClusterVersion::V1).await;
    assert!(matches!(asked.body, Body::Request(Request::Ping)), "{asked:?}");
    let mut frame = Frame::new();
    frame.push(&Message { body: Body::Answer(Answer::Pong), ..asked });
    to.send(frame.take().0).await.unwrap();
    let mut changes = runtime.liveness().changes();
    timeout(Duration::from_secs(5), changes.wait_for(|_| runtime.liveness().is_alive(NodeId(2))))
        .await
        .unwrap()
        .unwrap();
}
