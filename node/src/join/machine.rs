//! The machine that joins: makes its key, checks the cluster, asks, and writes down what it was given.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use ensign_proto::pb::peer::v1::join_client::JoinClient;
use ensign_proto::pb::peer::v1::{JoinReply, JoinRequest};
use ensign_proto::{ClusterId, NodeId};
use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, KeyPair};
use rustls::ClientConfig;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Endpoint, Uri};
use zeroize::Zeroizing;

use super::Token;
use super::init::check_address;
use super::settings::{HEADLINE, Settings};
use crate::config::{Label, PeerAddress};
use crate::files::{write_public, write_secret};
use crate::peers::{JOIN_ALPN, PinnedAuthority};
use crate::plant;

/// How long a connection may take, and how long the answer.
const CONNECT: Duration = Duration::from_secs(10);
const ANSWER: Duration = Duration::from_mins(1);

/// What `ensign cluster join` was told.
#[derive(Debug)]
pub struct JoinSpec {
    /// The token.
    pub token: Token,
    /// Peer listeners of nodes that run, tried in this order.
    pub seeds: Vec<String>,
    /// How the node wants to be called; empty: after its number.
    pub name: Label,
    /// Where it stands.
    pub region: Label,
    /// Where in the region.
    pub zone: Label,
    /// Where the others will reach its peer listener; none: at the address that it reaches the seed from, port 5357.
    pub address: Option<String>,
    /// Where to write its certificate, key and settings.
    pub dir: PathBuf,
    /// Where it will keep its data.
    pub data_dir: PathBuf,
    /// Where the root key will be.
    pub root_key: PathBuf,
}

/// What became of it.
#[derive(Debug)]
pub struct Joined {
    /// The node's number.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// The cluster.
    pub cluster: ClusterId,
    /// Where the others will reach it.
    pub address: String,
    /// The settings to start it with.
    pub config: PathBuf,
    /// Where the root key has to be.
    pub root_key: PathBuf,
}

/// Joins, and writes `node.key`, `node.pem`, `ca.pem` and `ensign.toml` into the folder. The private key never leaves the machine. If
/// the answer got lost, the same call again answers the same number.
///
/// # Errors
/// The folder has another node's files, no seed can be reached, the cluster is another one, or it refuses.
pub async fn join(spec: &JoinSpec) -> anyhow::Result<Joined> {
    fs::create_dir_all(&spec.dir).with_context(|| format!("cannot make the folder {}", spec.dir.display()))?;
    let (certificate, config) = (spec.dir.join("node.pem"), spec.dir.join("ensign.toml"));
    // What an earlier attempt wrote may be written again.
    let foreign = config.exists() && !fs::read_to_string(&config).is_ok_and(|text| text.starts_with(HEADLINE));
    let used = [certificate.exists().then_some(certificate), foreign.then_some(config)];
    if let Some(path) = used.into_iter().flatten().next() {
        bail!("{} exists already: this folder belongs to a node; choose another one with --dir", path.display());
    }
    spec.address.as_deref().map(check_address).transpose()?;
    let key = own_key(&spec.dir.join("node.key"))?;
    let request = CertificateParams::default().serialize_request(&key).context("cannot make a certificate request")?;
    let mut failure = anyhow::anyhow!("name a node of the cluster with --seed HOST:PORT (its peer listener)");
    for seed in &spec.seeds {
        match ask(spec, seed, request.der()).await {
            Ok((reply, address)) => return write_down(spec, &reply, address),
            // What one node refuses, the others refuse as well.
            Err(error) if is_answer(&error) => return Err(error),
            Err(error) => failure = error.context(format!("cannot join through {seed}")),
        }
    }
    Err(failure)
}

/// Whether a node said no, rather than nothing.
fn is_answer(error: &anyhow::Error) -> bool {
    let code = error.downcast_ref::<tonic::Status>().map(tonic::Status::code);
    code.is_some_and(|code| {
        !matches!(code, tonic::Code::Unavailable | tonic::Code::DeadlineExceeded | tonic::Code::Unknown)
    })
}

/// The key of an earlier attempt, or a new one.
fn own_key(path: &Path) -> anyhow::Result<KeyPair> {
    if path.exists() {
        let text = Zeroizing::new(fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?);
        return KeyPair::from_pem(&text).with_context(|| format!("{} is no private key: move it away", path.display()));
    }
    let key = KeyPair::generate().context("cannot make a key")?;
    write_secret(path, Zeroizing::new(key.serialize_pem()).as_bytes())?;
    Ok(key)
}

async fn ask(spec: &JoinSpec, seed: &str, request: &[u8]) -> anyhow::Result<(JoinReply, String)> {
    let stream = tokio::time::timeout(CONNECT, TcpStream::connect(seed)).await.context("no answer in time")??;
    let own = stream.local_addr()?.ip();
    let address = spec.address.clone().unwrap_or_else(|| SocketAddr::from((own, 5357)).to_string());
    let pinned = Arc::new(PinnedAuthority::new(spec.token.fingerprint));
    let mut tls = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(pinned)
        .with_no_client_auth();
    tls.alpn_protocols = vec![JOIN_ALPN.to_vec()];
    // Which node answers does not matter, and is not known: what it has to show is the authority.
    let any = rustls::pki_types::ServerName::try_from("ensign-node")?;
    let handshake = TlsConnector::from(Arc::new(tls)).connect(any, stream);
    let stream = tokio::time::timeout(CONNECT, handshake).await.context("no answer in time")??;
    let mut once = Some(TokioIo::new(stream));
    let channel = Endpoint::from_static("http://ensign-node")
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let stream = once.take().ok_or_else(|| std::io::Error::other("the connection broke off"));
            async move { stream }
        }))
        .await?;
    let mut message = tonic::Request::new(JoinRequest {
        token: spec.token.id.to_bytes().to_vec().into(),
        secret: spec.token.secret.to_vec().into(),
        request: request.to_vec().into(),
        name: spec.name.to_string(),
        region: spec.region.to_string(),
        zone: spec.zone.to_string(),
        address: address.clone(),
        newest_version: plant::newest_version()?.0,
    });
    message.set_timeout(ANSWER);
    let reply = JoinClient::new(channel).join(message).await?.into_inner();
    Ok((reply, address))
}

fn write_down(spec: &JoinSpec, reply: &JoinReply, address: String) -> anyhow::Result<Joined> {
    let node = NodeId(reply.node);
    let cluster = ClusterId::try_from(&reply.cluster[..]).context("the answer names no cluster")?;
    if crate::authority::fingerprint(&reply.authority) != spec.token.fingerprint {
        bail!("the answer carries another authority than the one that the token names");
    }
    let dir = std::path::absolute(&spec.dir)?;
    let peers = reply.peers.iter().map(|peer| PeerAddress { id: NodeId(peer.node), address: peer.address.clone() });
    let mut peers: Vec<PeerAddress> = peers.filter(|peer| peer.id != node && !peer.address.is_empty()).collect();
    peers.push(PeerAddress { id: node, address: address.clone() });
    peers.sort_by_key(|peer| peer.id);
    let settings = Settings {
        node,
        name: &reply.name,
        region: spec.region.as_str(),
        zone: spec.zone.as_str(),
        data_dir: &spec.data_dir,
        root_key: &spec.root_key,
        dir: &dir,
        peers: &peers,
        address: &address,
    };
    write_public(&dir.join("ca.pem"), pem("CERTIFICATE", &reply.authority).as_bytes())?;
    let config = dir.join("ensign.toml");
    write_public(&config, settings.text().as_bytes())?;
    // Last: a folder without it is one that another attempt may finish.
    write_public(&dir.join("node.pem"), pem("CERTIFICATE", &reply.certificate).as_bytes())?;
    let (name, root_key) = (reply.name.clone(), spec.root_key.clone());
    Ok(Joined { node, name, cluster, address, config, root_key })
}

/// DER bytes as PEM text.
pub(super) fn pem(label: &str, der: &[u8]) -> String {
    use base64::Engine as _;
    let body = base64::engine::general_purpose::STANDARD.encode(der);
    let lines: Vec<&str> = body.as_bytes().chunks(64).filter_map(|line| std::str::from_utf8(line).ok()).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}
