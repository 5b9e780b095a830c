//! The catalog: its state machine against a model, its bytes, and what its commands promise.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use ensign_proto::{
    ApiKeyId, ClusterVersion, GroupId, LogIndex, NodeId, OrgId, PermissionSet, ProjectId, RingId, Term, TopicId,
    TopicName,
};
use ensign_raft::env::UnixNanos;
use ensign_raft::{CommittedEntry, StateMachine as _};
use ensign_storage::EntryId;

use self::commands::{sample, sample_commands};
use super::command::NewTopic;
use super::*;

mod commands;
mod model;
mod nodes;
mod stored;
mod topics;
mod version;

fn at(n: u8) -> UnixNanos {
    UnixNanos(1_700_000_000_000_000_000 + u64::from(n))
}

fn org(n: u8) -> OrgId {
    OrgId::from_bytes([n; 16])
}

fn project(n: u8) -> ProjectId {
    ProjectId::from_bytes([n; 16])
}

fn topic(n: u8) -> TopicId {
    TopicId::from_bytes([n; 16])
}

fn ring(n: u8) -> RingId {
    RingId::from_bytes([n; 16])
}

fn name(n: u8) -> TopicName {
    format!("topic-{n}").parse().unwrap()
}

fn nodes(n: u8) -> std::collections::BTreeSet<NodeId> {
    (1..=u64::from(n)).map(NodeId).collect()
}

fn policies(n: u8) -> TopicPolicies {
    TopicPolicies { deduplication: Bytes::from(vec![n; usize::from(n)]), sharding: i32::from(n) }
}

fn api_key(n: u8, client: u8, owner: u8, works_in: Option<u8>) -> ApiKey {
    ApiKey {
        id: ApiKeyId::from_bytes([n; 16]),
        client_id: format!("client-{client}"),
        name: "key".to_owned(),
        org: org(owner),
        project: works_in.map(project),
        permissions: PermissionSet::api_key(),
        admin: works_in.is_none(),
        created: at(n),
        revoked_at: None,
        ring: None,
        shredded: false,
    }
}

fn node(id: u64, name: &str, incarnation: u64, process: u64) -> NodeRecord {
    NodeRecord {
        id: NodeId(id),
        peer: format!("{name}:5357"),
        name: name.to_owned(),
        region: "eu".to_owned(),
        zone: "eu-1".to_owned(),
        incarnation,
        process,
        ..NodeRecord::default()
    }
}

fn join_token(n: u8, uses: u32) -> JoinToken {
    JoinToken { id: [n; 16], hash: [n; 32], created: at(0), expires: at(100), uses, used: 0, revoked_at: None }
}

fn join(token: u8, key: u8, name: &str) -> Join {
    Join {
        token: [token; 16],
        key: [key; 32],
        name: name.to_owned(),
        region: "eu".to_owned(),
        zone: "eu-1".to_owned(),
        peer: format!("{}:5357", key % 5),
        above: NodeId(2),
        version: ClusterVersion::V2,
        at: at(key),
    }
}

fn signing_key(n: u8, public: u8) -> SigningKey {
    let public_key = Bytes::from(vec![public; 3]);
    SigningKey { kid: [n; 16], public_key, created: at(n), signs_from: at(n), verifies_until: None }
}

fn new_topic(n: u8, owner: u8, title: u8) -> NewTopic {
    NewTopic {
        id: topic(n),
        project: project(owner),
        name: name(title),
        ring: ring(owner),
        replicas: nodes(n),
        // As before placement was kept: the stored bytes below show that these are still what they were.
        placement: Placement::default(),
        policies: policies(n),
        at: at(n),
    }
}

fn entry(index: usize, payload: Bytes) -> CommittedEntry {
    CommittedEntry { id: EntryId { term: Term(1), index: LogIndex(index as u64 + 1) }, payload }
}

#[test]
fn a_replica_that_cannot_read_an_entry_stands_still() {
    let mut machine = sample();
    let (view, before) = (machine.view(), machine.snapshot());
    assert_eq!(view.stuck(), None);
    assert_eq!(machine.apply(&entry(50, Bytes::from_static(b"\x02what"))), Err(Refusal::Unreadable));
    assert_eq!(view.stuck(), Some(LogIndex(51)));
    let fine = Command::CreateOrganization { id: org(5), name: "later".to_owned(), at: at(5) };
    assert_eq!(machine.apply(&entry(51, fine.encode())), Err(Refusal::Unreadable));
    let (mut other, _) = CatalogMachine::new();
    other.restore(&before).unwrap();
    assert_eq!(view.organizations(), other.view().organizations());
}

#[test]
fn whoever_watches_is_woken_after_the_change() {
    let (mut machine, view) = CatalogMachine::new();
    let mut changes = view.changes();
    changes.mark_unchanged();
    machine.apply(&entry(4, sample_commands()[1].encode())).unwrap();
    assert!(changes.has_changed().unwrap());
    assert_eq!(*changes.borrow_and_update(), LogIndex(5));
    assert_eq!(view.organizations().len(), 1);
}
