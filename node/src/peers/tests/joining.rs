//! Machines that join by token, and those that must not.

use std::path::Path;
use std::time::Duration;

use ensign_raft::env::{Clock as _, UnixNanos};

use super::*;
use crate::catalog::JoinToken;
use crate::config::ClusterSettings;
use crate::join::{Joined, Renewal};

const HOUR: Duration = Duration::from_hours(1);

impl Fixture {
    fn joins(&self) -> &Joins {
        &self.inside.as_ref().unwrap().1
    }

    fn catalog(&self) -> &Catalog {
        &self.inside.as_ref().unwrap().2
    }

    /// With the authority's key in the vault, and peers that follow the catalog.
    async fn start_with_authority() -> Self {
        let fixture = Self::start().await;
        fixture.joins().import(&fixture.authority).await.unwrap();
        let (peers, seeds, view) = (fixture.peers().clone(), fixture.addresses(), fixture.catalog().view().clone());
        let memory = PeerMemory::open(fixture.memory.path());
        fixture.tasks.spawn("follow", |stop| follow(peers, seeds, view, memory, stop));
        fixture
    }

    async fn token(&self, uses: u32) -> String {
        self.joins().create_token(HOUR, uses).await.unwrap().1.as_str().to_owned()
    }

    /// Each name has an address of its own.
    async fn join(&self, dir: &Path, token: &str, name: &str) -> anyhow::Result<Joined> {
        self.join_at(dir, token, name, &format!("{}.internal:9", if name.is_empty() { "unnamed" } else { name })).await
    }

    async fn join_at(&self, dir: &Path, token: &str, name: &str, address: &str) -> anyhow::Result<Joined> {
        let spec = JoinSpec {
            token: token.parse().map_err(anyhow::Error::msg)?,
            seeds: vec![self.address.clone()],
            name: name.parse().map_err(anyhow::Error::msg)?,
            region: "eu".parse().map_err(anyhow::Error::msg)?,
            zone: "eu-1".parse().map_err(anyhow::Error::msg)?,
            address: Some(address.to_owned()),
            dir: dir.to_owned(),
            data_dir: dir.join("data"),
            root_key: dir.join("root.key"),
        };
        join(&spec).await
    }

    fn loaded(node: NodeId, dir: &Path) -> PeerTls {
        PeerTls::load(node, &dir.join("node.pem"), &dir.join("node.key"), &dir.join("ca.pem")).unwrap()
    }

    fn used(&self) -> u32 {
        self.catalog().join_tokens().iter().map(|token| token.used).sum()
    }
}

fn message(refused: anyhow::Result<Joined>) -> String {
    format!("{:#}", refused.unwrap_err())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_with_a_token_becomes_a_node_that_its_peers_admit() {
    let fixture = Fixture::start_with_authority().await;
    let (dir, token) = (tempfile::tempdir().unwrap(), fixture.token(1).await);
    let joined = fixture.join(dir.path(), &token, "fourth").await.unwrap();
    // Node 2 is configured and has not registered: its number is not given away.
    assert_eq!((joined.node, joined.name.as_str(), joined.cluster), (NodeId(3), "fourth", cluster(7)));
    let record = fixture.catalog().node(NodeId(3)).unwrap();
    assert_eq!(
        (record.region.as_str(), record.zone.as_str(), record.peer.as_str()),
        ("eu", "eu-1", "fourth.internal:9")
    );
    crate::config::Config::load(Some(&dir.path().join("ensign.toml")), crate::config::ServerArgs::default()).unwrap();
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(dir.path().join("node.key")).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);

    let tls = Fixture::loaded(NodeId(3), dir.path());
    assert_eq!(tls.cluster(), Some(cluster(7)));
    let node = Peers::new(NodeId(3), Some(member(7, 1)), &fixture.addresses()[..1], &tls);
    fixture.peers().update(&fixture.entries(&[2, 3]));
    call(&node, READ_INDEX).await.unwrap();

    // The answer was lost: the same key is the same node, though the token is used up.
    std::fs::remove_file(dir.path().join("node.pem")).unwrap();
    assert_eq!(fixture.join(dir.path(), &token, "fourth").await.unwrap().node, NodeId(3));
    assert_eq!(fixture.used(), 1);
    let refused = message(fixture.join(dir.path(), &token, "").await);
    assert!(refused.contains("belongs to a node"), "{refused}");

    // Removed, it is refused with a reason, whatever its certificate says; and its number is not given out again.
    fixture.catalog().revoke_node(NodeId(3)).await.unwrap();
    let gone = fixture.peers().gate().gone(NodeId(3), &http::HeaderMap::new());
    gone.cancelled().await;
    let status = call(&node, READ_INDEX).await.unwrap_err();
    assert!(status.message().contains("was removed from the cluster"), "{status:?}");
    std::fs::remove_file(dir.path().join("node.pem")).unwrap();
    let refused = message(fixture.join(dir.path(), &token, "").await);
    assert!(refused.contains("removed"), "{refused}");
    let other = tempfile::tempdir().unwrap();
    let next = fixture.join(other.path(), &fixture.token(1).await, "fourth").await.unwrap();
    assert_eq!(next.node, NodeId(4), "the name is free, the number is not");
    fixture.tasks.shut_down(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_that_is_wrong_over_or_another_clusters_lets_nobody_in() {
    let fixture = Fixture::start_with_authority().await;
    let dir = tempfile::tempdir().unwrap();
    let fingerprint = crate::authority::fingerprint(fixture.authority.der());
    let made = |created: u64, expires: u64| {
        let token = Token::generate(fingerprint, UnixNanos(created), &OsRng);
        let (id, hash) = (token.id.to_bytes(), Token::hash(&*token.secret));
        let (created, expires) = (UnixNanos(created), UnixNanos(expires));
        (token, JoinToken { id, hash, created, expires, uses: 1, used: 0, revoked_at: None })
    };
    let now = SystemClock.wall().0;
    let (unknown, _) = made(now, now * 2);
    let (expired, record) = made(now - 2, now - 1);
    fixture.catalog().create_join_token(record).await.unwrap();
    let (revoked, record) = made(now, now * 2);
    let id = record.id;
    fixture.catalog().create_join_token(record).await.unwrap();
    fixture.catalog().revoke_join_token(id).await.unwrap();
    let (right, record) = made(now, now * 2);
    fixture.catalog().create_join_token(record).await.unwrap();
    let mut wrong: Token = right.text().parse().unwrap();
    wrong.secret[31] ^= 1;
    let mut elsewhere: Token = right.text().parse().unwrap();
    elsewhere.fingerprint = [9; 32];
    for (token, expected) in [
        (unknown, "not known to this cluster"),
        (wrong, "not known to this cluster"),
        (expired, "has expired"),
        (revoked, "was revoked"),
        (elsewhere, "belongs to another cluster"),
    ] {
        let refused = message(fixture.join(dir.path(), &token.text(), "").await);
        assert!(refused.contains(expected), "{expected}: {refused}");
    }
    assert_eq!((fixture.used(), fixture.catalog().nodes().len()), (0, 0));

    fixture.join(dir.path(), &right.text(), "taken").await.unwrap();
    let other = tempfile::tempdir().unwrap();
    let refused = message(fixture.join(other.path(), &right.text(), "").await);
    assert!(refused.contains("used as often as it may"), "{refused}");
    let refused = message(fixture.join(other.path(), &fixture.token(1).await, "taken").await);
    assert!(refused.contains("another node of the cluster has this name"), "{refused}");
    let another = fixture.token(1).await;
    let refused = message(fixture.join_at(other.path(), &another, "other", "TAKEN.internal:9").await);
    assert!(refused.contains("node 3 (taken) of the cluster is reached at TAKEN.internal:9"), "{refused}");
    assert!(refused.contains("--address"), "{refused}");
    assert_eq!(fixture.used(), 1, "whoever is refused uses nothing up");
    // Who is gone for good is in nobody's way.
    fixture.catalog().revoke_node(NodeId(3)).await.unwrap();
    fixture.join_at(other.path(), &another, "other", "taken.internal:9").await.unwrap();
    fixture.tasks.shut_down(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_whose_certificates_are_made_by_hand_says_how_to_add_a_node() {
    let fixture = Fixture::start().await;
    let error = fixture.joins().create_token(HOUR, 1).await.unwrap_err().to_string();
    assert!(error.contains("made by hand") && error.contains("first-cluster.md"), "{error}");
    for (ttl, uses) in [(Duration::ZERO, 1), (Duration::from_hours(24 * 31), 1), (HOUR, 0), (HOUR, 1_001)] {
        assert!(fixture.joins().create_token(ttl, uses).await.is_err(), "{ttl:?} {uses}");
    }
    fixture.tasks.shut_down(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_guesses_tokens_has_to_wait() {
    let fixture = Fixture::start_with_authority().await;
    let dir = tempfile::tempdir().unwrap();
    let mut wrong: Token = fixture.token(1).await.parse().unwrap();
    wrong.secret[0] ^= 1;
    let mut last = String::new();
    // Twenty of one token, and one more comes back every three seconds: on a slow machine it takes some more.
    for _ in 0..200 {
        last = message(fixture.join(dir.path(), &wrong.text(), "").await);
        if last.contains("too many failed attempts") {
            break;
        }
    }
    assert!(last.contains("too many failed attempts"), "{last}");
    fixture.tasks.shut_down(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_joins_can_call_nothing_else() {
    let fixture = Fixture::start_with_authority().await;
    let stream = tokio::net::TcpStream::connect(&fixture.address).await.unwrap();
    let pinned = Arc::new(PinnedAuthority::new(crate::authority::fingerprint(fixture.authority.der())));
    let mut tls = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(pinned)
        .with_no_client_auth();
    tls.alpn_protocols = vec![JOIN_ALPN.to_vec()];
    let name = rustls::pki_types::ServerName::try_from("x").unwrap();
    let stream = tokio_rustls::TlsConnector::from(Arc::new(tls)).connect(name, stream).await.unwrap();
    let mut once = Some(hyper_util::rt::TokioIo::new(stream));
    let channel = tonic::transport::Endpoint::from_static("http://x")
        .connect_with_connector(tower::service_fn(move |_: http::Uri| {
            let stream = once.take().ok_or_else(|| std::io::Error::other("once"));
            async move { stream }
        }))
        .await
        .unwrap();
    let status = PeerClient::new(channel).hello(HelloRequest {}).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented, "{status:?}");
    fixture.tasks.shut_down(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_of_the_clusters_authority_is_renewed_before_it_ends_and_no_other() {
    let fixture = Fixture::start_with_authority().await;
    let dir = tempfile::tempdir().unwrap();
    let [certificate, private_key, authority] = ["node.pem", "node.key", "ca.pem"].map(|name| dir.path().join(name));
    let now = SystemClock.wall();
    let day = Duration::from_hours(24).as_nanos() as u64;
    let put = |signer: &Authority, days_left: u64| {
        let (from, until) = (UnixNanos(now.0 - 300 * day), UnixNanos(now.0 + days_left * day));
        let subject = Subject { from, until, ..Subject::node(NodeId(2), cluster(7), now) };
        let issued = signer.issue_to(&subject, &OsRng).unwrap();
        std::fs::write(&certificate, issued.certificate).unwrap();
        std::fs::write(&private_key, issued.private_key).unwrap();
        std::fs::write(&authority, signer.certificate()).unwrap();
    };
    let renewal = Renewal {
        joins: fixture.joins().clone(),
        node: NodeId(2),
        names: vec!["127.0.0.1".to_owned()],
        cluster: ClusterSettings {
            certificate: certificate.clone(),
            private_key: private_key.clone(),
            authority: authority.clone(),
            ..ClusterSettings::default()
        },
        clock: Arc::new(SystemClock),
    };
    put(&fixture.authority, 200);
    assert!(!renewal.renew().await.unwrap(), "two fifths of its time are left");
    put(&fixture.authority, 100);
    let key = std::fs::read(&private_key).unwrap();
    assert!(renewal.renew().await.unwrap());
    let (_, until) = crate::certificates::validity(&certificate).unwrap();
    assert!(until.0 > now.0 + 300 * day);
    assert_eq!(std::fs::read(&private_key).unwrap(), key);
    let tls = PeerTls::load(NodeId(2), &certificate, &private_key, &authority).unwrap();
    let peers = Peers::new(NodeId(2), Some(member(7, 1)), &fixture.addresses(), &tls);
    call(&peers, READ_INDEX).await.unwrap();
    assert!(!renewal.renew().await.unwrap());

    let other = Authority::generate("an operator's own").unwrap();
    put(&other, 1);
    let before = std::fs::read(&certificate).unwrap();
    assert!(!renewal.renew().await.unwrap());
    assert_eq!(std::fs::read(&certificate).unwrap(), before);
    fixture.tasks.shut_down(Duration::from_secs(5)).await;
}
