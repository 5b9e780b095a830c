//! `ensign cluster`: the first node, those that join it, and all of them at one look.

pub(super) mod status;
mod version;

use std::time::Duration;

use ensign_client::{CallError, admin_api as pb};
use ensign_raft::env::{Clock as _, OsRng, SystemClock};
use serde::Serialize;

use super::args::{ClusterCommand, ClusterInitArgs, ClusterJoinArgs, NodeArgs, Output, TokenCommand};
use super::connect::connect;
use super::exit::UsageError;
use super::output::{json, line, list, note, one, wire_time};
use crate::config::Label;
use crate::join::{self, InitSpec, JoinSpec, Token};

/// Runs one of the cluster commands.
pub(super) async fn run(command: ClusterCommand) -> anyhow::Result<()> {
    match command {
        ClusterCommand::Init(args) => init(args),
        ClusterCommand::Token(command) => token(command).await,
        ClusterCommand::Join(args) => join(args).await,
        ClusterCommand::Status(args) => status::run(args).await,
        ClusterCommand::Version { client } => version::show(&client).await,
        ClusterCommand::Upgrade { to, without, client } => version::upgrade(to, &without, &client).await,
    }
}

#[derive(Serialize)]
struct ShownInit {
    cluster: String,
    config: String,
    authority: String,
    authority_key: String,
    root_key: String,
}

fn place(args: &NodeArgs) -> anyhow::Result<[Label; 3]> {
    let label = |what: &str, text: &str| -> Result<Label, UsageError> {
        text.parse().map_err(|message: String| UsageError(format!("--{what}: {message}")))
    };
    let (region, zone) = (label("region", &args.region)?, label("zone", &args.zone)?);
    if region.as_str().is_empty() || zone.as_str().is_empty() {
        return Err(UsageError("--region and --zone are not empty: leave them out for \"local\"".to_owned()).into());
    }
    Ok([label("name", args.name.as_deref().unwrap_or_default())?, region, zone])
}

fn init(args: ClusterInitArgs) -> anyhow::Result<()> {
    let [name, region, zone] = place(&args.node)?;
    let (dir, data_dir, root_key) = (args.node.dir, args.node.data_dir, args.node.root_key);
    let (node, address) = (ensign_proto::NodeId(args.node_id), args.address);
    let spec = InitSpec { node, name, region, zone, address, dir, data_dir, root_key };
    let made = join::init(&spec, SystemClock.wall(), &OsRng).map_err(usage)?;
    let shown = ShownInit {
        cluster: made.cluster.to_string(),
        config: made.config.display().to_string(),
        authority: made.authority.display().to_string(),
        authority_key: made.authority_key.display().to_string(),
        root_key: spec.root_key.display().to_string(),
    };
    match args.output {
        Output::Json => json(&shown),
        Output::Human => line(format_args!(
            "made cluster {cluster}: its certificate authority, and the first node's certificate and settings

Next, on this machine:
  ensign serve --config {config} --bootstrap --authority-key {key}

Then keep safe, off this machine:
  {key}    whoever has it can make nodes; the vault keeps a copy, so delete it here once the cluster runs
  {root}    made by --bootstrap; losing every copy of it loses all data

For each further machine, `ensign cluster token create` prints what to run there.",
            cluster = shown.cluster,
            config = shown.config,
            key = shown.authority_key,
            root = shown.root_key,
        )),
    }
}

/// What a node said, as for every other call; or that none could be reached, which may be tried again.
fn of_join(error: anyhow::Error) -> anyhow::Error {
    match error.downcast::<tonic::Status>() {
        Ok(status) => CallError::from(status).into(),
        Err(error)
            if error.chain().any(|cause| cause.is::<std::io::Error>() || cause.is::<tokio::time::error::Elapsed>()) =>
        {
            let message = format!("{error:#}");
            anyhow::Error::new(CallError::Unavailable { message })
        }
        Err(error) => usage(error),
    }
}

/// What was typed cannot be carried out as things are on this machine.
fn usage(error: anyhow::Error) -> anyhow::Error {
    if error.chain().any(<dyn std::error::Error>::is::<std::io::Error>) {
        error
    } else {
        UsageError(format!("{error:#}")).into()
    }
}

#[derive(Serialize)]
struct ShownToken {
    id: String,
    created: Option<String>,
    expires: Option<String>,
    uses: u32,
    used: u32,
    revoked: bool,
    /// Only when it was just made.
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<String>,
}

impl From<pb::JoinToken> for ShownToken {
    fn from(token: pb::JoinToken) -> Self {
        Self {
            created: wire_time(token.created.as_ref()),
            expires: wire_time(token.expires.as_ref()),
            id: token.id,
            uses: token.uses,
            used: token.used,
            revoked: token.revoked,
            token: None,
        }
    }
}

async fn token(command: TokenCommand) -> anyhow::Result<()> {
    match command {
        TokenCommand::Create { ttl, uses, client } => {
            let ttl: Duration = ttl.into();
            let reply = connect(&client)?.admin()?.create_join_token(ttl, uses).await?;
            let mut shown: ShownToken = reply.token.unwrap_or_default().into();
            shown.token = Some(reply.secret.clone());
            let until = shown.expires.clone().unwrap_or_default();
            one(client.output, &shown, reply.secret)?;
            // Beside the answer, so that `ensign cluster token create > FILE` makes a file for --token-file.
            note(format_args!(
                "
It lets {uses} machine{s} join until {until}, and is not shown again. On the new machine:
  ensign cluster join --token TOKEN --seed HOST:PORT      HOST:PORT: the peer listener of any node that runs",
                s = if uses == 1 { "" } else { "s" },
            ));
            Ok(())
        }
        TokenCommand::List { client } => {
            let tokens = connect(&client)?.admin()?.join_tokens().await?;
            let tokens: Vec<ShownToken> = tokens.into_iter().map(Into::into).collect();
            let row = |token: &ShownToken| {
                let state =
                    if token.revoked { "revoked".to_owned() } else { format!("{} of {}", token.used, token.uses) };
                vec![token.id.clone(), state, token.expires.clone().unwrap_or_default()]
            };
            list(client.output, &["id", "used", "expires"], &tokens, row, "no join tokens")
        }
        TokenCommand::Revoke { id, client } => {
            connect(&client)?.admin()?.revoke_join_token(&id).await?;
            let shown = serde_json::json!({ "id": id, "revoked": true });
            one(client.output, &shown, format_args!("revoked join token {id}"))
        }
    }
}

#[derive(Serialize)]
struct ShownJoin {
    node: u64,
    name: String,
    cluster: String,
    address: String,
    config: String,
    root_key: String,
}

async fn join(args: ClusterJoinArgs) -> anyhow::Result<()> {
    let [name, region, zone] = place(&args.node)?;
    let text = match (args.token, args.token_file) {
        (Some(token), _) => zeroize::Zeroizing::new(token),
        (None, Some(path)) => {
            let unreadable = |error| UsageError(format!("cannot read the token file {}: {error}", path.display()));
            zeroize::Zeroizing::new(std::fs::read_to_string(&path).map_err(unreadable)?)
        }
        (None, None) => return Err(UsageError("name the token with --token or --token-file".to_owned()).into()),
    };
    let token: Token = text.parse().map_err(UsageError)?;
    let spec = JoinSpec {
        token,
        seeds: args.seeds,
        name,
        region,
        zone,
        address: args.address,
        dir: args.node.dir,
        data_dir: args.node.data_dir,
        root_key: args.node.root_key,
    };
    let joined = join::join(&spec).await.map_err(of_join)?;
    let shown = ShownJoin {
        node: joined.node.0,
        name: joined.name,
        cluster: joined.cluster.to_string(),
        address: joined.address,
        config: joined.config.display().to_string(),
        root_key: joined.root_key.display().to_string(),
    };
    match args.output {
        Output::Json => json(&shown),
        Output::Human => line(format_args!(
            "joined cluster {} as node {} ({}); the others will reach it at {}

Next, on this machine:
  ensign serve --config {}

If this node is to open the vault, copy the root key to {} first (mode 0600); without it the node's vault stays sealed, and
other nodes have to lead it.",
            shown.cluster, shown.node, shown.name, shown.address, shown.config, shown.root_key
        )),
    }
}
