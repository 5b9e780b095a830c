//! What the peer port does with certificates that are no good, and with bytes that are no calls.

use std::time::Duration;

use ensign_raft::env::{Clock as _, UnixNanos};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;

const DAY: u64 = 24 * 3600 * 1_000_000_000;

impl Fixture {
    /// Node 2 with a certificate for `subject`, by `authority`.
    fn shows(&self, authority: &Authority, subject: &Subject) -> Peers {
        let issued = authority.issue_to(subject, &OsRng).unwrap();
        let tls = PeerTls::from_pem(issued.certificate, issued.private_key, self.authority.certificate()).unwrap();
        Peers::new(NodeId(2), Some(member(7, 1)), &self.addresses(), &tls)
    }
}

fn subject() -> Subject {
    Subject::node(NodeId(2), cluster(7), SystemClock.wall())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_has_to_be_valid_now_and_of_this_clusters_authority() {
    let fixture = Fixture::start().await;
    let now = SystemClock.wall().0;
    call(&fixture.shows(&fixture.authority, &subject()), READ_INDEX).await.unwrap();
    let expired = Subject { from: UnixNanos(now - 2 * DAY), until: UnixNanos(now - DAY), ..subject() };
    let not_yet = Subject { from: UnixNanos(now + DAY), until: UnixNanos(now + 2 * DAY), ..subject() };
    for (what, subject) in [("expired", expired), ("not yet valid", not_yet)] {
        assert!(call(&fixture.shows(&fixture.authority, &subject), READ_INDEX).await.is_err(), "{what}");
    }
    let other = Authority::generate("other").unwrap();
    assert!(call(&fixture.shows(&other, &subject()), READ_INDEX).await.is_err(), "another authority");

    let elsewhere = Subject { cluster: Some(cluster(8)), ..subject() };
    let status = call(&fixture.shows(&fixture.authority, &elsewhere), READ_INDEX).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(status.message().contains(&cluster(8).to_string()), "{status:?}");
    // By hand, without saying which cluster.
    let by_hand = Subject { cluster: None, ..subject() };
    call(&fixture.shows(&fixture.authority, &by_hand), READ_INDEX).await.unwrap();
    fixture.tasks.shut_down(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_shows_no_certificate_is_refused_in_the_handshake() {
    let fixture = Fixture::start().await;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(fixture.authority.der().clone()).unwrap();
    let mut tls = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"h2".to_vec()];
    let stream = tokio::net::TcpStream::connect(&fixture.address).await.unwrap();
    let name = rustls::pki_types::ServerName::try_from("ensign-node-1").unwrap();
    let mut stream = tokio_rustls::TlsConnector::from(Arc::new(tls)).connect(name, stream).await.unwrap();
    // With TLS 1.3 the refusal comes with the first read.
    let error = stream.read(&mut [0; 1]).await.unwrap_err().to_string();
    assert!(error.to_lowercase().contains("certificate"), "{error}");
    fixture.tasks.shut_down(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_and_huge_messages_end_their_own_connection_and_nothing_else() {
    let fixture = Fixture::start().await;
    for garbage in [vec![0; 4096], vec![0xff; 4096], b"GET / HTTP/1.1\r\nhost: x\r\n\r\n".repeat(20)] {
        let mut stream = tokio::net::TcpStream::connect(&fixture.address).await.unwrap();
        stream.write_all(&garbage).await.unwrap();
        // An alert, or nothing, and then the end.
        let _ = stream.read_to_end(&mut Vec::new()).await;
    }
    let peer = fixture.shows(&fixture.authority, &subject());
    // A message that says it is two gigabytes long.
    let mut channel = peer.channel(ME).unwrap();
    let body = Bytes::from_static(&[0, 0x7f, 0xff, 0xff, 0xff, 1, 2, 3]);
    let request = http::Request::post("http://peer/ensign.peer.v1.Peer/Propose")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Body::new(axum::body::Body::from(body)))
        .unwrap();
    let answer = channel.ready().await.unwrap().call(request).await.unwrap();
    let status = Status::from_header_map(answer.headers()).unwrap();
    assert_eq!(status.code(), Code::OutOfRange, "{status:?}");
    // A proposal that is no command, and one to a group that does not exist.
    let mut client = PeerClient::new(peer.channel(ME).unwrap());
    for (group, payload) in [(1, &b"garbage"[..]), (999, b"x")] {
        let request = ensign_proto::pb::peer::v1::ProposeRequest { group, payload: Bytes::from_static(payload) };
        client.propose(request).await.unwrap();
    }
    assert!(fixture.inside.as_ref().unwrap().2.nodes().is_empty());
    call(&peer, READ_INDEX).await.unwrap();
    fixture.tasks.shut_down(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_certificate_files_are_used_by_the_next_connection() {
    let fixture = Fixture::start().await;
    let dir = tempfile::tempdir().unwrap();
    let files = ["node.pem", "node.key", "ca.pem"].map(|name| dir.path().join(name));
    let put = |subject: &Subject| {
        let issued = fixture.authority.issue_to(subject, &OsRng).unwrap();
        std::fs::write(&files[0], issued.certificate).unwrap();
        std::fs::write(&files[1], issued.private_key).unwrap();
        std::fs::write(&files[2], fixture.authority.certificate()).unwrap();
    };
    let now = SystemClock.wall().0;
    put(&Subject { from: UnixNanos(now - 2 * DAY), until: UnixNanos(now - DAY), ..subject() });
    let tls = PeerTls::load(NodeId(2), &files[0], &files[1], &files[2]).unwrap();
    let peers = Peers::new(NodeId(2), Some(member(7, 1)), &fixture.addresses(), &tls);
    assert!(call(&peers, READ_INDEX).await.is_err());
    put(&subject());
    tls.reload(NodeId(2), &files[0], &files[1], &files[2]).unwrap();
    // The connection that was refused may take a call with it that came before it was known to be closed.
    let taken = tokio::time::timeout(Duration::from_secs(20), async {
        while let Err(status) = call(&peers, READ_INDEX).await {
            assert!(matches!(status.code(), Code::Cancelled | Code::Unavailable | Code::Unknown), "{status:?}");
        }
    });
    taken.await.unwrap();

    // What cannot be used changes nothing, and says what it is.
    std::fs::write(&files[0], "garbage").unwrap();
    let error = tls.reload(NodeId(2), &files[0], &files[1], &files[2]).unwrap_err().to_string();
    assert!(error.contains("no PEM certificate in it"), "{error}");
    put(&Subject { node: NodeId(3), ..subject() });
    assert!(matches!(tls.reload(NodeId(2), &files[0], &files[1], &files[2]), Err(TlsError::WrongNode { .. })));
    let again = Peers::new(NodeId(2), Some(member(7, 1)), &fixture.addresses(), &tls);
    call(&again, READ_INDEX).await.unwrap();
    fixture.tasks.shut_down(Duration::from_secs(5)).await;
}
