//! `ensign project`, `apikey` and `status`.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::Context as _;
use ensign_client::{Options, Sealing, admin_api as pb};
use serde::Serialize;

use super::args::{ApiKeyCommand, ClientArgs, ProjectCommand, StatusArgs};
use super::connect::{Clients, connect};
use super::exit::UsageError;
use super::output::{confirm, line, list, one, record, thousands, wire_time};

/// An id that was typed.
pub(super) fn id<T: FromStr<Err = ensign_proto::InvalidId>>(text: Option<String>) -> Result<Option<T>, UsageError> {
    text.map(|text| text.parse()).transpose().map_err(|error: ensign_proto::InvalidId| UsageError(error.to_string()))
}

#[derive(Serialize)]
struct ShownProject {
    id: String,
    name: String,
    organization: String,
    ring: String,
    created: Option<String>,
}

impl From<pb::Project> for ShownProject {
    fn from(project: pb::Project) -> Self {
        Self {
            created: wire_time(project.created.as_ref()),
            id: project.id,
            name: project.name,
            organization: project.organization_id,
            ring: project.ring_id,
        }
    }
}

/// Runs one of the project commands.
pub(super) async fn project(command: ProjectCommand) -> anyhow::Result<()> {
    match command {
        ProjectCommand::Create { name, organization, client } => {
            let organization = id(organization)?;
            let project: ShownProject = connect(&client)?.admin()?.create_project(&name, organization).await?.into();
            one(client.output, &project, format_args!("created project {} ({})", project.name, project.id))
        }
        ProjectCommand::List { organization, client } => {
            let organization = id(organization)?;
            let projects = connect(&client)?.admin()?.projects(organization).await?;
            let projects: Vec<ShownProject> = projects.into_iter().map(Into::into).collect();
            let row = |it: &ShownProject| {
                vec![it.name.clone(), it.id.clone(), it.organization.clone(), it.created.clone().unwrap_or_default()]
            };
            list(client.output, &["name", "id", "organization", "created"], &projects, row, "no projects")
        }
    }
}

#[derive(Serialize)]
pub(super) struct ShownApiKey {
    pub(super) id: String,
    pub(super) client_id: String,
    pub(super) name: String,
    pub(super) project: String,
    pub(super) permissions: Vec<String>,
    revoked: bool,
    /// Revoked together with its key ring.
    shredded: bool,
    /// Whether the ring is destroyed by now; absent if the key was not shredded, or the vault did not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    ring_destroyed: Option<bool>,
    /// What its events are sealed under; absent: the ring of the topic.
    pub(super) ring: Option<String>,
    created: Option<String>,
    /// Where the secret went; only when the key was just made.
    #[serde(skip_serializing_if = "Option::is_none")]
    credentials: Option<PathBuf>,
}

impl From<pb::ApiKey> for ShownApiKey {
    fn from(key: pb::ApiKey) -> Self {
        Self {
            created: wire_time(key.created.as_ref()),
            id: key.id,
            client_id: key.client_id,
            name: key.name,
            project: key.project_id,
            permissions: key.permissions,
            revoked: key.revoked,
            shredded: key.shredded,
            ring_destroyed: key.ring_destroyed,
            ring: (!key.ring_id.is_empty()).then_some(key.ring_id),
            credentials: None,
        }
    }
}

impl ShownApiKey {
    pub(super) fn state(&self) -> &'static str {
        match (self.shredded, self.ring_destroyed, self.revoked) {
            (true, Some(true), _) => "revoked, with its events",
            (true, Some(false), _) => "revoked; its ring is still to be destroyed",
            (true, None, _) => "revoked; the vault does not say whether its ring is destroyed",
            (false, _, true) => "revoked",
            (false, _, false) => "active",
        }
    }
}

/// Runs one of the API key commands.
pub(super) async fn api_key(command: ApiKeyCommand) -> anyhow::Result<()> {
    match command {
        ApiKeyCommand::Create { name, permissions, project, ring, own_ring, save, client } => {
            let project = id(project)?;
            let sealing = match ring {
                Some(ring) => Sealing::Ring(ring),
                None if own_ring => Sealing::Own,
                None => Sealing::Topic,
            };
            create_api_key(name, permissions, project, sealing, save, &client).await
        }
        ApiKeyCommand::Describe { key, client } => super::apikey::describe(&key, &client).await,
        ApiKeyCommand::List { project, client } => {
            let project = id(project)?;
            let keys = connect(&client)?.admin()?.api_keys(project).await?;
            let keys: Vec<ShownApiKey> = keys.into_iter().map(Into::into).collect();
            let row = |key: &ShownApiKey| {
                vec![
                    key.name.clone(),
                    key.id.clone(),
                    key.client_id.clone(),
                    key.state().to_owned(),
                    key.permissions.join(" "),
                ]
            };
            list(client.output, &["name", "id", "client id", "state", "permissions"], &keys, row, "no API keys")
        }
        ApiKeyCommand::Revoke { key, shred: true, yes, client } => super::apikey::shred(&key, yes, &client).await,
        ApiKeyCommand::Revoke { key, shred: false, yes, client } => {
            let clients = connect(&client)?;
            let admin = clients.admin()?;
            confirm(yes, &format!("Nobody will be able to log in with API key {key} any more."))?;
            let revoked: ShownApiKey = admin.revoke_api_key(&key).await?.unwrap_or_default().into();
            one(client.output, &revoked, format_args!("revoked API key {key}"))
        }
    }
}

async fn create_api_key(
    name: String,
    permissions: Vec<String>,
    project: Option<ensign_proto::ProjectId>,
    sealing: Sealing,
    save: Option<PathBuf>,
    client: &ClientArgs,
) -> anyhow::Result<()> {
    let path = save.unwrap_or_else(|| PathBuf::from(format!("apikey-{}.json", file_name(&name))));
    let print = path == Path::new("-");
    // Before the key is made: a secret that cannot be saved would be lost.
    let file = if print { None } else { Some(create_private(&path)?) };
    let clients = connect(client)?;
    let reply = match create(&clients, &name, project, permissions, sealing).await {
        Ok(reply) => reply,
        Err(error) => {
            if file.is_some() {
                // Empty, and ours.
                let _ = std::fs::remove_file(&path);
            }
            return Err(error);
        }
    };
    let key = reply.key.unwrap_or_default();
    let text = credentials_text(client, &key.client_id, &reply.client_secret)?;
    if let Some(mut file) = file {
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).with_context(|| {
            format!("cannot write {}; the new key {} is useless, revoke it", path.display(), key.id)
        })?;
    }
    let mut shown = ShownApiKey::from(key);
    if print {
        return line(text.trim_end());
    }
    shown.credentials = Some(path.clone());
    let sentence = format!("created API key {} ({}); its credentials are in {}", shown.name, shown.id, path.display());
    one(client.output, &shown, sentence)
}

async fn create(
    clients: &Clients,
    name: &str,
    project: Option<ensign_proto::ProjectId>,
    permissions: Vec<String>,
    sealing: Sealing,
) -> anyhow::Result<pb::CreateApiKeyReply> {
    let admin = clients.admin()?;
    let project = match project {
        Some(project) => Some(project),
        None => clients.project_id().await?,
    };
    Ok(admin.create_api_key_sealed(name, project, permissions, sealing).await?)
}

/// The credentials file of a new key: the two values that every SDK reads, and where the cluster is.
fn credentials_text(client: &ClientArgs, client_id: &str, secret: &str) -> anyhow::Result<String> {
    let (options, _) = Options::from_file(ensign_client::CredentialsFile::read(&client.credentials)?);
    let document = serde_json::json!({
        "ClientID": client_id,
        "ClientSecret": secret,
        "endpoint": client.endpoint.clone().unwrap_or_else(|| options.endpoints.join(",")),
        "auth_url": client.auth_url.clone().unwrap_or_else(|| options.auth_urls.join(",")),
        "insecure": client.insecure.unwrap_or(options.insecure),
    });
    Ok(format!("{document:#}\n"))
}

fn create_private(path: &Path) -> anyhow::Result<std::fs::File> {
    std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|error| UsageError(format!("cannot create {}: {error}", path.display())).into())
}

fn file_name(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '-' }).collect()
}

#[derive(Serialize)]
struct ShownNode {
    status: String,
    version: String,
    uptime_seconds: u64,
}

#[derive(Serialize)]
struct ShownCluster {
    cluster: String,
    answered_by: u64,
    version: String,
    uptime_seconds: u64,
    nodes: Vec<ShownPeer>,
    groups: Vec<ShownGroup>,
}

#[derive(Serialize)]
struct ShownPeer {
    id: u64,
    address: String,
    leads: u64,
}

#[derive(Serialize)]
struct ShownGroup {
    id: u64,
    name: String,
    term: u64,
    leader: Option<u64>,
    last_log_index: u64,
    committed_index: u64,
    applied_index: u64,
    replicas: Vec<ShownReplica>,
}

#[derive(Serialize)]
struct ShownReplica {
    node: u64,
    voter: bool,
    lag: u64,
}

impl From<pb::GroupStatus> for ShownGroup {
    fn from(group: pb::GroupStatus) -> Self {
        let replicas = group.replicas.iter().map(|it| ShownReplica { node: it.node_id, voter: it.voter, lag: it.lag });
        Self {
            id: group.id,
            term: group.term,
            leader: (group.leader > 0).then_some(group.leader),
            last_log_index: group.last_log_index,
            committed_index: group.committed_index,
            applied_index: group.applied_index,
            replicas: replicas.collect(),
            name: group.name,
        }
    }
}

/// Runs `ensign status`.
pub(super) async fn status(args: StatusArgs) -> anyhow::Result<()> {
    let output = args.client.output;
    let clients = connect(&args.client)?;
    if !clients.has_admin() {
        let state = clients.project.status().await?;
        let node = ShownNode {
            status: format!("{:?}", state.status).to_lowercase(),
            version: state.version,
            uptime_seconds: state.uptime.as_secs(),
        };
        let fields = [
            ("status", node.status.clone()),
            ("version", node.version.clone()),
            ("uptime", humantime::format_duration(std::time::Duration::from_secs(node.uptime_seconds)).to_string()),
        ];
        return record(output, &node, &fields);
    }
    let reply = clients.admin()?.cluster_status().await?;
    let uptime = reply.uptime.and_then(|it| std::time::Duration::try_from(it).ok()).unwrap_or_default();
    let cluster = ShownCluster {
        cluster: reply.cluster_id,
        answered_by: reply.node_id,
        version: reply.version,
        uptime_seconds: uptime.as_secs(),
        nodes: reply
            .nodes
            .into_iter()
            .map(|it| ShownPeer { id: it.id, address: it.address, leads: it.leads })
            .collect(),
        groups: reply.groups.into_iter().map(Into::into).collect(),
    };
    if output == super::Output::Json {
        return super::output::json(&cluster);
    }
    line(format_args!(
        "cluster {}, answered by node {} (version {})",
        cluster.cluster, cluster.answered_by, cluster.version
    ))?;
    let node_row = |it: &ShownPeer| vec![it.id.to_string(), it.address.clone(), it.leads.to_string()];
    list(output, &["node", "address", "leads groups"], &cluster.nodes, node_row, "no nodes")?;
    let group_row = |it: &ShownGroup| {
        let lag = it.replicas.iter().map(|replica| format!("{}: {}", replica.node, replica.lag));
        vec![
            it.id.to_string(),
            it.name.clone(),
            it.leader.map_or_else(|| "none".to_owned(), |leader| leader.to_string()),
            it.term.to_string(),
            thousands(it.committed_index),
            lag.collect::<Vec<_>>().join(", "),
        ]
    };
    list(
        output,
        &["group", "holds", "leader", "term", "committed", "lag by node"],
        &cluster.groups,
        group_row,
        "no groups",
    )
}
