//! `ensign vault`: is it sealed, seal it, unseal it.

use std::fs::File;
use std::io::{IsTerminal as _, Read, Write as _};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use ensign_client::CallError;
use ensign_keyvault::{PASSPHRASE_BYTES, Passphrase};
use ensign_proto::pb::admin::v1 as pb;
use ensign_proto::pb::admin::v1::local_client::LocalClient;
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use serde::Serialize;
use tonic::transport::{Channel, Endpoint};
use zeroize::Zeroizing;

use super::args::{Output, ReportArgs, VaultCommand};
use super::cluster::status::watching;
use super::connect::connect;
use super::exit::UsageError;
use super::output::{self, line, list, note};
use super::until_interrupted;

/// How long the node may take: a passphrase that needs two gigabytes is checked for seconds.
const PATIENCE: Duration = Duration::from_secs(90);

/// Runs `ensign vault`.
pub(super) async fn run(command: VaultCommand) -> anyhow::Result<()> {
    match command {
        VaultCommand::Status(args) => status(args).await,
        VaultCommand::Unseal { passphrase_fd, socket, output } => unseal(&socket.socket, passphrase_fd, output).await,
        VaultCommand::Seal { yes, local, socket, client } => {
            let what = "Every node will stop publishing and reading within seconds, until somebody unseals the vault on its machine";
            output::agree(yes, what)?;
            let sealed = if local {
                let mut node = reach(&socket.socket).await?;
                node.local_seal_vault(pb::SealVaultRequest {}).await.map_err(CallError::from)?.into_inner()
            } else {
                connect(&client)?.admin()?.seal_vault().await?
            };
            show_sealed(client.output, &sealed)
        }
    }
}

#[derive(Serialize)]
struct ShownStatus {
    /// An operator has sealed the vault, for all nodes.
    held: bool,
    /// Who leads the vault; none, where no node that answers does.
    leader: Option<u64>,
    /// Rises with every destruction of a key.
    epoch: u64,
    root_key: Option<ShownRoot>,
    nodes: Vec<ShownNode>,
}

#[derive(Serialize)]
struct ShownRoot {
    provider: String,
    id: String,
    version: u32,
    reference: String,
}

#[derive(Serialize)]
struct ShownNode {
    node: u64,
    /// `unsealed`, `sealed`, `silent`, or `unknown` of a node of an older build that is not sealed.
    state: &'static str,
    why: String,
    votes: Option<bool>,
    /// What the node is set to.
    provider: Option<String>,
    lease_left_seconds: Option<f64>,
}

async fn status(args: ReportArgs) -> anyhow::Result<()> {
    let output = args.client.output;
    watching(&args, |report| show(output, &shown(&report))).await
}

fn shown(report: &pb::ClusterReportReply) -> ShownStatus {
    let vaults = || {
        report.nodes.iter().filter_map(|it| it.report.as_ref()).filter_map(|it| Some((it.node_id, it.vault.as_ref()?)))
    };
    // Whoever has applied most knows best.
    let newest = vaults().max_by_key(|(_, vault)| vault.applied_index).map(|(_, vault)| vault);
    let leads = vaults().filter(|(node, vault)| vault.leader == *node).max_by_key(|(_, vault)| vault.term);
    ShownStatus {
        held: newest.is_some_and(|vault| vault.held),
        leader: leads.map(|(node, _)| node),
        epoch: newest.map_or(0, |vault| vault.epoch),
        root_key: newest.filter(|vault| !vault.root_kind.is_empty()).map(|vault| ShownRoot {
            provider: vault.root_kind.clone(),
            id: vault.root_id.clone(),
            version: vault.root_version,
            reference: vault.root_reference.clone(),
        }),
        nodes: report.nodes.iter().map(shown_node).collect(),
    }
}

fn shown_node(peer: &pb::PeerReport) -> ShownNode {
    let Some(report) = &peer.report else {
        let why = peer.failure.clone();
        return ShownNode {
            node: peer.node_id,
            state: "silent",
            why,
            votes: None,
            provider: None,
            lease_left_seconds: None,
        };
    };
    let state = match &report.vault {
        _ if !report.sealed.is_empty() => "sealed",
        Some(_) => "unsealed",
        None => "unknown",
    };
    let left = report.lease_left.as_ref().map(|left| left.seconds as f64 + f64::from(left.nanos) / 1e9);
    ShownNode {
        node: peer.node_id,
        state,
        why: report.sealed.clone(),
        votes: report.vault.as_ref().map(|vault| vault.voter),
        provider: report.vault.as_ref().map(|vault| vault.provider.clone()),
        lease_left_seconds: left,
    }
}

fn show(output: Output, status: &ShownStatus) -> anyhow::Result<()> {
    if output == Output::Json {
        return output::json(status);
    }
    line(summary(status))?;
    let headings = ["node", "vault", "votes", "leads", "set to", "lease on keys", "why"];
    let row = |node: &ShownNode| row(node, status.leader);
    list(output, &headings, &status.nodes, row, "no nodes")
}

fn summary(status: &ShownStatus) -> String {
    let state = if status.held { "sealed by an operator" } else { "not sealed by anybody" };
    let leader =
        status.leader.map_or_else(|| "no node that answers leads it".to_owned(), |node| format!("led by node {node}"));
    let root = status.root_key.as_ref().map_or_else(String::new, |root| {
        let called = if root.reference.is_empty() { String::new() } else { format!(" ({})", root.reference) };
        format!("; root key {} version {}, kept by {}{called}", root.id, root.version, root.provider)
    });
    format!("vault: {state}, {leader}, epoch {}{root}", status.epoch)
}

fn row(node: &ShownNode, leader: Option<u64>) -> Vec<String> {
    let yes = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
    vec![
        node.node.to_string(),
        node.state.to_owned(),
        node.votes.map_or_else(String::new, yes),
        yes(leader == Some(node.node)),
        node.provider.clone().unwrap_or_default(),
        node.lease_left_seconds.map_or_else(|| "none".to_owned(), |left| format!("{left:.0} s")),
        node.why.clone(),
    ]
}

#[derive(Serialize)]
struct ShownSeal {
    index: u64,
    keys_end_within_seconds: u64,
}

fn show_sealed(output: Output, sealed: &pb::SealVaultReply) -> anyhow::Result<()> {
    let within = sealed.keys_end_within.as_ref().map_or(0, |within| within.seconds + i64::from(within.nanos > 0));
    let shown = ShownSeal { index: sealed.index, keys_end_within_seconds: within.unsigned_abs() };
    output::one(
        output,
        &shown,
        format_args!(
            "the vault is sealed: no key is handed out any more, and keys that nodes hold end within {within} s\n\
             `ensign vault status --direct http://HOST:1205` shows every node; `ensign vault unseal` on one of them lifts the seal"
        ),
    )
}

#[derive(Serialize)]
struct ShownUnseal {
    already: bool,
    lifted: bool,
    sealed: Option<String>,
}

async fn unseal(socket: &Path, fd: Option<u32>, output: Output) -> anyhow::Result<()> {
    let mut node = reach(socket).await?;
    let before = node.local_vault_status(pb::LocalVaultStatusRequest {}).await.map_err(CallError::from)?.into_inner();
    // Who typed a passphrase for an open vault would wonder what it was for; after a restart of all nodes it may still be on its way.
    let typed = before.root_kind == "passphrase" && !before.sealed.is_empty();
    let passphrase = if typed || fd.is_some() {
        let phrase = until_interrupted(passphrase(fd)).await?;
        bytes::Bytes::copy_from_slice(phrase.expose())
    } else {
        bytes::Bytes::new()
    };
    if typed {
        note("checking the passphrase; that takes seconds");
    }
    let request = pb::UnsealVaultRequest { passphrase };
    let reply = until_interrupted(async { Ok(node.unseal_vault(request).await.map_err(CallError::from)?) }).await?;
    let reply = reply.into_inner();
    let sealed = reply.vault.map(|vault| vault.sealed).filter(|why| !why.is_empty());
    let sentence = match (&sealed, reply.already, reply.lifted) {
        (Some(why), _, _) => format!("the root key is right, and the vault is still sealed here: {why}"),
        (None, _, true) => "the vault is unsealed here, and the operator's seal is lifted for all nodes".to_owned(),
        (None, true, false) => "the vault was unsealed here already".to_owned(),
        (None, false, false) => "the vault is unsealed on this node".to_owned(),
    };
    output::one(output, &ShownUnseal { already: reply.already, lifted: reply.lifted, sealed }, sentence)
}

/// Connects to the node of this machine.
async fn reach(socket: &Path) -> anyhow::Result<LocalClient<Channel>> {
    let absolute = std::path::absolute(socket)?;
    let path = absolute.to_str().ok_or_else(|| UsageError(format!("{} is not UTF-8", socket.display())))?;
    let endpoint = Endpoint::from_shared(format!("unix://{path}"))?.timeout(PATIENCE);
    let connected = endpoint.connect().await.map_err(|error| {
        let cause = root_cause(&error);
        let message = format!(
            "cannot reach the node at {path} ({cause}): does it run on this machine, and are you its user or root? \
             --socket wants ensign.sock in its data directory"
        );
        CallError::Unavailable { message }
    })?;
    Ok(LocalClient::new(connected))
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

/// The passphrase: from a file descriptor, from a terminal without showing it, or from standard input.
async fn passphrase(fd: Option<u32>) -> anyhow::Result<Passphrase> {
    let text = match fd {
        Some(fd) => {
            let file = File::open(format!("/dev/fd/{fd}"));
            let file = file.map_err(|error| UsageError(format!("file descriptor {fd} cannot be read: {error}")))?;
            reading(move || whole(file)).await?
        }
        None if std::io::stdin().is_terminal() => {
            let _quiet = Quiet::new().context("cannot keep the terminal from showing the passphrase")?;
            let mut err = std::io::stderr().lock();
            write!(err, "passphrase of the root key: ")?;
            err.flush()?;
            drop(err);
            let text = reading(|| one_line(std::io::stdin().lock())).await;
            note("");
            text?
        }
        None => reading(|| whole(std::io::stdin().lock())).await?,
    };
    Passphrase::new(text).map_err(|error| UsageError(error.to_string()).into())
}

/// Reads on a thread of its own: whoever presses Ctrl-C must not wait for what is never typed.
async fn reading(
    read: impl FnOnce() -> std::io::Result<Zeroizing<Vec<u8>>> + Send + 'static,
) -> anyhow::Result<Zeroizing<Vec<u8>>> {
    let (done, read_here) = tokio::sync::oneshot::channel();
    std::thread::Builder::new().name("passphrase".to_owned()).spawn(move || {
        // Nobody waits any more: then nobody wants it.
        let _ = done.send(read());
    })?;
    read_here.await?.context("cannot read the passphrase")
}

/// Everything, up to one byte more than a passphrase can have; in a buffer that never grows, so that no copy stays behind.
fn whole(from: impl Read) -> std::io::Result<Zeroizing<Vec<u8>>> {
    let limit = PASSPHRASE_BYTES + 3;
    let mut text = Zeroizing::new(Vec::with_capacity(limit + 1));
    from.take(limit as u64).read_to_end(&mut text)?;
    Ok(text)
}

fn one_line(mut from: impl Read) -> std::io::Result<Zeroizing<Vec<u8>>> {
    let limit = PASSPHRASE_BYTES + 3;
    let mut text = Zeroizing::new(Vec::with_capacity(limit));
    let mut byte = [0];
    while text.len() < limit && from.read(&mut byte)? == 1 && byte != *b"\n" {
        text.push(byte[0]);
    }
    Ok(text)
}

/// A terminal that does not show what is typed, until this is dropped.
struct Quiet(Termios);

impl Quiet {
    fn new() -> std::io::Result<Self> {
        let stdin = std::io::stdin();
        let before = tcgetattr(stdin.as_fd())?;
        let mut quiet = before.clone();
        quiet.local_modes.remove(LocalModes::ECHO);
        tcsetattr(stdin.as_fd(), OptionalActions::Flush, &quiet)?;
        Ok(Self(before))
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        // A terminal that is gone shows nothing.
        let _ = tcsetattr(std::io::stdin().as_fd(), OptionalActions::Now, &self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(node: u64, vault: pb::VaultReport) -> pb::PeerReport {
        let report = pb::NodeReport {
            node_id: node,
            sealed: vault.sealed.clone(),
            vault: Some(vault),
            lease_left: Some(prost_types::Duration { seconds: 8, nanos: 600_000_000 }),
            ..Default::default()
        };
        pb::PeerReport { node_id: node, report: Some(report), ..Default::default() }
    }

    #[test]
    fn the_newest_replica_says_how_the_vault_is_and_each_node_how_it_is_itself() {
        let open = pb::VaultReport {
            provider: "passphrase".to_owned(),
            root_kind: "passphrase".to_owned(),
            root_id: "0a".repeat(16),
            root_version: 1,
            leader: 1,
            term: 3,
            epoch: 7,
            voter: true,
            applied_index: 90,
            ..Default::default()
        };
        let behind = pb::VaultReport {
            sealed: "wrong root key".to_owned(),
            provider: "file".to_owned(),
            leader: 2,
            term: 2,
            applied_index: 10,
            ..open.clone()
        };
        let silent = pb::PeerReport { node_id: 3, failure: "connection refused".to_owned(), ..Default::default() };
        let status = shown(&pb::ClusterReportReply {
            nodes: vec![report(1, open.clone()), report(2, behind), silent],
            ..Default::default()
        });
        // Node 2 believes to lead, in a term that is over.
        assert_eq!((status.leader, status.epoch, status.held), (Some(1), 7, false));
        assert_eq!(
            summary(&status),
            format!(
                "vault: not sealed by anybody, led by node 1, epoch 7; root key {} version 1, kept by passphrase",
                "0a".repeat(16)
            )
        );
        let rows: Vec<_> = status.nodes.iter().map(|node| row(node, status.leader)).collect();
        assert_eq!(rows[0], ["1", "unsealed", "yes", "yes", "passphrase", "9 s", ""]);
        assert_eq!(rows[1], ["2", "sealed", "yes", "no", "file", "9 s", "wrong root key"]);
        assert_eq!(rows[2], ["3", "silent", "", "no", "", "none", "connection refused"]);

        let held = pb::VaultReport {
            held: true,
            sealed: "an operator has sealed it".to_owned(),
            applied_index: 91,
            leader: 0,
            ..open
        };
        let status = shown(&pb::ClusterReportReply { nodes: vec![report(1, held)], ..Default::default() });
        assert!(summary(&status).starts_with("vault: sealed by an operator, no node that answers leads it, epoch 7"));
    }

    #[test]
    fn what_is_typed_is_read_to_its_bound_and_not_beyond() {
        assert_eq!(**one_line(&b"a phrase\nmore"[..]).unwrap(), *b"a phrase");
        assert_eq!(**whole(&b"a phrase\n"[..]).unwrap(), *b"a phrase\n");
        assert_eq!(whole(std::io::repeat(b'x')).unwrap().len(), PASSPHRASE_BYTES + 3);
        assert_eq!(one_line(std::io::repeat(b'x')).unwrap().len(), PASSPHRASE_BYTES + 3);
        assert!(Passphrase::new(whole(std::io::repeat(b'x')).unwrap()).is_err());
    }
}
