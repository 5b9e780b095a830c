//! Making a cluster, once: root key, vault, signing key, organization, project, API keys, credentials file.
//!
//! Each step can be repeated: a bootstrap that was cut short is finished by starting it again. Nobody else ever makes a root key.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use ensign_keyvault::Passphrase;
use ensign_proto::PermissionSet;
use ensign_raft::env::OsRng;
use serde::{Deserialize, Serialize};
use tracing::{info, warn};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::authority::Authority;
use crate::config::Config;
use crate::files::write_secret;
use crate::identity::{self, NewApiKey, operator_permissions};
use crate::node::{Addresses, Node, NodeEnd};
use crate::peers::{PeerTls, Peers};
use crate::serve::{Answer, hello};

/// The names of what a bootstrap makes.
const ORGANIZATION: &str = "default";
const PROJECT: &str = "default";

/// How long the first steps may wait for a majority of the nodes.
const QUORUM: Duration = Duration::from_mins(10);

/// Two API keys in clear, and where to use them: the credentials file. SDKs read the first two keys of it.
pub struct Credentials {
    /// A key with every permission in the first project.
    pub key: identity::Credentials,
    /// The operator's key.
    pub admin: identity::Credentials,
    /// Where gRPC is.
    pub endpoint: String,
    /// Where to log in.
    pub auth_url: String,
    /// Whether gRPC is spoken in clear.
    pub insecure: bool,
    /// The authority that signed what clients are shown, where it is known.
    pub ca_file: Option<PathBuf>,
}

/// Where clients find a node.
#[derive(Debug, Clone)]
pub struct Front {
    /// The addresses.
    pub addresses: Addresses,
    /// Whether they speak TLS.
    pub tls: bool,
    /// The authority that clients have to trust, if it is the cluster's.
    pub ca_file: Option<PathBuf>,
}

impl Front {
    /// Where a node with these settings is found.
    pub fn of(config: &Config, addresses: Addresses) -> Self {
        let tls = !config.listen.certificate.as_os_str().is_empty();
        let own = tls && config.listen.certificate == config.cluster.certificate;
        let ca_file = own.then(|| std::path::absolute(&config.cluster.authority).ok()).flatten();
        Self { addresses, tls, ca_file }
    }
}

#[derive(Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
struct KeyPair {
    #[serde(rename = "ClientID")]
    client_id: String,
    #[serde(rename = "ClientSecret")]
    client_secret: String,
}

#[derive(Serialize, Deserialize)]
struct CredentialsFile {
    #[serde(flatten)]
    key: KeyPair,
    endpoint: String,
    auth_url: String,
    insecure: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ca_file: Option<PathBuf>,
    admin: KeyPair,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

impl KeyPair {
    fn of(credentials: &identity::Credentials) -> Self {
        Self {
            client_id: credentials.client_id.as_str().to_owned(),
            client_secret: credentials.secret.expose().to_owned(),
        }
    }

    fn parse(&self) -> anyhow::Result<identity::Credentials> {
        Ok(identity::Credentials {
            client_id: self.client_id.parse()?,
            secret: identity::ClientSecret::parse(self.client_secret.clone())?,
        })
    }
}

impl Credentials {
    /// Fresh keys, which nobody knows yet.
    pub fn generate(front: &Front) -> Self {
        let (endpoint, auth_url) = reached_at(front);
        Self {
            key: identity::Credentials::generate(&OsRng),
            admin: identity::Credentials::generate(&OsRng),
            endpoint,
            auth_url,
            insecure: !front.tls,
            ca_file: front.ca_file.clone(),
        }
    }

    /// Reads a file that [`Credentials::write`] wrote; `None` when there is none.
    ///
    /// # Errors
    /// It cannot be read, or is something else.
    pub fn read(path: &Path) -> anyhow::Result<Option<Self>> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => Zeroizing::new(text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        let parse = || {
            let file: CredentialsFile = serde_json::from_str(&text)?;
            anyhow::Ok(Self {
                key: file.key.parse()?,
                admin: file.admin.parse()?,
                endpoint: file.endpoint,
                auth_url: file.auth_url,
                insecure: file.insecure,
                ca_file: file.ca_file,
            })
        };
        parse().map(Some).with_context(|| format!("{} holds no credentials: move it away", path.display()))
    }

    /// The same keys at other addresses.
    #[must_use]
    pub fn at(mut self, front: &Front) -> Self {
        (self.endpoint, self.auth_url) = reached_at(front);
        (self.insecure, self.ca_file) = (!front.tls, front.ca_file.clone());
        self
    }

    /// Writes the file, for its owner alone; durable when it returns.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        let file = CredentialsFile {
            key: KeyPair::of(&self.key),
            endpoint: self.endpoint.clone(),
            auth_url: self.auth_url.clone(),
            insecure: self.insecure,
            ca_file: self.ca_file.clone(),
            admin: KeyPair::of(&self.admin),
        };
        let text = Zeroizing::new(serde_json::to_string_pretty(&file)? + "\n");
        Ok(write_secret(path, text.as_bytes())?)
    }
}

/// How clients on this machine reach the addresses.
fn reached_at(front: &Front) -> (String, String) {
    let addresses = front.addresses;
    let scheme = if front.tls { "https" } else { "http" };
    let host = |address: std::net::SocketAddr| match address.ip() {
        ip if ip.is_loopback() || ip.is_unspecified() => "localhost".to_owned(),
        ip => ip.to_string(),
    };
    (
        format!("{}:{}", host(addresses.grpc), addresses.grpc.port()),
        format!("{scheme}://{}:{}", host(addresses.http), addresses.http.port()),
    )
}

/// Refuses to make a second cluster beside one that a peer knows.
///
/// # Errors
/// A peer belongs to a cluster, or the certificates cannot be used.
pub async fn refuse_second(config: &Config, tls: &PeerTls) -> anyhow::Result<()> {
    let peers = Peers::new(config.node_id(), None, &config.cluster.peers, tls);
    for peer in peers.others() {
        match hello(&peers, peer).await? {
            Answer::Cluster(cluster) => {
                bail!(
                    "node {peer} belongs to cluster {cluster} already: start this node without --bootstrap to join it"
                );
            }
            Answer::Stranger(why) => bail!(why),
            Answer::Removed => return Err(NodeEnd::removed(config.node_id()).into()),
            Answer::Nothing => {}
        }
    }
    Ok(())
}

/// Makes everything that the first client needs. The credentials are kept in `kept` before they are made valid, so that a
/// crash at any point is repaired by running this again. `phrase` is what the vault's root key is made of, where it is made of one.
///
/// # Errors
/// No majority of the nodes came up in time, or a step failed; start again to go on.
pub async fn run(
    node: &Node,
    kept: &Path,
    addresses: Addresses,
    authority: Option<&Authority>,
    phrase: Option<&Passphrase>,
) -> anyhow::Result<Credentials> {
    let front = Front::of(node.config(), addresses);
    let credentials = match Credentials::read(kept)? {
        Some(credentials) => credentials.at(&front),
        None => Credentials::generate(&front),
    };
    credentials.write(kept)?;
    info!("waiting for a majority of the nodes");
    tokio::time::timeout(QUORUM, node.quorum()).await.context(
        "no majority of the nodes came up: start the other nodes, with the root key on each, and start this one again",
    )??;
    node.vault().initialize(QUORUM, phrase).await.context("cannot initialize the vault")?;
    node.upgrades().begin().await.context("cannot give the cluster its version")?;
    match node.receipt_fingerprint().await {
        Ok(Some(fingerprint)) => info!(
            fingerprint,
            "the vault signs receipts of what it destroys: keep this fingerprint outside the cluster, `ensign receipt verify` asks for it"
        ),
        Ok(None) => {}
        // The cluster is good without it.
        Err(error) => {
            warn!(%error, "the fingerprint of the receipt key is not known yet: /.well-known/ensign-receipts.json has it later");
        }
    }
    if let Some(authority) = authority {
        node.joins().import(authority).await.context("the vault cannot take over the certificate authority's key")?;
    }
    let identity = node.identity();
    identity.ensure_signing_key().await.context("cannot make the token-signing key")?;
    let org = identity.ensure_organization(ORGANIZATION).await.context("cannot make the first organization")?;
    let project = identity.ensure_project(org.id, PROJECT).await.context("cannot make the first project")?;
    let new = |name: &str, permissions, admin| NewApiKey {
        name: name.to_owned(),
        org: org.id,
        project: Some(project.id),
        permissions,
        admin,
        ring: None,
    };
    let key = new("first key", PermissionSet::api_key(), false);
    identity.ensure_api_key(key, &credentials.key).await.context("cannot make the first API key")?;
    let operator = new("operator", operator_permissions(), true);
    identity.ensure_api_key(operator, &credentials.admin).await.context("cannot make the operator's API key")?;
    Ok(credentials)
}
