//! The state machine against a naive model.

use proptest::prelude::*;

use super::commands::command;
use super::*;
use crate::catalog::state::State;

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
            Command::CreateApiKey(key) if key.ring.is_some() => 2,
            Command::CreateTopics(_)
            | Command::SetTopicRing { .. }
            | Command::ShredApiKey { .. }
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
            Command::SetTopicRing { topic, ring, at } => {
                let shredded = self.is_shredded(ring);
                let known = self.topics.iter_mut().find(|known| known.id == topic).ok_or(Refusal::TopicUnknown)?;
                if known.state != TopicState::Ready {
                    return Err(Refusal::TopicState(known.state));
                }
                if known.ring != ring {
                    if shredded {
                        return Err(Refusal::RingShredded);
                    }
                    let before = std::mem::replace(&mut known.ring, ring);
                    known.former_rings.insert(before);
                    known.former_rings.remove(&ring);
                    known.modified = known.modified.max(at);
                }
            }
            Command::ShredApiKey { key, at } => {
                let known = self.keys.iter().find(|known| known.id == key).ok_or(Refusal::ApiKeyUnknown)?;
                let own = known.ring.ok_or(Refusal::NoRing)?;
                let of_topic = |topic: &Topic| topic.ring == own || topic.former_rings.contains(&own);
                let shared = self.projects.iter().any(|known| known.ring == own)
                    || self.topics.iter().any(of_topic)
                    || self.keys.iter().any(|other| other.id != key && other.ring == Some(own));
                if shared {
                    return Err(Refusal::RingShared);
                }
                let known = self.keys.iter_mut().find(|known| known.id == key).ok_or(Refusal::ApiKeyUnknown)?;
                known.revoked_at.get_or_insert(at);
                known.shredded = true;
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

    fn is_shredded(&self, ring: RingId) -> bool {
        self.keys.iter().any(|key| key.shredded && key.ring == Some(ring))
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
        let there = |node: &&NodeRecord| node.peer == join.peer && !self.removed.contains(&node.id);
        if self.nodes.values().any(|node| there(&node)) {
            return Err(Refusal::AddressTaken);
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
            let bound = known.ring == new.ring || known.former_rings.contains(&new.ring);
            let same = bound && (known.project, &known.name) == (new.project, &new.name);
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
        if self.is_shredded(new.ring) {
            return Err(Refusal::RingShredded);
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
            former_rings: BTreeSet::new(),
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
            let same = ApiKey { revoked_at: None, shredded: false, ..known.clone() } == new;
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
        if new.ring.is_some_and(|ring| self.is_shredded(ring)) {
            return Err(Refusal::RingShredded);
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
        for (owner, own) in (0..4).map(project).flat_map(|owner| (0..6).map(move |n| (owner, ring(n)))) {
            let has = self.keys.iter().any(|key| (key.project, key.ring) == (Some(owner), Some(own)));
            assert_eq!(view.has_api_key_ring(owner, own), has);
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
}
