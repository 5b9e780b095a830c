//! `ensign serve`: one node of a cluster.

use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use ensign_proto::pb::peer::v1::HelloRequest;
use ensign_proto::pb::peer::v1::peer_client::PeerClient;
use ensign_proto::{ClusterId, NodeId};
use ensign_raft::env::{Clock as _, OsRng, Rng as _, Stop, SystemClock};
use tokio::net::TcpListener;
use tracing::{info, warn};

use crate::authority::Authority;
use crate::bootstrap;
use crate::certificates::ClientTls;
use crate::cli::{ServeArgs, UsageError};
use crate::config::{Config, Provider};
use crate::files::{NodeFile, write_secret};
use crate::node::{Addresses, Listeners, Node, NodeEnd, NodeSpec};
use crate::peers::{Ended, PeerTls, Peers, Speaks, is_refusal};
use crate::{door, harden, plant, root, signals, telemetry};

/// How often a new node asks its peers which cluster it belongs to.
const HELLO_EVERY: Duration = Duration::from_millis(500);

/// Runs a node until SIGINT or SIGTERM.
///
/// # Errors
/// The configuration is wrong, an address is taken, the data directory cannot be used, or the node fails.
pub async fn run(args: ServeArgs) -> anyhow::Result<()> {
    let config = Config::load(args.config.as_deref(), args.settings.clone())?;
    telemetry::start_logs(&config.log)?;
    door::raise_open_files();
    harden::no_core_dumps();
    let stop = signals::stop()?;
    let id = config.node_id();
    let Checked { tls, client_tls } = check(&config)?;
    check_bootstrap(&args, &config)?;
    std::fs::create_dir_all(&config.node.data_dir)
        .with_context(|| format!("cannot make the data directory {}", config.node.data_dir.display()))?;

    // Once more: now the directory is there.
    check_root_key(&config)?;

    let known = NodeFile::read(&config.node.data_dir, id)?;
    if let Some((file, _)) = &known {
        file.check_version(&config.node.data_dir, plant::newest_version()?)?;
    }
    let known = known.map(|(_, cluster)| cluster);
    let done = config.node.data_dir.join("bootstrapped");
    if args.bootstrap && done.exists() {
        return Err(
            UsageError("this cluster was bootstrapped already: start the node without --bootstrap".to_owned()).into()
        );
    }
    let cluster = match (known, args.bootstrap) {
        (Some(cluster), _) => cluster,
        (None, true) => {
            bootstrap::refuse_second(&config, &tls).await?;
            tls.cluster().unwrap_or_else(fresh_cluster)
        }
        (None, false) => match stop.run_until_cancelled(ask_peers(&config, &tls, &stop)).await {
            Some(cluster) => cluster?,
            None => return Ok(()),
        },
    };
    let phrase = if args.bootstrap { root::make(&config, &args.root_passphrase)? } else { None };

    if let Some(certified) = tls.cluster().filter(|certified| *certified != cluster) {
        let (certificate, data_dir) = (config.cluster.certificate.display(), config.node.data_dir.display());
        return Err(UsageError(format!(
            "the certificate {certificate} is for cluster {certified}, and the data directory {data_dir} belongs to cluster {cluster}: \
             correct one of the two settings"
        ))
        .into());
    }
    let authority = load_authority(&config, args.authority_key.as_deref())?;
    if args.bootstrap && authority.is_none() {
        warn!(
            "no --authority-key: the cluster will never sign certificates, and no machine can join it by token; nodes are added with certificates made by hand"
        );
    }
    warn_of_plaintext(&config);
    let listeners = Listeners {
        tls: client_tls,
        grpc: Some(bind("listen.grpc", config.listen.grpc).await?),
        http: Some(bind("listen.http", config.listen.http).await?),
        metrics: Some(bind("listen.metrics", config.listen.metrics).await?),
        peers: bind("listen.peers", config.listen.peers).await?,
    };
    let addresses = Addresses::of(&listeners)?;
    // Only the node that makes the cluster may found its groups; the others are found by it.
    let initialize = args.bootstrap;
    let node = Node::start(NodeSpec { config, cluster, listeners, tls: tls.clone(), initialize }).await?;
    node.keep_certificates(tls);

    let outcome = async {
        if args.bootstrap {
            let kept = node.config().node.data_dir.join("credentials.json");
            let credentials = bootstrap::run(&node, &kept, addresses, authority.as_ref(), phrase.as_ref()).await?;
            credentials.write(&args.credentials)?;
            // The secrets are with the operator now; the node keeps no copy.
            let _ = std::fs::remove_file(&kept);
            write_secret(&done, b"")?;
            info!(credentials = %args.credentials.display(), "the cluster is made");
        }
        node.serve().await?;
        let mut out = std::io::stdout().lock();
        writeln!(out, "ready")?;
        out.flush()?;
        anyhow::Ok(())
    };
    let failure: Option<anyhow::Error> = tokio::select! {
        biased;
        () = stop.cancelled() => None,
        // Also on the way to serving: a node that its cluster is too new for would wait for a quorum for ever.
        end = node.failed() => Some(end.into()),
        failure = async {
            match outcome.await {
                Ok(()) => std::future::pending().await,
                Err(error) => error,
            }
        } => Some(failure),
    };
    if failure.is_none() {
        node.hand_over().await;
    }
    node.drain().await;
    node.close().await;
    failure.map_or(Ok(()), Err)
}

/// What the files of settings hold.
pub(crate) struct Checked {
    tls: PeerTls,
    client_tls: Option<ClientTls>,
}

/// Checks settings against the machine, without touching anything: what `ensign config check` says, `serve` says too.
///
/// # Errors
/// [`UsageError`], or [`TlsError`](crate::peers::TlsError): a setting or a file is wrong.
pub(crate) fn check(config: &Config) -> anyhow::Result<Checked> {
    check_peers(config)?;
    let cluster = &config.cluster;
    let tls = PeerTls::load(config.node_id(), &cluster.certificate, &cluster.private_key, &cluster.authority)?;
    let client_tls = ClientTls::load(&config.listen)?;
    let data_dir = &config.node.data_dir;
    if data_dir.exists() && !data_dir.is_dir() {
        return Err(UsageError(format!("node.data_dir = \"{}\" is no directory", data_dir.display())).into());
    }
    check_root_key(config)?;
    Ok(Checked { tls, client_tls })
}

/// A node needs others to be one of a cluster, be it none but itself.
///
/// # Errors
/// [`UsageError`].
pub(crate) fn check_peers(config: &Config) -> Result<(), UsageError> {
    if config.cluster.peers.is_empty() {
        let what = "cluster.peers is empty: name every node of the cluster, this one included, as ID=HOST:PORT";
        return Err(UsageError(what.to_owned()));
    }
    Ok(())
}

fn check_root_key(config: &Config) -> anyhow::Result<()> {
    if config.root.provider == Provider::File && config.node.data_dir.exists() {
        refuse_key_beside_data(&config.node.root_key, &config.node.data_dir)?;
    }
    Ok(())
}

/// A cluster is given its authority when it is made, or never: outside one machine, that is said and not forgotten.
fn check_bootstrap(args: &ServeArgs, config: &Config) -> Result<(), UsageError> {
    let chosen = args.authority_key.is_some() || args.own_certificates || config.listen.peers.ip().is_loopback();
    if !args.bootstrap || chosen {
        return Ok(());
    }
    Err(UsageError(
        "--bootstrap without --authority-key makes a cluster that never signs certificates, so that no machine can ever join it by token. \
         That cannot be changed later: name the key that `ensign cluster init` made with --authority-key FILE; or, if you certify every \
         node yourself, say so with --own-certificates"
            .to_owned(),
    ))
}

/// The authority whose key the vault is to keep.
fn load_authority(config: &Config, key: Option<&Path>) -> anyhow::Result<Option<Authority>> {
    let Some(path) = key else { return Ok(None) };
    let read = |path: &Path| std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()));
    let (certificate, key) = (read(&config.cluster.authority)?, zeroize::Zeroizing::new(read(path)?));
    let authority = Authority::from_pem(&certificate, &key);
    authority.map(Some).map_err(|error| {
        let (key, authority) = (path.display(), config.cluster.authority.display());
        UsageError(format!("{key} is not the key of the authority {authority}: {error:#}")).into()
    })
}

/// Says what travels in clear.
fn warn_of_plaintext(config: &Config) {
    let open = [config.listen.grpc, config.listen.http].iter().any(|address| !address.ip().is_loopback());
    if open && config.listen.certificate.as_os_str().is_empty() {
        warn!(
            "clients are served in clear outside loopback (listen.plaintext): is there a TLS proxy in front? Else API keys and events can be read on the way"
        );
    }
}

/// Whoever copies the data, a backup for one, must not copy the key to it along.
fn refuse_key_beside_data(root_key: &Path, data_dir: &Path) -> anyhow::Result<()> {
    let data = std::fs::canonicalize(data_dir).with_context(|| format!("cannot read {}", data_dir.display()))?;
    let real = std::fs::canonicalize(root_key).ok();
    let folder = root_key.parent().and_then(|folder| std::fs::canonicalize(folder).ok());
    if real.into_iter().chain(folder).any(|place| place.starts_with(&data)) {
        let (root_key, data_dir) = (root_key.display(), data_dir.display());
        return Err(UsageError(format!(
            "node.root_key = \"{root_key}\" lies inside node.data_dir = \"{data_dir}\": whoever copies the data would have the key to it; \
             keep the file in a directory of its own (and on every node) and set node.root_key to it"
        ))
        .into());
    }
    Ok(())
}

async fn bind(key: &'static str, address: std::net::SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {key} = \"{address}\": is the address taken?"))
}

fn fresh_cluster() -> ClusterId {
    let mut random = [0; 10];
    OsRng.fill(&mut random);
    ClusterId::new(SystemClock.wall().as_millis(), random)
}

/// Asks every peer, again and again, until one knows the cluster.
async fn ask_peers(config: &Config, tls: &PeerTls, stop: &Stop) -> anyhow::Result<ClusterId> {
    let speaks = Speaks { newest: plant::newest_version()?, ..Speaks::NEWEST };
    let peers = Peers::speaking(speaks, config.node_id(), None, &config.cluster.peers, tls, None);
    info!("new data directory: asking the peers which cluster this is (or start one node with --bootstrap)");
    let mut asked = 0_u64;
    while !stop.is_cancelled() {
        let mut unknown = None;
        for peer in peers.others() {
            match hello(&peers, peer).await? {
                Answer::Cluster(cluster) => return Ok(cluster),
                Answer::Stranger(why) => unknown = Some(anyhow::anyhow!(why)),
                Answer::Removed => unknown = Some(NodeEnd::removed(config.node_id()).into()),
                Answer::Nothing => {}
            }
        }
        asked += 1;
        if asked.is_multiple_of(20) {
            // A peer may learn a moment later than the others that this node joined, but not much later.
            if let Some(why) = unknown {
                return Err(why);
            }
            warn!(
                "no peer knows the cluster yet: is one node started with --bootstrap, and are cluster.peers and the certificates right?"
            );
        }
        tokio::time::sleep(HELLO_EVERY).await;
    }
    bail!("stopped before a peer told which cluster this is")
}

/// What a peer says to a node that asks which cluster this is.
pub(crate) enum Answer {
    /// This one.
    Cluster(ClusterId),
    /// It does not know the node, or not yet, and says so.
    Stranger(String),
    /// It knows that the node was removed.
    Removed,
    /// It does not answer, or has no cluster either.
    Nothing,
}

/// Asks `peer` which cluster it belongs to.
///
/// # Errors
/// The peer knows this node, and refuses it for good.
pub(crate) async fn hello(peers: &Peers, peer: NodeId) -> anyhow::Result<Answer> {
    let Some(channel) = peers.channel(peer) else { return Ok(Answer::Nothing) };
    let mut request = tonic::Request::new(HelloRequest {});
    request.set_timeout(Duration::from_secs(2));
    match PeerClient::new(channel).hello(request).await {
        Ok(reply) => {
            let cluster = ClusterId::try_from(&reply.into_inner().cluster[..]);
            Ok(cluster.map_or(Answer::Nothing, Answer::Cluster))
        }
        Err(status) if Ended::of(status.metadata().as_ref()) == Some(Ended::Removed) => Ok(Answer::Removed),
        Err(status) if is_refusal(&status) => {
            let why = format!("node {peer} refuses this node: {}", status.message());
            if status.code() == tonic::Code::FailedPrecondition {
                bail!(why);
            }
            Ok(Answer::Stranger(why))
        }
        Err(_) => Ok(Answer::Nothing),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_key_among_the_data_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (data, keys) = (dir.path().join("data"), dir.path().join("keys"));
        std::fs::create_dir_all(data.join("deep")).unwrap();
        std::fs::create_dir(&keys).unwrap();
        refuse_key_beside_data(&keys.join("root.key"), &data).unwrap();
        refuse_key_beside_data(&dir.path().join("root.key"), &data).unwrap();
        refuse_key_beside_data(&dir.path().join("nowhere/root.key"), &data).unwrap();
        for inside in [data.join("root.key"), data.join("deep/root.key"), keys.join("../data/root.key")] {
            let error = refuse_key_beside_data(&inside, &data).unwrap_err().to_string();
            assert!(error.contains("lies inside node.data_dir"), "{error}");
            assert!(error.contains("set node.root_key"), "{error}");
        }
        // A link is where it leads to.
        std::fs::write(data.join("root.key"), b"").unwrap();
        std::os::unix::fs::symlink(data.join("root.key"), keys.join("link.key")).unwrap();
        assert!(refuse_key_beside_data(&keys.join("link.key"), &data).is_err());
    }

    #[test]
    fn a_cluster_over_several_machines_is_not_left_without_an_authority_by_oversight() {
        use clap::Parser as _;
        let checked = |peers: &str, more: &[&str]| {
            let typed = [&["ensign", "serve", "--bootstrap"], more].concat();
            let crate::cli::Command::Serve(args) = crate::cli::Cli::parse_from(typed).command else { panic!("serve") };
            let config = Config::parse(&format!("[listen]\npeers = \"{peers}\"")).unwrap();
            check_bootstrap(&args, &config).map_err(|error| error.to_string())
        };
        let refused = checked("10.0.0.1:5357", &[]).unwrap_err();
        assert!(refused.contains("--authority-key FILE") && refused.contains("--own-certificates"), "{refused}");
        checked("10.0.0.1:5357", &["--own-certificates"]).unwrap();
        checked("10.0.0.1:5357", &["--authority-key", "ca.key"]).unwrap();
        checked("127.0.0.1:5357", &[]).unwrap();
    }
}
