//! `ensign topic`.

use std::collections::HashMap;

use ensign_client::{CallError, Client, Place, Topic, TopicState, admin_api as pb};
use ensign_proto::{RingId, TopicId};
use serde::Serialize;

use super::args::TopicCommand;
use super::connect::connect;
use super::exit::UsageError;
use super::output::{confirm, list, one, record, thousands, time};
use super::placement;

/// A topic as it is printed.
#[derive(Serialize)]
struct Shown {
    id: String,
    name: String,
    state: &'static str,
    created: Option<String>,
    modified: Option<String>,
    /// What seals its events, where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    ring: Option<String>,
}

/// A topic with its counters.
#[derive(Serialize)]
struct Described {
    #[serde(flatten)]
    topic: Shown,
    project: String,
    events: u64,
    duplicates: u64,
    bytes: u64,
    types: Vec<DescribedType>,
}

#[derive(Serialize)]
struct DescribedType {
    mimetype: String,
    #[serde(rename = "type")]
    schema: String,
    events: u64,
    bytes: u64,
}

impl From<&Topic> for Shown {
    fn from(topic: &Topic) -> Self {
        let state = if topic.readonly { TopicState::Readonly } else { topic.state };
        Self {
            id: topic.id.to_string(),
            name: topic.name.clone(),
            state: state_name(state),
            created: topic.created.map(time),
            modified: topic.modified.map(time),
            ring: None,
        }
    }
}

fn state_name(state: TopicState) -> &'static str {
    match state {
        TopicState::Undefined => "undefined",
        TopicState::Ready => "ready",
        TopicState::Readonly => "archived",
        TopicState::Deleting => "deleting",
        TopicState::Pending => "pending",
        TopicState::Allocating => "allocating",
        TopicState::Repairing => "repairing",
    }
}

/// Runs one of the topic commands.
pub(super) async fn run(command: TopicCommand) -> anyhow::Result<()> {
    match command {
        TopicCommand::Create {
            names,
            from: None,
            if_missing: false,
            replication,
            regions,
            leader_region,
            key: None,
            client,
        } if names.len() == 1 => {
            let place = Place { replication, regions, leader_region };
            let topic = connect(&client)?.project.create_topic_at(&names[0], &place).await?;
            let sentence = format!("created topic {} ({})", topic.name, topic.id);
            one(client.output, &Shown::from(&topic), sentence)
        }
        TopicCommand::Create { names, from, if_missing, replication, regions, leader_region, key, client } => {
            if replication.is_some() || !regions.is_empty() || !leader_region.is_empty() {
                let what = "--replication, --region and --leader-region are for one topic at a time: name one, without --from and \
                            --key (`ensign topic alter` binds it to a key ring)";
                return Err(UsageError(what.to_owned()).into());
            }
            super::topics::create(names, from.as_deref(), if_missing, key.as_deref(), &client).await
        }
        TopicCommand::List { client } => {
            let project = connect(&client)?.project;
            let (topics, rings) = (project.topics().await?, rings(&project, None).await?);
            let shown =
                |topic: &Topic| Shown { ring: rings.get(&topic.id).map(RingId::to_string), ..Shown::from(topic) };
            let topics: Vec<_> = topics.iter().map(shown).collect();
            let row = |topic: &Shown| {
                vec![
                    topic.name.clone(),
                    topic.id.clone(),
                    topic.state.to_owned(),
                    topic.created.clone().unwrap_or_default(),
                ]
            };
            list(
                client.output,
                &["name", "id", "state", "created"],
                &topics,
                row,
                "no topics yet; `ensign topic create NAME` makes one",
            )
        }
        TopicCommand::Describe { topic, client } => {
            let clients = connect(&client)?;
            let topic = clients.project.find_topic(&topic).await?;
            let info = clients.project.info(&[topic.id]).await?;
            let rings = rings(&clients.project, Some(topic.id)).await?;
            let mut described = described(&topic, &info);
            described.topic.ring = rings.get(&topic.id).map(RingId::to_string);
            let fields = fields(&described);
            record(client.output, &described, &fields)
        }
        TopicCommand::Alter {
            topic,
            replication,
            regions,
            any_region,
            leader_region,
            no_leader_region,
            key,
            client,
        } => {
            let regions = (any_region || !regions.is_empty()).then_some(pb::RegionSet { regions });
            let leader_region = if no_leader_region { Some(String::new()) } else { leader_region };
            let ring = key.unwrap_or_default();
            placement::alter(pb::AlterTopicRequest { topic, replication, regions, leader_region, ring }, &client).await
        }
        TopicCommand::Archive { topic, yes, client } => {
            let clients = connect(&client)?;
            let topic = clients.project.find_topic(&topic).await?;
            confirm(yes, &format!("Topic {} will refuse new events for ever.", topic.name))?;
            clients.project.archive_topic(topic.id).await?;
            let shown = Shown { state: state_name(TopicState::Readonly), ..Shown::from(&topic) };
            one(client.output, &shown, format_args!("archived topic {}", topic.name))
        }
        TopicCommand::Destroy { topic, yes, client } => {
            let clients = connect(&client)?;
            let topic = clients.project.find_topic(&topic).await?;
            confirm(yes, &format!("Topic {} and every event in it will be destroyed.", topic.name))?;
            let state = clients.project.destroy_topic(topic.id).await?;
            let shown = Shown { state: state_name(state), ..Shown::from(&topic) };
            one(client.output, &shown, format_args!("destroying topic {}", topic.name))
        }
    }
}

/// What seals the topics; nothing where an older node answers, which knows one ring a project.
async fn rings(project: &Client, topic: Option<TopicId>) -> Result<HashMap<TopicId, RingId>, CallError> {
    match project.topic_rings(topic).await {
        Err(CallError::Unimplemented { .. }) => Ok(HashMap::new()),
        rings => rings,
    }
}

fn described(topic: &Topic, info: &ensign_client::ProjectInfo) -> Described {
    let counters = info.topics.iter().find(|it| it.topic_id[..] == topic.id.as_bytes()[..]);
    let types = counters.map(|it| it.types.as_slice()).unwrap_or_default().iter().map(|it| DescribedType {
        mimetype: super::events::media_type(it.mimetype).into_owned(),
        schema: it.r#type.as_ref().map(super::events::schema_name).unwrap_or_default(),
        events: it.events,
        bytes: it.data_size_bytes,
    });
    Described {
        topic: topic.into(),
        project: topic.project.to_string(),
        events: counters.map_or(0, |it| it.events),
        duplicates: counters.map_or(0, |it| it.duplicates),
        bytes: counters.map_or(0, |it| it.data_size_bytes),
        types: types.collect(),
    }
}

fn fields(described: &Described) -> Vec<(&'static str, String)> {
    let topic = &described.topic;
    let mut fields = vec![
        ("name", topic.name.clone()),
        ("id", topic.id.clone()),
        ("project", described.project.clone()),
        ("state", topic.state.to_owned()),
        ("events", thousands(described.events)),
        ("bytes", thousands(described.bytes)),
    ];
    for kind in &described.types {
        let schema = if kind.schema.is_empty() { String::new() } else { format!(" {}", kind.schema) };
        fields.push((
            "",
            format!("{}{schema}: {} events, {} bytes", kind.mimetype, thousands(kind.events), thousands(kind.bytes)),
        ));
    }
    if let Some(ring) = &topic.ring {
        fields.push(("key ring", ring.clone()));
    }
    fields.push(("created", topic.created.clone().unwrap_or_default()));
    fields.push(("modified", topic.modified.clone().unwrap_or_default()));
    fields
}
