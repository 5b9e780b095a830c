//! Commands to try: any, and one of each kind.

use proptest::prelude::*;

use super::*;

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        Just(Change::Keep),
        Just(Change::Unset),
        Just(Change::Set(Limit::Unlimited)),
        (0..3_u64).prop_map(|limit| Change::Set(Limit::At(limit))),
    ]
}

/// Ids and names from a small range, so that commands meet.
pub(super) fn command() -> impl Strategy<Value = Command> {
    let few = 0..4_u8;
    let id = move || few.clone();
    prop_oneof![
        1 => (id(), id()).prop_map(|(n, host)| Command::PutNode(NodeRecord {
            id: NodeId(u64::from(n)),
            peer: format!("host-{host}:5357"),
            name: if host == 0 { String::new() } else { format!("node-{host}") },
            incarnation: u64::from(host),
            process: u64::from(n),
            version: ClusterVersion(1 + u32::from(n) % 3),
            ..NodeRecord::default()
        })),
        1 => (1..3_u32).prop_map(|version| Command::SetClusterVersion(ClusterVersion(version))),
        1 => (id(), id()).prop_map(|(n, name)| Command::CreateOrganization {
            id: org(n),
            name: format!("org-{name}"),
            at: at(n)
        }),
        1 => (id(), id(), id()).prop_map(|(n, owner, name)| Command::CreateProject(Project {
            id: project(n),
            org: org(owner),
            name: format!("project-{name}"),
            ring: ring(n),
            created: at(n),
        })),
        4 => (id(), id(), id()).prop_map(|(n, owner, title)| Command::CreateTopic(new_topic(n, owner, title))),
        2 => proptest::collection::btree_map(id(), (id(), id()), 0..4).prop_map(|topics| {
            let topics = topics.into_iter().map(|(n, (owner, title))| new_topic(n, owner, title));
            Command::CreateTopics(topics.collect())
        }),
        2 => (id(), any::<bool>(), id()).prop_map(|(n, destroy, now)| Command::SetTopicState {
            topic: topic(n),
            state: if destroy { TopicState::Deleting } else { TopicState::Readonly },
            at: at(now),
        }),
        1 => (id(), id(), id()).prop_map(|(n, policy, now)| Command::SetTopicPolicies {
            topic: topic(n),
            policies: policies(policy),
            at: at(now)
        }),
        2 => (id(), id()).prop_map(|(n, now)| Command::FinishDestroy { topic: topic(n), at: at(now) }),
        3 => (id(), id(), id(), proptest::option::of(id()), proptest::option::of(0..6_u8))
            .prop_map(|(n, client, owner, works_in, own)| {
                Command::CreateApiKey(ApiKey { ring: own.map(ring), ..api_key(n, client, owner, works_in) })
            }),
        2 => (id(), 0..6_u8, id()).prop_map(|(n, to, now)| Command::SetTopicRing {
            topic: topic(n),
            ring: ring(to),
            at: at(now)
        }),
        1 => (id(), id()).prop_map(|(n, now)| Command::ShredApiKey { key: ApiKeyId::from_bytes([n; 16]), at: at(now) }),
        1 => (id(), id()).prop_map(|(n, now)| Command::RevokeApiKey { key: ApiKeyId::from_bytes([n; 16]), at: at(now) }),
        1 => (id(), id()).prop_map(|(n, public)| Command::AddSigningKey(signing_key(n, public))),
        1 => (id(), id()).prop_map(|(n, until)| Command::RetireSigningKey { kid: [n; 16], verifies_until: at(until) }),
        1 => (proptest::option::of(id()), change(), change()).prop_map(|(owner, topics, streams)| Command::SetQuota {
            project: owner.map(project),
            change: QuotaChange { topics, streams, ..QuotaChange::default() },
        }),
        1 => (id(), id()).prop_map(|(n, uses)| Command::CreateJoinToken(join_token(n, u32::from(uses)))),
        1 => id().prop_map(|n| Command::RevokeJoinToken { token: [n; 16], at: at(1) }),
        2 => (id(), 0..9_u8, id()).prop_map(|(n, key, name)| {
            Command::Join(join(n, key, &if name == 0 { String::new() } else { format!("node-{name}") }))
        }),
        1 => (0..9_u64).prop_map(|n| Command::RevokeNode { node: NodeId(n), at: at(1) }),
        1 => id().prop_map(|n| {
            Command::SetAuthority(ClusterAuthority { certificate: format!("authority {}", n / 3), created: at(n) })
        }),
    ]
}

pub(super) fn sample() -> CatalogMachine {
    let (mut machine, _) = CatalogMachine::new();
    for (index, command) in sample_commands().iter().enumerate() {
        machine.apply(&entry(index, command.encode())).unwrap();
    }
    machine
}

pub(super) fn sample_commands() -> Vec<Command> {
    vec![
        Command::PutNode(NodeRecord {
            id: NodeId(1),
            peer: "a:5357".to_owned(),
            grpc: "a:5356".to_owned(),
            http: "a:8088".to_owned(),
            ..NodeRecord::default()
        }),
        Command::CreateOrganization { id: org(1), name: "Example".to_owned(), at: at(1) },
        Command::CreateProject(Project {
            id: project(1),
            org: org(1),
            name: "first".to_owned(),
            ring: ring(1),
            created: at(1),
        }),
        Command::CreateTopic(NewTopic {
            id: topic(1),
            project: project(1),
            name: name(1),
            ring: ring(1),
            replicas: nodes(3),
            placement: Placement::default(),
            policies: policies(3),
            at: at(1),
        }),
        Command::CreateTopic(NewTopic {
            id: topic(2),
            project: project(1),
            name: name(2),
            ring: ring(1),
            replicas: nodes(0),
            placement: Placement::default(),
            policies: policies(0),
            at: at(2),
        }),
        Command::SetTopicState { topic: topic(1), state: TopicState::Readonly, at: at(3) },
        Command::SetTopicPolicies { topic: topic(2), policies: policies(2), at: at(3) },
        Command::SetTopicState { topic: topic(2), state: TopicState::Deleting, at: at(4) },
        Command::FinishDestroy { topic: topic(2), at: at(5) },
        Command::CreateApiKey(api_key(1, 1, 1, Some(1))),
        Command::CreateApiKey(api_key(2, 2, 1, None)),
        Command::RevokeApiKey { key: ApiKeyId::from_bytes([1; 16]), at: at(6) },
        Command::AddSigningKey(signing_key(1, 7)),
        Command::RetireSigningKey { kid: [1; 16], verifies_until: at(9) },
        Command::PutNode(node(2, "b", 3, 30)),
        Command::CreateTopics(vec![new_topic(8, 9, 8), new_topic(9, 9, 9)]),
        Command::SetAuthority(ClusterAuthority { certificate: "PEM".to_owned(), created: at(1) }),
        Command::CreateJoinToken(join_token(1, 2)),
        Command::Join(join(1, 1, "c")),
        Command::RevokeJoinToken { token: [1; 16], at: at(8) },
        Command::RevokeNode { node: NodeId(3), at: at(9) },
    ]
}
