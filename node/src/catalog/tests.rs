//! The state machine against a naive model, and its bytes.

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
use proptest::prelude::*;

use super::command::NewTopic;
use super::state::State;
use super::*;

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
        peer: format!("{key}:5357"),
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

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        Just(Change::Keep),
        Just(Change::Unset),
        Just(Change::Set(Limit::Unlimited)),
        (0..3_u64).prop_map(|limit| Change::Set(Limit::At(limit))),
    ]
}

/// Ids and names from a small range, so that commands meet.
fn command() -> impl Strategy<Value = Command> {
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
        2 => (id(), id(), id(), proptest::option::of(id()))
            .prop_map(|(n, client, owner, works_in)| Command::CreateApiKey(api_key(n, client, owner, works_in))),
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

/// What the catalog promises, said as plainly as possible: lists, looked through from the front.
#[derive(Default)]
struct Model {
    orgs: Vec<(OrgId, String)>,
    projects: Vec<Project>,
    topics: Vec<Topic>,
    destroyed: BTreeSet<TopicId>,
    keys: Vec<ApiKey>,
    signing: Vec<SigningKey>,
    nodes: BTreeMap<NodeId, NodeRecord>,
    removed: BTreeSet<NodeId>,
    tokens: BTreeMap<[u8; 16], JoinToken>,
    authority: Option<String>,
    highest: u64,
    groups: u64,
    quotas: BTreeMap<Option<ProjectId>, Quota>,
    version: u32,
}

/// Whether the node told something that those of the first version do not tell.
fn is_second(node: &NodeRecord) -> bool {
    node.version.0 > 1 || node.incarnation > 0 || !node.name.is_empty()
}

impl Model {
    fn apply(&mut self, command: &Command) -> Result<(), Refusal> {
        self.change(command)?;
        let raised = match command {
            Command::SetClusterVersion(version) => version.0,
            Command::PutNode(node) if is_second(node) => 2,
            Command::CreateTopic(topic) if !topic.replicas.is_empty() => 2,
            Command::CreateTopics(_)
            | Command::SetQuota { .. }
            | Command::SetAuthority(_)
            | Command::CreateJoinToken(_)
            | Command::RevokeJoinToken { .. }
            | Command::Join(_)
            | Command::RevokeNode { .. } => 2,
            _ => 1,
        };
        self.version = self.version.max(raised);
        Ok(())
    }

    fn change(&mut self, command: &Command) -> Result<(), Refusal> {
        match command.clone() {
            Command::SetClusterVersion(_) => {}
            Command::SetAuthority(new) => match &self.authority {
                Some(known) if *known != new.certificate => return Err(Refusal::AuthorityExists),
                _ => self.authority = Some(new.certificate),
            },
            Command::CreateJoinToken(new) => match self.tokens.get(&new.id) {
                Some(known) if known.hash != new.hash => return Err(Refusal::IdTaken),
                Some(_) => {}
                None => {
                    self.tokens.insert(new.id, new);
                }
            },
            Command::RevokeJoinToken { token, at } => {
                let known = self.tokens.get_mut(&token).ok_or(Refusal::TokenUnknown)?;
                known.revoked_at.get_or_insert(at);
            }
            Command::Join(join) => return self.join(join),
            Command::RevokeNode { node, .. } => {
                self.removed.insert(node);
                if let Some(known) = self.nodes.get_mut(&node) {
                    known.state = NodeState::Removed;
                }
                self.highest = self.highest.max(node.0);
            }
            Command::PutNode(node) => {
                if self.removed.contains(&node.id) {
                    return Err(Refusal::NodeRevoked);
                }
                let speaks = if is_second(&node) { node.version.0.max(2) } else { 1 };
                if speaks < self.version {
                    return Err(Refusal::VersionTooOld);
                }
                if self.has_name(&node.name, node.id) {
                    return Err(Refusal::NameTaken);
                }
                let over = |old: &NodeRecord| {
                    old.incarnation > node.incarnation
                        || (old.incarnation == node.incarnation && old.process != node.process)
                };
                if self.nodes.get(&node.id).is_some_and(over) {
                    return Err(Refusal::LifeOver);
                }
                self.highest = self.highest.max(node.id.0);
                let key = self.nodes.get(&node.id).map(|old| old.key.clone()).unwrap_or_default();
                self.nodes.insert(node.id, NodeRecord { key, ..node });
            }
            Command::CreateOrganization { id, name, .. } => match self.orgs.iter().find(|org| org.0 == id) {
                Some(known) if known.1 == name => {}
                Some(_) => return Err(Refusal::IdTaken),
                None if self.orgs.iter().any(|org| org.1 == name) => return Err(Refusal::NameTaken),
                None => self.orgs.push((id, name)),
            },
            Command::CreateProject(new) => match self.projects.iter().find(|known| known.id == new.id) {
                Some(known) if *known == new => {}
                Some(_) => return Err(Refusal::IdTaken),
                None if !self.orgs.iter().any(|org| org.0 == new.org) => return Err(Refusal::OrganizationUnknown),
                None if self.projects.iter().any(|known| (known.org, &known.name) == (new.org, &new.name)) => {
                    return Err(Refusal::NameTaken);
                }
                None => self.projects.push(new),
            },
            Command::CreateTopic(new) => return self.create_topic(new),
            // One after the other, as if each had come alone: what is refused of one is no refusal of all.
            Command::CreateTopics(many) => {
                for new in many {
                    let _ = self.create_topic(new);
                }
            }
            Command::SetTopicState { topic, state, at } => {
                let known = self.topics.iter_mut().find(|known| known.id == topic).ok_or(Refusal::TopicUnknown)?;
                match (known.state, state) {
                    (TopicState::Deleting, TopicState::Readonly) => {
                        return Err(Refusal::TopicState(TopicState::Deleting));
                    }
                    (before, after) if before == after => {}
                    _ => (known.state, known.modified) = (state, known.modified.max(at)),
                }
            }
            Command::SetTopicPolicies { topic, policies, at } => {
                let known = self.topics.iter_mut().find(|known| known.id == topic).ok_or(Refusal::TopicUnknown)?;
                if known.state != TopicState::Ready {
                    return Err(Refusal::TopicState(known.state));
                }
                if known.policies != policies {
                    (known.policies, known.modified) = (policies, known.modified.max(at));
                }
            }
            Command::FinishDestroy { topic, .. } => {
                if let Some(place) = self.topics.iter().position(|known| known.id == topic) {
                    if self.topics[place].state != TopicState::Deleting {
                        return Err(Refusal::TopicState(self.topics[place].state));
                    }
                    self.topics.remove(place);
                    self.destroyed.insert(topic);
                }
            }
            Command::CreateApiKey(new) => return self.create_api_key(new),
            Command::RevokeApiKey { key, at } => {
                let known = self.keys.iter_mut().find(|known| known.id == key).ok_or(Refusal::ApiKeyUnknown)?;
                known.revoked_at.get_or_insert(at);
            }
            Command::AddSigningKey(new) => match self.signing.iter().find(|known| known.kid == new.kid) {
                Some(known) if known.public_key == new.public_key => {}
                Some(_) => return Err(Refusal::IdTaken),
                None => self.signing.push(new),
            },
            Command::RetireSigningKey { kid, verifies_until } => {
                let known = self.signing.iter_mut().find(|known| known.kid == kid).ok_or(Refusal::SigningKeyUnknown)?;
                known.verifies_until = Some(known.verifies_until.unwrap_or(verifies_until).min(verifies_until));
            }
            Command::SetQuota { project, change } => {
                if project.is_some_and(|id| !self.projects.iter().any(|known| known.id == id)) {
                    return Err(Refusal::ProjectUnknown);
                }
                let quota = self.quotas.entry(project).or_default();
                for (limit, change) in [(&mut quota.topics, change.topics), (&mut quota.streams, change.streams)] {
                    match change {
                        Change::Keep => {}
                        Change::Unset => *limit = None,
                        Change::Set(set) => *limit = Some(set),
                    }
                }
            }
            Command::SetPlacementDefaults { .. }
            | Command::SetNodeState { .. }
            | Command::AlterTopic { .. }
            | Command::StartMove { .. }
            | Command::CancelMove { .. }
            | Command::FinishMove { .. }
            | Command::ReportMove { .. } => unreachable!("placement is tested in moves/tests.rs"),
        }
        Ok(())
    }

    fn has_name(&self, name: &str, id: NodeId) -> bool {
        let other = |node: &NodeRecord| node.id != id && node.name == name && !self.removed.contains(&node.id);
        !name.is_empty() && self.nodes.values().any(other)
    }

    fn join(&mut self, join: Join) -> Result<(), Refusal> {
        let token = self.tokens.get(&join.token).ok_or(Refusal::TokenUnknown)?.clone();
        if let Some(known) = self.nodes.values().find(|node| node.key == join.key[..]) {
            return if self.removed.contains(&known.id) { Err(Refusal::NodeRevoked) } else { Ok(()) };
        }
        if token.revoked_at.is_some() {
            return Err(Refusal::TokenRevoked);
        }
        if token.used == token.uses {
            return Err(Refusal::TokenUsedUp);
        }
        let id = NodeId(self.highest.max(join.above.0) + 1);
        let name = if join.name.is_empty() { format!("node-{id}") } else { join.name };
        if self.has_name(&name, id) {
            return Err(Refusal::NameTaken);
        }
        let key = Bytes::copy_from_slice(&join.key);
        let (peer, region, zone) = (join.peer, join.region, join.zone);
        self.nodes.insert(
            id,
            NodeRecord { id, peer, name, region, zone, key, version: join.version, ..NodeRecord::default() },
        );
        self.tokens.insert(token.id, JoinToken { used: token.used + 1, ..token });
        self.highest = id.0;
        Ok(())
    }

    fn create_topic(&mut self, new: NewTopic) -> Result<(), Refusal> {
        if let Some(known) = self.topics.iter().find(|known| known.id == new.id) {
            let same = (known.project, &known.name, known.ring) == (new.project, &new.name, new.ring);
            return if same { Ok(()) } else { Err(Refusal::IdTaken) };
        }
        if self.destroyed.contains(&new.id) {
            return Err(Refusal::IdTaken);
        }
        let Some(owner) = self.projects.iter().find(|known| known.id == new.project) else {
            return Err(Refusal::ProjectUnknown);
        };
        if self.topics.iter().any(|known| (known.project, &known.name) == (new.project, &new.name)) {
            return Err(Refusal::NameTaken);
        }
        let set = |whose| self.quotas.get(&whose).and_then(|quota: &Quota| quota.topics);
        if let Some(Limit::At(limit)) = set(Some(new.project)).or(set(None))
            && self.topics.iter().filter(|known| known.project == new.project).count() as u64 >= limit
        {
            return Err(Refusal::TopicQuota);
        }
        self.topics.push(Topic {
            id: new.id,
            project: new.project,
            org: owner.org,
            name: new.name,
            group: GroupId(16 + self.groups),
            partition: ensign_proto::Partition(0),
            replicas: new.replicas,
            placement: new.placement,
            assignment: 0,
            reassignment: None,
            ring: new.ring,
            state: TopicState::Ready,
            policies: new.policies,
            created: new.at,
            modified: new.at,
        });
        self.groups += 1;
        Ok(())
    }

    fn create_api_key(&mut self, new: ApiKey) -> Result<(), Refusal> {
        if let Some(known) = self.keys.iter().find(|known| known.id == new.id) {
            let same = ApiKey { revoked_at: None, ..known.clone() } == new;
            return if same { Ok(()) } else { Err(Refusal::IdTaken) };
        }
        if self.keys.iter().any(|known| known.client_id == new.client_id) {
            return Err(Refusal::NameTaken);
        }
        if !self.orgs.iter().any(|org| org.0 == new.org) {
            return Err(Refusal::OrganizationUnknown);
        }
        if new.project.is_some_and(|id| !self.projects.iter().any(|known| (known.id, known.org) == (id, new.org))) {
            return Err(Refusal::ProjectUnknown);
        }
        self.keys.push(new);
        Ok(())
    }

    fn check(&self, view: &View) {
        assert_eq!(view.cluster_version().0, self.version.max(1));
        let sorted = |topics: Vec<Arc<Topic>>| topics.iter().map(|topic| (**topic).clone()).collect::<Vec<_>>();
        let mut topics = self.topics.clone();
        topics.sort_by_key(|topic| topic.id);
        assert_eq!(sorted(view.all_topics()), topics);
        for owner in (0..4).map(project) {
            let own: Vec<_> = topics.iter().filter(|topic| topic.project == owner).cloned().collect();
            assert_eq!(sorted(view.topics(owner)), own);
            let mut by_hash = own.clone();
            by_hash.sort_by_key(|topic| topic.name.hash());
            let mut names = Vec::new();
            let mut token = String::new();
            loop {
                let page = view.names_page(owner, &PageRequest { size: 1, token: &token }, at(0)).unwrap();
                names.extend(page.items.into_iter().map(|(_, topic)| topic));
                token = page.next;
                if token.is_empty() {
                    break;
                }
            }
            assert_eq!(sorted(names), by_hash);
            for n in 0..4 {
                let known = own.iter().find(|topic| topic.name == name(n)).cloned();
                assert_eq!(view.topic_by_name(owner, &name(n)).map(|topic| (*topic).clone()), known);
            }
        }
        for owner in (0..4).map(project) {
            let set = |whose, pick: fn(&Quota) -> Option<Limit>| self.quotas.get(&whose).and_then(pick);
            let streams = set(Some(owner), |quota| quota.streams).or(set(None, |quota| quota.streams));
            assert_eq!(view.quota(owner).streams, streams.unwrap_or(BUILT_IN.streams));
        }
        assert_eq!(view.projects(None).len(), self.projects.len());
        assert!(self.projects.iter().all(|known| view.project(known.id).as_deref() == Some(known)));
        assert_eq!(view.organizations().len(), self.orgs.len());
        assert_eq!(view.api_keys(None).len(), self.keys.len());
        for key in &self.keys {
            assert_eq!(view.api_key(key.id).as_deref(), Some(key));
            assert_eq!(view.api_key_by_client(&key.client_id).as_deref(), Some(key));
            assert_eq!(view.is_revoked(key.id), key.revoked_at.is_some());
        }
        assert_eq!(view.signing_keys().len(), self.signing.len());
        assert!(self.signing.iter().all(|known| view.signing_key(&known.kid).as_deref() == Some(known)));
        let nodes: Vec<_> = view.nodes().iter().map(|node| (**node).clone()).collect();
        assert_eq!(nodes, self.nodes.values().cloned().collect::<Vec<_>>());
        let tokens: Vec<_> = view.join_tokens().iter().map(|token| (**token).clone()).collect();
        assert_eq!(tokens, self.tokens.values().cloned().collect::<Vec<_>>());
        assert_eq!(view.revoked_nodes(), self.removed.iter().copied().collect::<Vec<_>>());
        assert_eq!(view.authority().map(|authority| authority.certificate.clone()), self.authority);
    }
}

fn entry(index: usize, payload: Bytes) -> CommittedEntry {
    CommittedEntry { id: EntryId { term: Term(1), index: LogIndex(index as u64 + 1) }, payload }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn the_machine_does_what_the_model_says(commands in proptest::collection::vec(command(), 0..60)) {
        let (mut machine, view) = CatalogMachine::new();
        let mut model = Model::default();
        for (index, command) in commands.iter().enumerate() {
            let answer = machine.apply(&entry(index, command.encode()));
            prop_assert_eq!(answer.map(|_| ()), model.apply(command), "{:?}", command);
        }
        model.check(&view);
        // A replica that starts from the snapshot is the same, for now and later.
        let snapshot = machine.snapshot();
        let (mut restored, copy) = CatalogMachine::new();
        restored.restore(&snapshot).unwrap();
        prop_assert_eq!(restored.snapshot(), snapshot);
        model.check(&copy);
        let next = entry(commands.len(), Command::CreateTopic(NewTopic {
            id: topic(99), project: project(0), name: name(99), ring: ring(0), replicas: nodes(0),
            placement: Placement::default(), policies: policies(0), at: at(0),
        }).encode());
        prop_assert_eq!(restored.apply(&next), machine.apply(&next));
    }

    #[test]
    fn a_command_that_arrives_twice_answers_the_same_and_changes_nothing_more(
        commands in proptest::collection::vec(command(), 0..60)
    ) {
        let mut state = State::default();
        for command in commands {
            let first = state.apply(command.clone());
            let before = state.clone();
            prop_assert_eq!(state.apply(command), first);
            prop_assert_eq!(&state, &before);
        }
    }

    #[test]
    fn every_command_and_answer_survives_its_bytes(commands in proptest::collection::vec(command(), 0..20)) {
        let mut state = State::default();
        for command in commands {
            prop_assert_eq!(&Command::decode(&command.encode()).unwrap(), &command);
            let answer = state.apply(command);
            prop_assert_eq!(wire::decode_response(&wire::encode_response(&answer)).unwrap(), answer);
        }
    }

    #[test]
    fn garbage_is_refused_and_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let bytes = Bytes::from(bytes);
        prop_assert!(Command::decode(&bytes).is_err());
        prop_assert!(wire::decode_response(&bytes).is_err());
        prop_assert!(CatalogMachine::new().0.restore(&bytes).is_err());
    }
}

fn sample() -> CatalogMachine {
    let (mut machine, _) = CatalogMachine::new();
    for (index, command) in sample_commands().iter().enumerate() {
        machine.apply(&entry(index, command.encode())).unwrap();
    }
    machine
}

fn sample_commands() -> Vec<Command> {
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

fn hex(bytes: &Bytes) -> String {
    bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

/// Logs and snapshots outlive the code that wrote them. If this fails, the format has changed: give it a new version.
#[test]
fn stored_bytes_are_still_what_they_were() {
    let commands: Vec<String> = sample_commands().iter().map(|command| hex(&command.encode())).collect();
    insta::assert_snapshot!("stored_commands", commands.join("\n"));
    insta::assert_snapshot!("stored_snapshot", hex(&sample().snapshot()));
}

#[test]
fn stored_quotas_are_still_what_they_were() {
    let change = QuotaChange {
        events_per_second: Change::Set(Limit::At(1_000)),
        bytes_per_second: Change::Set(Limit::Unlimited),
        stored_bytes: Change::Unset,
        topics: Change::Set(Limit::At(0)),
        streams: Change::Keep,
    };
    let commands = [None, Some(project(1))].map(|project| Command::SetQuota { project, change });
    insta::assert_snapshot!(
        "stored_quota_commands",
        commands.each_ref().map(|command| hex(&command.encode())).join("\n")
    );
    let mut machine = sample();
    for (index, command) in commands.iter().enumerate() {
        assert_eq!(Command::decode(&command.encode()).unwrap(), *command);
        machine.apply(&entry(50 + index, command.encode())).unwrap();
    }
    let snapshot = machine.snapshot();
    insta::assert_snapshot!("stored_quota_snapshot", hex(&snapshot));
    let (mut other, view) = CatalogMachine::new();
    other.restore(&snapshot).unwrap();
    assert_eq!(view.own_quota(project(1)), view.default_quota());
    assert_eq!(view.quota(project(1)).events_per_second, Limit::At(1_000));
    assert_eq!(view.quota(project(1)).streams, BUILT_IN.streams);
}

#[test]
fn the_last_place_for_a_topic_is_given_once_and_a_repeated_creation_is_no_further_topic() {
    let mut machine = sample();
    let mut index = 100;
    let mut apply = |command: &Command| {
        index += 1;
        machine.apply(&entry(index, command.encode())).map(|_| ())
    };
    let create = |n: u8| {
        Command::CreateTopic(NewTopic {
            id: topic(n),
            project: project(1),
            name: name(n),
            ring: ring(1),
            replicas: nodes(3),
            placement: Placement::default(),
            policies: policies(0),
            at: at(n),
        })
    };
    let limit = |limit| Command::SetQuota {
        project: Some(project(1)),
        change: QuotaChange { topics: limit, ..QuotaChange::default() },
    };
    // One is there already.
    apply(&limit(Change::Set(Limit::At(2)))).unwrap();
    apply(&create(10)).unwrap();
    assert_eq!(apply(&create(11)), Err(Refusal::TopicQuota));
    apply(&create(10)).unwrap();
    apply(&limit(Change::Unset)).unwrap();
    apply(&create(11)).unwrap();
    let stranger = Command::SetQuota { project: Some(project(9)), change: QuotaChange::default() };
    assert_eq!(apply(&stranger), Err(Refusal::ProjectUnknown));
}

#[test]
fn every_flipped_bit_and_every_cut_is_refused() {
    let snapshot = sample().snapshot();
    let command = sample_commands()[3].encode();
    let refuses = |bytes: &Bytes| CatalogMachine::new().0.restore(bytes).is_err() && Command::decode(bytes).is_err();
    for bytes in [snapshot, command] {
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(refuses(&Bytes::from(flipped)), "bit {bit}");
        }
        assert!((0..bytes.len()).all(|length| refuses(&bytes.slice(..length))));
    }
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
fn a_destroyed_topic_frees_its_name_but_never_its_group_or_id() {
    let mut machine = sample();
    let view = machine.view();
    let again = |id| {
        let (replicas, placement, policies, at) = (nodes(3), Placement::default(), policies(0), at(9));
        let new = NewTopic { id, project: project(1), name: name(2), ring: ring(1), replicas, placement, policies, at };
        Command::CreateTopic(new).encode()
    };
    assert_eq!(machine.apply(&entry(50, again(topic(2)))), Err(Refusal::IdTaken), "a late retry of its creation");
    assert!(machine.apply(&entry(51, again(topic(3)))).is_ok());
    assert_eq!(view.topic(topic(3)).unwrap().group, GroupId(18));
    // After a restart from a snapshot, too.
    let (mut restored, view) = CatalogMachine::new();
    restored.restore(&machine.snapshot()).unwrap();
    let (replicas, placement, policies, at) = (nodes(3), Placement::default(), policies(0), at(9));
    let other =
        NewTopic { id: topic(4), project: project(1), name: name(4), ring: ring(1), replicas, placement, policies, at };
    restored.apply(&entry(52, Command::CreateTopic(other).encode())).unwrap();
    assert_eq!(view.topic(topic(4)).unwrap().group, GroupId(19));
}

#[test]
fn a_life_of_a_node_that_is_over_is_refused_also_after_a_restart() {
    let (mut machine, _) = CatalogMachine::new();
    let put = |machine: &mut CatalogMachine, incarnation, process| {
        machine.apply(&entry(1, Command::PutNode(node(2, "b", incarnation, process)).encode()))
    };
    put(&mut machine, 5, 50).unwrap();
    put(&mut machine, 5, 50).unwrap();
    let (mut restored, view) = CatalogMachine::new();
    restored.restore(&machine.snapshot()).unwrap();
    for (incarnation, process) in [(1, 1), (4, 50), (5, 51)] {
        assert_eq!(put(&mut restored, incarnation, process), Err(Refusal::LifeOver), "{incarnation} {process}");
    }
    put(&mut restored, 6, 60).unwrap();
    assert_eq!((view.node(NodeId(2)).unwrap().incarnation, view.node(NodeId(2)).unwrap().process), (6, 60));
}

#[test]
fn a_token_that_is_over_lets_nobody_in() {
    let (mut machine, _) = CatalogMachine::new();
    let mut apply = |command: Command| machine.apply(&entry(1, command.encode())).map(|_| ());
    apply(Command::CreateJoinToken(JoinToken { expires: at(5), ..join_token(1, 9) })).unwrap();
    apply(Command::Join(Join { at: at(4), ..join(1, 1, "a") })).unwrap();
    assert_eq!(apply(Command::Join(Join { at: at(5), ..join(1, 2, "b") })), Err(Refusal::TokenExpired));
    apply(Command::Join(Join { at: at(6), ..join(1, 1, "a") })).unwrap();
    // What ended more than a week ago is forgotten when the next one is made.
    let later = UnixNanos(at(5).0 + 8 * 24 * 3600 * 1_000_000_000);
    let fresh = JoinToken { created: later, expires: UnixNanos(later.0 + 1), ..join_token(2, 1) };
    apply(Command::CreateJoinToken(fresh)).unwrap();
    assert_eq!(apply(Command::RevokeJoinToken { token: [1; 16], at: later }), Err(Refusal::TokenUnknown));
}

#[test]
fn a_name_belongs_to_one_node() {
    let (mut machine, view) = CatalogMachine::new();
    let mut put = |node| machine.apply(&entry(1, Command::PutNode(node).encode()));
    // Records of before had no names, all of them.
    put(NodeRecord { name: String::new(), ..node(3, "c", 0, 0) }).unwrap();
    put(NodeRecord { name: String::new(), ..node(4, "d", 0, 0) }).unwrap();
    put(node(1, "a", 1, 1)).unwrap();
    assert_eq!(put(node(2, "a", 1, 1)), Err(Refusal::NameTaken));
    put(node(2, "b", 1, 1)).unwrap();
    assert_eq!(put(node(2, "a", 2, 2)), Err(Refusal::NameTaken), "nor may a node take it later");
    assert_eq!(view.nodes().len(), 4);
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

#[test]
fn a_batch_of_topics_makes_those_that_can_be_and_says_why_the_others_were_not() {
    let (mut machine, view) = CatalogMachine::new();
    let mut index = 0;
    let mut apply = |command: Command| {
        index += 1;
        machine.apply(&entry(index, command.encode()))
    };
    apply(Command::CreateOrganization { id: org(1), name: "org".to_owned(), at: at(0) }).unwrap();
    let owner = Project { id: project(1), org: org(1), name: "p".to_owned(), ring: ring(1), created: at(0) };
    apply(Command::CreateProject(owner)).unwrap();
    apply(Command::CreateTopic(new_topic(1, 1, 1))).unwrap();
    // Made, taken before, taken in the batch itself, of a project that there is not, and made.
    let batch =
        vec![new_topic(2, 1, 2), new_topic(3, 1, 1), new_topic(4, 1, 2), new_topic(5, 9, 5), new_topic(6, 1, 6)];
    let command = Command::CreateTopics(batch);
    let response = apply(command.clone());
    let Ok(Outcome::Topics(each)) = &response else { panic!("{response:?}") };
    let groups: Vec<_> =
        each.iter().map(|topic| topic.as_ref().map(|topic| topic.group.0).map_err(|why| *why)).collect();
    let taken = Err(Refusal::NameTaken);
    assert_eq!(groups, [Ok(17), taken, taken, Err(Refusal::ProjectUnknown), Ok(18)]);
    assert_eq!(view.topic_count(), 3);
    assert_eq!(apply(command), response, "again it answers the same");
    assert_eq!(view.topic_count(), 3);
    assert_eq!(wire::decode_response(&wire::encode_response(&response)), Ok(response), "also to another node");
}

#[test]
fn a_batch_that_is_too_large_or_names_an_id_twice_is_no_command() {
    let many = |count: usize| {
        let one = |n: usize| NewTopic { id: TopicId::new(n as u64, [1; 10]), ..new_topic(1, 1, 1) };
        (0..count).map(one).collect::<Vec<_>>()
    };
    let decoded = |topics: Vec<NewTopic>| Command::decode(&Command::CreateTopics(topics).encode());
    assert!(decoded(many(TOPICS_BATCH_MAX)).is_ok());
    assert_eq!(decoded(many(TOPICS_BATCH_MAX + 1)), Err(DecodeError::Invalid("topics")));
    assert_eq!(decoded([many(3), many(1)].concat()), Err(DecodeError::Invalid("topics")));
}

#[test]
fn a_follower_of_the_topics_hears_of_what_changed_and_of_nothing_else() {
    let (mut machine, view) = CatalogMachine::new();
    let mut index = 0;
    let mut apply = |machine: &mut CatalogMachine, command: Command| {
        index += 1;
        machine.apply(&entry(index, command.encode())).unwrap();
    };
    let (mut seen, all) = view.changed_topics(TopicsSeen::default());
    assert_eq!(all, None, "whoever has seen nothing looks at everything");
    let mut changed = |view: &View| {
        let (now, changed) = view.changed_topics(seen);
        seen = now;
        changed
    };
    apply(&mut machine, Command::CreateOrganization { id: org(1), name: "org".to_owned(), at: at(0) });
    let owner = Project { id: project(1), org: org(1), name: "p".to_owned(), ring: ring(1), created: at(0) };
    apply(&mut machine, Command::CreateProject(owner));
    assert_eq!(changed(&view), Some(vec![]));
    apply(&mut machine, Command::CreateTopics(vec![new_topic(1, 1, 1), new_topic(2, 1, 2)]));
    apply(&mut machine, Command::SetTopicState { topic: topic(1), state: TopicState::Deleting, at: at(1) });
    assert_eq!(changed(&view), Some(vec![topic(1), topic(2), topic(1)]));
    assert_eq!(changed(&view), Some(vec![]), "each change is told once");
    apply(&mut machine, Command::FinishDestroy { topic: topic(1), at: at(2) });
    assert_eq!(changed(&view), Some(vec![topic(1)]));
    let snapshot = machine.snapshot();
    machine.restore(&snapshot).unwrap();
    assert_eq!(changed(&view), None, "after a snapshot everything may be different");
    assert_eq!(changed(&view), Some(vec![]));
    for round in 0..9_000_u64 {
        let state = policies((round % 2) as u8);
        apply(&mut machine, Command::SetTopicPolicies { topic: topic(2), policies: state, at: at(3) });
    }
    assert_eq!(changed(&view), None, "who is too far behind looks at everything");
}
