//! A man in the middle of every peer connection: holds certificates of both ends, passes bytes on, keeps what it saw.
//!
//! Only the cluster's own authority can make such a thing; it shows what travels *inside* the peers' TLS.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use ensign_node::authority::Authority;
use ensign_node::peers::node_name;
use ensign_proto::NodeId;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Everything that was seen, from all connections.
#[derive(Clone, Default)]
pub struct Seen(Arc<Mutex<Vec<u8>>>);

impl Seen {
    /// Calls `look` with all the bytes.
    pub fn with<T>(&self, look: impl FnOnce(&[u8]) -> T) -> T {
        look(&self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn identity(
    authority: &Authority,
    node: NodeId,
) -> anyhow::Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
    let issued = authority.issue(node)?;
    let certificate = CertificateDer::from_pem_slice(issued.certificate.as_bytes())?;
    let key = PrivateKeyDer::from_pem_slice(issued.private_key.as_bytes())?;
    Ok((vec![certificate], key))
}

/// Listens where `from` believes `to` to be, and passes everything on to `address`. Runs until the set is dropped.
pub fn tap(
    tasks: &mut JoinSet<()>,
    authority: &Authority,
    (from, to): (NodeId, NodeId),
    listener: std::net::TcpListener,
    address: String,
    seen: Seen,
) -> anyhow::Result<()> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.certificate().as_bytes())?)?;
    let roots = Arc::new(roots);

    let (chain, key) = identity(authority, to)?;
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider)).build()?;
    let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    server.alpn_protocols = vec![b"h2".to_vec()];

    let (chain, key) = identity(authority, from)?;
    let mut client = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)?;
    client.alpn_protocols = vec![b"h2".to_vec()];

    let acceptor = TlsAcceptor::from(Arc::new(server));
    let connector = TlsConnector::from(Arc::new(client));
    let name = ServerName::try_from(node_name(to)).context("a node's name is a DNS name")?;
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((inbound, _)) = listener.accept().await {
            let (acceptor, connector, name, address, seen) =
                (acceptor.clone(), connector.clone(), name.clone(), address.clone(), seen.clone());
            connections.spawn(async move {
                // A connection that cannot be made is the nodes' business: they retry.
                let Ok(outbound) = TcpStream::connect(address).await else { return };
                let Ok(inbound) = acceptor.accept(inbound).await else { return };
                let Ok(outbound) = connector.connect(name, outbound).await else { return };
                let (inbound_read, inbound_write) = tokio::io::split(inbound);
                let (outbound_read, outbound_write) = tokio::io::split(outbound);
                tokio::join!(
                    copy(inbound_read, outbound_write, seen.clone()),
                    copy(outbound_read, inbound_write, seen)
                );
            });
        }
    });
    Ok(())
}

async fn copy(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, seen: Seen) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        seen.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&buffer[..count]);
        if to.write_all(&buffer[..count]).await.is_err() || to.flush().await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
}
