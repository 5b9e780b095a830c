//! Certificates while a node runs: TLS for client listeners, files that are replaced, and how long what is in use lasts.
//!
//! Every few seconds the files are looked at. What is new and good is used by the next handshake, in either direction; connections
//! that are open live on. What is new and bad, or not valid at this time, is complained about, and what was there before stays in use.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
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

/// Whether a certificate that was read from a file may be used now.
///
/// # Errors
/// A sentence: it is over, or has not begun.
fn timely(path: &Path, (from, until): (UnixNanos, UnixNanos), now: UnixNanos) -> Result<(), String> {
    let file = path.display();
    if until <= now {
        return Err(format!("{file} ended at {}", time(until)));
    }
    if from > now {
        return Err(format!("{file} is valid from {} on, and here it is {}", time(from), time(now)));
    }
    Ok(())
}

fn time(at: UnixNanos) -> String {
    let seconds = i64::try_from(at.0 / 1_000_000_000).unwrap_or(i64::MAX);
    jiff::Timestamp::from_second(seconds).map(|time| time.to_string()).unwrap_or_default()
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

/// Files that are looked at again and again.
struct Files {
    used: Stamp,
    /// What was there when they were last looked at, and is not in use.
    refused: Option<Stamp>,
}

/// Whether files are seen for the first time as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum First {
    Time,
    /// They were refused before; what is not valid yet may be now.
    NotAnyMore,
}

impl Files {
    fn new(paths: &[&Path]) -> Self {
        Self { used: stamp(paths), refused: None }
    }

    /// Whether something else is there than what is in use.
    fn changed(&mut self, paths: &[&Path]) -> Option<First> {
        let now = stamp(paths);
        if now == self.used {
            return None;
        }
        let known = self.refused.replace(now.clone()).is_some_and(|refused| refused == now);
        Some(if known { First::NotAnyMore } else { First::Time })
    }

    /// What was there at the last look is in use.
    fn settle(&mut self) {
        if let Some(now) = self.refused.take() {
            self.used = now;
        }
    }
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
        let (mut peers, mut clients) = (Files::new(&self.peer_files()), Files::new(&self.client_files()));
        let mut watches = [Ending::new("peers"), Ending::new("authority"), Ending::new("clients")];
        self.note(&mut watches, &[0, 1, 2]);
        for (watch, path) in watches.iter().zip(self.paths()).filter(|(watch, _)| watch.usage != "authority") {
            if let Some((path, valid)) = path.zip(watch.in_use)
                && let Err(error) = timely(path, valid, self.clock.wall())
            {
                error!(usage = watch.usage, %error, "this certificate is not valid now: connections that need it are refused");
            }
        }
        loop {
            for watch in &mut watches {
                watch.look(self.clock.wall());
            }
            if stop.run_until_cancelled(tokio::time::sleep(LOOK_EVERY)).await.is_none() {
                return;
            }
            if let Some(first) = peers.changed(&self.peer_files()) {
                let [certificate, key, authority] = self.peer_files();
                let reload = || self.peers.reload(self.node, certificate, key, authority);
                if self.take_over("peers", certificate, first, reload) {
                    peers.settle();
                    self.note(&mut watches, &[0, 1]);
                }
            }
            let Some(tls) = &self.clients else { continue };
            if let Some(first) = clients.changed(&self.client_files()) {
                let reload = || tls.reload(&self.listen);
                if self.take_over("clients", &self.listen.certificate, first, reload) {
                    clients.settle();
                    self.note(&mut watches, &[2]);
                }
            }
        }
    }

    /// The files of the three that are watched.
    fn paths(&self) -> [Option<&Path>; 3] {
        let listen = self.clients.as_ref().map(|_| self.listen.certificate.as_path());
        [Some(&self.cluster.certificate), Some(&self.cluster.authority), listen]
    }

    /// Remembers how long those last that were just taken into use. The files may say something else later.
    fn note(&self, watches: &mut [Ending; 3], which: &[usize]) {
        for (number, path) in self.paths().into_iter().enumerate().filter(|(number, _)| which.contains(number)) {
            watches[number].in_use = path.and_then(validity);
        }
    }

    /// Takes new files into use if they are good at this time, and says what became of them, once.
    fn take_over(
        &self,
        usage: &'static str,
        certificate: &Path,
        first: First,
        reload: impl FnOnce() -> Result<(), TlsError>,
    ) -> bool {
        let now = self.clock.wall();
        // Not the authority's: a file of several is good while one of them is.
        let timely = validity(certificate).map_or(Ok(()), |valid| timely(certificate, valid, now));
        match timely.and_then(|()| reload().map_err(|error| error.to_string())) {
            Ok(()) => info!(usage, "new certificates are in use from the next connection on"),
            Err(error) => {
                if first == First::Time {
                    error!(usage, %error, "the new certificate files cannot be used; what was there before stays in use until it expires");
                }
                return false;
            }
        }
        true
    }
}

/// Warns of the end of one certificate, once a threshold.
struct Ending {
    usage: &'static str,
    /// From when until when it is valid; none while there is none.
    in_use: Option<(UnixNanos, UnixNanos)>,
    warned: Option<(UnixNanos, u64)>,
}

impl Ending {
    fn new(usage: &'static str) -> Self {
        Self { usage, in_use: None, warned: None }
    }

    fn look(&mut self, now: UnixNanos) {
        let Some((_, until)) = self.in_use else { return };
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
    use ensign_proto::ClusterId;
    use ensign_raft::env::{OsRng, SystemClock};

    use super::*;
    use crate::authority::{Authority, Subject};

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

    #[test]
    fn a_certificate_is_good_from_its_beginning_until_its_end() {
        let (from, until) = (UnixNanos(10 * DAY), UnixNanos(20 * DAY));
        let at = |now: u64| timely(Path::new("node.pem"), (from, until), UnixNanos(now));
        assert_eq!((at(10 * DAY), at(20 * DAY - 1)), (Ok(()), Ok(())));
        assert_eq!(at(20 * DAY).unwrap_err(), "node.pem ended at 1970-01-21T00:00:00Z");
        let early = at(10 * DAY - 1).unwrap_err();
        assert_eq!(early, "node.pem is valid from 1970-01-11T00:00:00Z on, and here it is 1970-01-10T23:59:59Z");
    }

    #[test]
    fn files_that_were_refused_are_tried_again_until_they_are_used() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.pem");
        std::fs::write(&path, "one").unwrap();
        let mut files = Files::new(&[&path]);
        assert_eq!(files.changed(&[&path]), None);
        std::fs::write(&path, "two, longer").unwrap();
        assert_eq!(files.changed(&[&path]), Some(First::Time));
        assert_eq!(files.changed(&[&path]), Some(First::NotAnyMore));
        std::fs::write(&path, "three, longer still").unwrap();
        assert_eq!(files.changed(&[&path]), Some(First::Time));
        files.settle();
        assert_eq!(files.changed(&[&path]), None);
    }

    #[test]
    fn a_certificate_that_is_not_valid_now_is_not_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let (clock, rng) = (Arc::new(SystemClock), OsRng);
        let now = clock.wall();
        let at = |days: i64| UnixNanos(now.0.checked_add_signed(days * DAY.cast_signed()).unwrap());
        let authority = Authority::create("test", now, &rng).unwrap();
        let [certificate, key, roots] = ["node.pem", "node.key", "ca.pem"].map(|name| dir.path().join(name));
        std::fs::write(&roots, authority.certificate()).unwrap();
        let issue = |from: i64, until: i64| {
            let subject =
                Subject { from: at(from), until: at(until), ..Subject::node(NodeId(1), ClusterId::default(), now) };
            let issued = authority.issue_to(&subject, &rng).unwrap();
            std::fs::write(&certificate, issued.certificate).unwrap();
            std::fs::write(&key, issued.private_key).unwrap();
        };
        issue(-1, 30);
        let peers = PeerTls::load(NodeId(1), &certificate, &key, &roots).unwrap();
        let (certificate, private_key) = (certificate.clone(), key.clone());
        let cluster = ClusterSettings { certificate, private_key, authority: roots, ..ClusterSettings::default() };
        let (node, listen) = (NodeId(1), ListenSettings::default());
        let certificates = Certificates { node, peers, cluster, clients: None, listen, clock };
        let take_over = || {
            let [certificate, key, authority] = certificates.peer_files();
            let reload = || certificates.peers.reload(node, certificate, key, authority);
            let taken = certificates.take_over("peers", certificate, First::Time, reload);
            (taken, certificates.peers.expires().unwrap().0 / DAY - now.0 / DAY)
        };
        for (from, until) in [(-20, -10), (10, 90)] {
            issue(from, until);
            assert_eq!(take_over(), (false, 30), "valid from day {from} until day {until}");
        }
        issue(-1, 60);
        assert_eq!(take_over(), (true, 60));
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
