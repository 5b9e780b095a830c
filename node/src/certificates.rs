//! Certificates while a node runs: TLS for client listeners, files that are replaced, and how long what is in use lasts.
//!
//! Every few seconds the files are looked at. What is new and good is used by the next handshake, in either direction; connections
//! that are open live on. What is new and bad is complained about, and what was there before stays in use.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use ensign_proto::NodeId;
use ensign_raft::env::{Clock, Stop, UnixNanos};
use metrics::{Unit, describe_gauge, gauge};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tracing::{error, info, warn};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::config::{ClusterSettings, ListenSettings};
use crate::handshake::Choose;
use crate::peers::{PeerTls, TlsError};

/// How often the files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(3);
/// Warned about this many days before the end, and at the end.
const WARN_DAYS: [u64; 4] = [30, 7, 1, 0];
const DAY: u64 = 24 * 3600 * 1_000_000_000;
const EXPIRES: &str = "ensign_certificate_expiry_timestamp_seconds";

/// The certificate that client listeners show. Clones share it, and what replaces it.
#[derive(Clone)]
pub struct ClientTls {
    now: Arc<ArcSwap<ServerConfig>>,
}

impl std::fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClientTls")
    }
}

impl ClientTls {
    /// From the files that the settings name; none if they name none.
    ///
    /// # Errors
    /// [`TlsError`]: a file is missing or malformed, or the two do not fit together.
    pub fn load(settings: &ListenSettings) -> Result<Option<Self>, TlsError> {
        if settings.certificate.as_os_str().is_empty() {
            return Ok(None);
        }
        let config = server_config(&settings.certificate, &settings.private_key)?;
        Ok(Some(Self { now: Arc::new(ArcSwap::from_pointee(config)) }))
    }

    /// What the next handshake is made with.
    pub(crate) fn choose(&self) -> Choose {
        let now = Arc::clone(&self.now);
        Arc::new(move |_| now.load_full())
    }

    fn reload(&self, settings: &ListenSettings) -> Result<(), TlsError> {
        self.now.store(Arc::new(server_config(&settings.certificate, &settings.private_key)?));
        Ok(())
    }
}

const CERTIFICATE: &str = "listen.certificate";
const KEY: &str = "listen.private_key";

fn server_config(certificate: &Path, private_key: &Path) -> Result<ServerConfig, TlsError> {
    let read = |what: &'static str, path: &Path| {
        std::fs::read(path).map_err(|source| TlsError::Unreadable { what, path: path.to_owned(), source })
    };
    let malformed = |what, path: &Path, message: &str| TlsError::Malformed {
        what,
        path: path.to_owned(),
        message: message.to_owned(),
    };
    let pem = read(CERTIFICATE, certificate)?;
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&pem).filter_map(Result::ok).collect();
    if chain.is_empty() {
        return Err(malformed(CERTIFICATE, certificate, "no PEM certificate in it"));
    }
    let pem = zeroize::Zeroizing::new(read(KEY, private_key)?);
    let key =
        PrivateKeyDer::from_pem_slice(&pem).map_err(|_| malformed(KEY, private_key, "no PEM private key in it"))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let unusable = |error: rustls::Error| TlsError::Unusable(format!("{CERTIFICATE} and {KEY}: {error}"));
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(unusable)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// When the first certificate of a PEM file begins and ends to be valid.
pub(crate) fn validity(path: &Path) -> Option<(UnixNanos, UnixNanos)> {
    let der = CertificateDer::from_pem_file(path).ok()?;
    let (_, parsed) = X509Certificate::from_der(&der).ok()?;
    let nanos = |seconds: i64| UnixNanos(u64::try_from(seconds).unwrap_or_default().saturating_mul(1_000_000_000));
    let validity = parsed.validity();
    Some((nanos(validity.not_before.timestamp()), nanos(validity.not_after.timestamp())))
}

/// What a node's certificates are read from, and where what is read goes.
pub(crate) struct Certificates {
    pub(crate) node: NodeId,
    pub(crate) peers: PeerTls,
    pub(crate) cluster: ClusterSettings,
    pub(crate) clients: Option<ClientTls>,
    pub(crate) listen: ListenSettings,
    pub(crate) clock: Arc<dyn Clock>,
}

/// Changes when a file is replaced or written to.
type Stamp = Vec<Option<(i64, i64, u64, u64)>>;

fn stamp(paths: &[&Path]) -> Stamp {
    let of = |path: &Path| std::fs::metadata(path).ok().map(|it| (it.mtime(), it.mtime_nsec(), it.ino(), it.len()));
    paths.iter().map(|path| of(path)).collect()
}

impl Certificates {
    fn peer_files(&self) -> [&Path; 3] {
        [&self.cluster.certificate, &self.cluster.private_key, &self.cluster.authority]
    }

    fn client_files(&self) -> Vec<&Path> {
        let files = [self.listen.certificate.as_path(), self.listen.private_key.as_path()];
        if self.clients.is_some() { files.to_vec() } else { Vec::new() }
    }

    /// Takes over what is new and good, and warns of what ends, until `stop`. One task a node.
    pub(crate) async fn keep(self, stop: Stop) {
        describe_gauge!(
            EXPIRES,
            Unit::Seconds,
            "When the certificate in use ends, in Unix time, by what it is used for"
        );
        let (mut peers, mut clients) = (stamp(&self.peer_files()), stamp(&self.client_files()));
        let mut watches = [Ending::new("peers"), Ending::new("authority"), Ending::new("clients")];
        loop {
            self.look(&mut watches);
            if stop.run_until_cancelled(tokio::time::sleep(LOOK_EVERY)).await.is_none() {
                return;
            }
            let now = stamp(&self.peer_files());
            if now != peers {
                peers = now;
                let [certificate, key, authority] = self.peer_files();
                say("peers", self.peers.reload(self.node, certificate, key, authority));
            }
            let now = stamp(&self.client_files());
            if let Some(tls) = self.clients.as_ref().filter(|_| now != clients) {
                clients = now;
                say("clients", tls.reload(&self.listen));
            }
        }
    }

    fn look(&self, watches: &mut [Ending; 3]) {
        let now = self.clock.wall();
        let listen: Option<&PathBuf> = self.clients.as_ref().map(|_| &self.listen.certificate);
        let paths = [Some(&self.cluster.certificate), Some(&self.cluster.authority), listen];
        for (watch, path) in watches.iter_mut().zip(paths) {
            if let Some((_, until)) = path.and_then(|path| validity(path)) {
                watch.look(until, now);
            }
        }
    }
}

fn say(usage: &'static str, reloaded: Result<(), TlsError>) {
    match reloaded {
        Ok(()) => info!(usage, "new certificates are in use from the next connection on"),
        Err(error) => {
            error!(usage, %error, "the new certificate files cannot be used; what was there before stays in use until it expires");
        }
    }
}

/// Warns of the end of one certificate, once a threshold.
struct Ending {
    usage: &'static str,
    warned: Option<(UnixNanos, u64)>,
}

impl Ending {
    fn new(usage: &'static str) -> Self {
        Self { usage, warned: None }
    }

    fn look(&mut self, until: UnixNanos, now: UnixNanos) {
        gauge!(EXPIRES, "usage" => self.usage).set(Duration::from_nanos(until.0).as_secs_f64());
        let Some(days) = due(until, now) else { return };
        if self.warned.is_some_and(|(of, warned)| of == until && warned <= days) {
            return;
        }
        self.warned = Some((until, days));
        let usage = self.usage;
        if days == 0 {
            error!(usage, "the certificate in use has expired: connections that need it are refused. Replace the file");
        } else {
            warn!(
                usage,
                within_days = days,
                "the certificate in use ends soon: replace the file, no restart is needed"
            );
        }
    }
}

/// The smallest threshold that is reached, in days.
fn due(until: UnixNanos, now: UnixNanos) -> Option<u64> {
    WARN_DAYS.into_iter().filter(|days| now.0.saturating_add(days * DAY) >= until.0).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_is_announced_at_each_threshold() {
        let until = UnixNanos(1_000 * DAY);
        let at = |days_before: u64| due(until, UnixNanos(until.0 - days_before * DAY));
        assert_eq!(
            [at(31), at(30), at(8), at(7), at(2), at(1), at(0)],
            [None, Some(30), Some(30), Some(7), Some(7), Some(1), Some(0)]
        );
        assert_eq!(due(until, UnixNanos(until.0 + 1)), Some(0));
    }

    fn settings(dir: &Path) -> ListenSettings {
        ListenSettings { certificate: dir.join("c.pem"), private_key: dir.join("c.key"), ..ListenSettings::default() }
    }

    fn put(dir: &Path, certificate: &str, key: &str) {
        std::fs::write(dir.join("c.pem"), certificate).unwrap();
        std::fs::write(dir.join("c.key"), key).unwrap();
    }

    #[test]
    fn new_files_are_taken_over_when_they_are_good_and_the_old_ones_stay_when_not() {
        let dir = tempfile::tempdir().unwrap();
        let authority = crate::authority::Authority::generate("test").unwrap();
        let (one, two) = (authority.issue(NodeId(1)).unwrap(), authority.issue(NodeId(1)).unwrap());
        assert!(ClientTls::load(&ListenSettings::default()).unwrap().is_none());
        assert!(matches!(ClientTls::load(&settings(dir.path())), Err(TlsError::Unreadable { .. })));
        put(dir.path(), &one.certificate, &one.private_key);
        let tls = ClientTls::load(&settings(dir.path())).unwrap().unwrap();
        let (first, before) = (tls.now.load_full(), stamp(&[&dir.path().join("c.pem")]));

        put(dir.path(), &two.certificate, &one.private_key);
        assert_ne!(stamp(&[&dir.path().join("c.pem")]), before);
        let error = tls.reload(&settings(dir.path())).unwrap_err().to_string();
        assert!(error.contains("listen.certificate and listen.private_key"), "{error}");
        assert!(Arc::ptr_eq(&first, &tls.now.load_full()));
        put(dir.path(), "garbage", &two.private_key);
        assert!(tls.reload(&settings(dir.path())).unwrap_err().to_string().contains("no PEM certificate"));

        put(dir.path(), &two.certificate, &two.private_key);
        tls.reload(&settings(dir.path())).unwrap();
        assert!(!Arc::ptr_eq(&first, &tls.now.load_full()));
        assert!(validity(&dir.path().join("c.pem")).is_some_and(|(from, until)| from < until));
    }
}
