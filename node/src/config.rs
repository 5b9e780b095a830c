//! Settings of a server: one definition gives the flag, the TOML key and the `ENSIGN_SERVER_*` variable.
//!
//! A flag beats a variable, a variable beats the file, the file beats the default. A key or a variable that nobody knows is an
//! error: a misspelt setting must not fall back to a default in silence.

mod define;
mod types;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args as _, FromArgMatches as _};
use ensign_keyvault::LeaseConfig;
use ensign_proto::{ByteCount, NodeId};
use figment::Figment;
use figment::providers::{Format as _, Serialized, Toml};
use thiserror::Error;

pub use types::{Bytes, Label, LogFormat, PeerAddress, Provider, Seconds, Timing, Upgrade};

use define::settings;

/// A restart takes seconds, and what is not restarted within a minute may be gone for good.
const VOTE_LOST_AFTER_MIN: Duration = Duration::from_secs(5);
const MOVE_RATE_MIN: u64 = 1 << 20;
/// The lease of a cluster whose elections take as long as `wan` lets them, unless another one is set.
const LEASE_WAN: Seconds = Seconds::new(25);

/// The prefix of every server variable.
pub const ENV_PREFIX: &str = "ENSIGN_SERVER_";

settings! {
    /// Who this node is and where it keeps its data.
    node: NodeSettings, NodeArgs {
        /// This node's number: from 1, never reused in a cluster, and named by its certificate.
        [id, "node-id", "ENSIGN_SERVER_NODE_ID"] u64 = 1;
        /// This node's name, for people: unique in the cluster. Empty: `node-ID`.
        [name, "node-name", "ENSIGN_SERVER_NODE_NAME"] Label = Label::default();
        /// The region this node stands in: topics can be kept to regions.
        [region, "region", "ENSIGN_SERVER_NODE_REGION"] Label = Label::local();
        /// The zone of the region, a set of nodes that can fail together: replicas are spread over zones.
        [zone, "zone", "ENSIGN_SERVER_NODE_ZONE"] Label = Label::local();
        /// The directory that holds everything this node stores.
        [data_dir, "data-dir", "ENSIGN_SERVER_NODE_DATA_DIR"] PathBuf = PathBuf::from("/var/lib/ensign");
        /// The file with the cluster's root key, where `root.provider` is `file`. Losing every copy of it loses all data.
        [root_key, "root-key", "ENSIGN_SERVER_NODE_ROOT_KEY"] PathBuf = PathBuf::from("/etc/ensign/root.key");
    }

    /// Where the node listens.
    listen: ListenSettings, ListenArgs {
        /// gRPC for clients.
        [grpc, "grpc-listen", "ENSIGN_SERVER_LISTEN_GRPC"] SocketAddr = SocketAddr::from(([127, 0, 0, 1], 5356));
        /// HTTP for authentication.
        [http, "http-listen", "ENSIGN_SERVER_LISTEN_HTTP"] SocketAddr = SocketAddr::from(([127, 0, 0, 1], 8088));
        /// Metrics and health, for operators.
        [metrics, "metrics-listen", "ENSIGN_SERVER_LISTEN_METRICS"] SocketAddr = SocketAddr::from(([127, 0, 0, 1], 1205));
        /// Other nodes of the cluster (mutual TLS).
        [peers, "peers-listen", "ENSIGN_SERVER_LISTEN_PEERS"] SocketAddr = SocketAddr::from(([127, 0, 0, 1], 5357));
        /// The certificate chain (PEM) of the gRPC and HTTP listeners, which then speak TLS. Empty: they speak in clear.
        [certificate, "listen-certificate", "ENSIGN_SERVER_LISTEN_CERTIFICATE"] PathBuf = PathBuf::new();
        /// The private key of that certificate (PEM).
        [private_key, "listen-private-key", "ENSIGN_SERVER_LISTEN_PRIVATE_KEY"] PathBuf = PathBuf::new();
        /// Allows client listeners outside loopback although they carry no TLS (put a TLS proxy in front).
        [plaintext, "plaintext", "ENSIGN_SERVER_LISTEN_PLAINTEXT"] bool = false;
        /// The socket for operators on this machine (the server's own user and root). Empty: `ensign.sock` in the data directory.
        [operator, "operator-socket", "ENSIGN_SERVER_LISTEN_OPERATOR"] PathBuf = PathBuf::new();
    }

    /// The cluster: every node and how they trust each other.
    cluster: ClusterSettings, ClusterArgs {
        /// Every node of the cluster, this one included, as `ID=HOST:PORT` of its peer listener.
        [peers, "peers", "ENSIGN_SERVER_CLUSTER_PEERS"] Vec<PeerAddress> = Vec::new();
        /// This node's certificate chain (PEM). Its names must include `ensign-node-ID`.
        [certificate, "peer-certificate", "ENSIGN_SERVER_CLUSTER_CERTIFICATE"] PathBuf = PathBuf::from("/etc/ensign/node.pem");
        /// The private key of that certificate (PEM).
        [private_key, "peer-private-key", "ENSIGN_SERVER_CLUSTER_PRIVATE_KEY"] PathBuf = PathBuf::from("/etc/ensign/node.key");
        /// The certificate authority that signed every node's certificate (PEM).
        [authority, "peer-authority", "ENSIGN_SERVER_CLUSTER_AUTHORITY"] PathBuf = PathBuf::from("/etc/ensign/ca.pem");
        /// Timing of elections: `lan` (heartbeat 200 ms, election 600–900 ms) or `wan` (1 s, 3–5 s).
        [timing, "timing", "ENSIGN_SERVER_CLUSTER_TIMING"] Timing = Timing::Lan;
        /// When the cluster's version is raised after an upgrade: `auto` (when every node speaks it) or `manual` (by `ensign cluster
        /// upgrade`; one node with it is enough).
        [upgrade, "upgrade", "ENSIGN_SERVER_CLUSTER_UPGRADE"] Upgrade = Upgrade::Auto;
        /// How long a node may be silent before its votes in the catalog and the vault go to another node.
        [vote_lost_after, "vote-lost-after", "ENSIGN_SERVER_CLUSTER_VOTE_LOST_AFTER"] Seconds = Seconds::new(60);
        /// How long a node must be silent before it counts as lost.
        [lost_after, "lost-after", "ENSIGN_SERVER_CLUSTER_LOST_AFTER"] Seconds = Seconds::new(600);
    }

    /// Memory and disk.
    storage: StorageSettings, StorageArgs {
        /// Bytes written ahead of time when the log is created; recycled pages make commits twice as fast.
        [prefill, "log-prefill", "ENSIGN_SERVER_STORAGE_PREFILL"] Bytes = Bytes::mib(1024);
        /// Memory for the newest entries of all partitions (ciphertext).
        [tail_cache, "tail-cache", "ENSIGN_SERVER_STORAGE_TAIL_CACHE"] Bytes = Bytes::mib(256);
        /// Memory for redb's own page cache of the log.
        [page_cache, "page-cache", "ENSIGN_SERVER_STORAGE_PAGE_CACHE"] Bytes = Bytes::mib(16);
        /// Bytes a second that this node sends to replicas that are being made or do not vote, over all partitions.
        [move_rate, "move-rate", "ENSIGN_SERVER_STORAGE_MOVE_RATE"] Bytes = Bytes::mib(16);
    }

    /// Tokens and logins.
    auth: AuthSettings, AuthArgs {
        /// The issuer of tokens, without a trailing slash. Empty: derived from the cluster's id.
        [issuer, "auth-issuer", "ENSIGN_SERVER_AUTH_ISSUER"] String = String::new();
        /// How long an access token lives.
        [access_ttl, "access-ttl", "ENSIGN_SERVER_AUTH_ACCESS_TTL"] Seconds = Seconds::new(3_600);
        /// How long a refresh token lives.
        [refresh_ttl, "refresh-ttl", "ENSIGN_SERVER_AUTH_REFRESH_TTL"] Seconds = Seconds::new(7_200);
        /// Proxies whose `X-Forwarded-For` is believed when failed logins are counted by address.
        [trusted_proxies, "trusted-proxies", "ENSIGN_SERVER_AUTH_TRUSTED_PROXIES"] Vec<IpAddr> = Vec::new();
    }

    /// The key vault's leases.
    vault: VaultSettings, VaultArgs {
        /// How long a lease on keys lasts without renewal, 5 s to 60 s; 25 s where `cluster.timing` is `wan`, which needs 23 s at least.
        [lease, "vault-lease", "ENSIGN_SERVER_VAULT_LEASE"] Seconds = Seconds::new(10);
    }

    /// The root key, which opens the vault and is not in the cluster. The same on every node.
    root: RootSettings, RootArgs {
        /// What keeps it: `file` (`node.root_key`), `passphrase` (typed on each node of the vault), `command` (a program of yours) or
        /// `transit` (a transit engine of HashiCorp Vault, or what speaks its API).
        [provider, "root-provider", "ENSIGN_SERVER_ROOT_PROVIDER"] Provider = Provider::File;
        /// With `command`: the program's absolute path. It is run without a shell, arguments or environment.
        [command, "root-command", "ENSIGN_SERVER_ROOT_COMMAND"] PathBuf = PathBuf::new();
        /// With `transit`: where the server is, `https://HOST:PORT`.
        [transit_address, "transit-address", "ENSIGN_SERVER_ROOT_TRANSIT_ADDRESS"] String = String::new();
        /// With `transit`: where the engine is mounted.
        [transit_mount, "transit-mount", "ENSIGN_SERVER_ROOT_TRANSIT_MOUNT"] String = "transit".to_owned();
        /// With `transit`: the name of the key, of an AEAD type.
        [transit_key, "transit-key", "ENSIGN_SERVER_ROOT_TRANSIT_KEY"] String = String::new();
        /// With `transit`: the file with the token, mode 0600. It is read anew for each call.
        [transit_token, "transit-token", "ENSIGN_SERVER_ROOT_TRANSIT_TOKEN"] PathBuf = PathBuf::from("/etc/ensign/transit.token");
        /// With `transit`: the only authority (PEM) to trust for the server's certificate. Empty: the system's.
        [transit_authority, "transit-authority", "ENSIGN_SERVER_ROOT_TRANSIT_AUTHORITY"] PathBuf = PathBuf::new();
    }

    /// Logs.
    log: LogSettings, LogArgs {
        /// `human` or `json`.
        [format, "log-format", "ENSIGN_SERVER_LOG_FORMAT"] LogFormat = LogFormat::Human;
        /// What to log, as in `info,ensign_raft=debug`.
        [filter, "log-filter", "ENSIGN_SERVER_LOG_FILTER"] String = "info,openraft=error".to_owned();
    }

    /// Stopping.
    shutdown: ShutdownSettings, ShutdownArgs {
        /// How long a stopping node waits for streams to drain and leaderships to move.
        [deadline, "shutdown-deadline", "ENSIGN_SERVER_SHUTDOWN_DEADLINE"] Seconds = Seconds::new(10);
    }
}

/// Settings that contradict each other or the world. Each message says what was wrong, where, and what to do.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A key is unknown, or a value is of the wrong kind.
    #[error("configuration error{}: {message}", path.as_ref().map(|p| format!(" in {}", p.display())).unwrap_or_default())]
    Invalid {
        /// The file, when there is one.
        path: Option<PathBuf>,
        /// What is wrong with which key.
        message: String,
    },
    /// A variable with our prefix that no setting owns.
    #[error("unknown variable {name}: no server setting has that name{}", hint(.suggestion.as_ref()))]
    UnknownVariable {
        /// The variable.
        name: String,
        /// The nearest name that exists.
        suggestion: Option<String>,
    },
    /// Two settings that cannot both hold.
    #[error("{0}")]
    Contradiction(String),
}

fn hint(suggestion: Option<&String>) -> String {
    suggestion.map(|name| format!("; did you mean {name}?")).unwrap_or_default()
}

impl Config {
    /// The settings of flags and variables (`args`), over those of `file`, over the defaults; checked.
    ///
    /// # Errors
    /// [`ConfigError`]: the file is unreadable, a key is unknown, a value is malformed, or settings contradict each other.
    pub fn load(file: Option<&Path>, args: ServerArgs) -> Result<Self, ConfigError> {
        refuse_unknown_variables(std::env::vars_os().filter_map(|(name, _)| name.into_string().ok()))?;
        let mut given = Figment::new();
        if let Some(path) = file {
            let text = std::fs::read_to_string(path)
                .map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?;
            given = given.merge(Toml::string(&text));
        }
        Self::over(Self::default(), given.merge(Serialized::defaults(args)), file)
    }

    /// What was given, over the defaults; checked.
    fn over(mut defaults: Self, given: Figment, file: Option<&Path>) -> Result<Self, ConfigError> {
        // A timing that cannot be read is complained about below.
        if given.extract_inner("cluster.timing").is_ok_and(|timing: Timing| timing == Timing::Wan) {
            defaults.vault.lease = LEASE_WAN;
        }
        let config: Self = Figment::from(Serialized::defaults(defaults))
            .merge(given)
            .extract()
            .map_err(|error| ConfigError::Invalid { path: file.map(Path::to_owned), message: error.to_string() })?;
        config.check()?;
        Ok(config)
    }

    /// The settings of variables, over those of a development node.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn development() -> Result<Self, ConfigError> {
        refuse_unknown_variables(std::env::vars_os().filter_map(|(name, _)| name.into_string().ok()))?;
        let invalid = |message: String| ConfigError::Invalid { path: None, message };
        let command = ServerArgs::augment_args(clap::Command::new("dev").no_binary_name(true));
        let matches = command.try_get_matches_from([""; 0]).map_err(|error| invalid(error.to_string()))?;
        let variables = ServerArgs::from_arg_matches(&matches).map_err(|error| invalid(error.to_string()))?;
        let mut defaults = Self::default();
        defaults.storage.prefill = Bytes::mib(64);
        defaults.storage.tail_cache = Bytes::mib(64);
        defaults.shutdown.deadline = Seconds::new(5);
        Self::over(defaults, Figment::from(Serialized::defaults(variables)), None)
    }

    /// The settings of a TOML text alone, over the defaults; checked.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        Self::over(Self::default(), Figment::from(Toml::string(text)), None)
    }

    /// This node's number.
    pub fn node_id(&self) -> NodeId {
        NodeId(self.node.id)
    }

    /// This node's name: the one that is set, or one made of its number.
    pub fn node_name(&self) -> String {
        if self.node.name.as_str().is_empty() { format!("node-{}", self.node.id) } else { self.node.name.to_string() }
    }

    /// The leases that these settings ask for.
    pub fn lease(&self) -> LeaseConfig {
        LeaseConfig { length: self.vault.lease.into(), ..LeaseConfig::default() }
    }

    /// Where operators on this machine reach the node.
    pub fn operator_socket(&self) -> PathBuf {
        if self.listen.operator.as_os_str().is_empty() {
            self.node.data_dir.join("ensign.sock")
        } else {
            self.listen.operator.clone()
        }
    }

    /// Refuses settings that contradict each other.
    fn check(&self) -> Result<(), ConfigError> {
        let contradiction = |message: String| Err(ConfigError::Contradiction(message));
        if self.node.id == 0 {
            return contradiction("node.id is 0: nodes are numbered from 1".to_owned());
        }
        if self.node.data_dir.as_os_str().is_empty() {
            return contradiction(
                "node.data_dir is empty: name the directory that is to hold everything this node stores".to_owned(),
            );
        }
        if self.root.provider == Provider::File && self.node.root_key.as_os_str().is_empty() {
            return contradiction(
                "node.root_key is empty: with root.provider = \"file\" it names the file with the root key".to_owned(),
            );
        }
        self.listen.check_distinct().map_err(ConfigError::Contradiction)?;
        for (key, label) in [("node.region", &self.node.region), ("node.zone", &self.node.zone)] {
            if label.as_str().is_empty() {
                return contradiction(format!("{key} is empty: leave it out for \"local\", or name the place"));
            }
        }
        let mut seen = std::collections::BTreeSet::new();
        for peer in &self.cluster.peers {
            if !seen.insert(peer.id) {
                return contradiction(format!("cluster.peers names node {} twice: every node has one number", peer.id));
            }
        }
        if !self.cluster.peers.is_empty() && !seen.contains(&self.node_id()) {
            return contradiction(format!(
                "cluster.peers does not name this node: add \"{}=HOST:PORT\" with the address of its peer listener",
                self.node.id
            ));
        }
        let has = |path: &Path| !path.as_os_str().is_empty();
        let tls = has(&self.listen.certificate);
        if tls != has(&self.listen.private_key) {
            return contradiction(
                "listen.certificate and listen.private_key belong together: set both, or neither".to_owned(),
            );
        }
        for (key, address) in [("listen.grpc", self.listen.grpc), ("listen.http", self.listen.http)] {
            if !address.ip().is_loopback() && !tls && !self.listen.plaintext {
                return contradiction(format!(
                    "{key} = \"{address}\" is outside loopback and carries no TLS: set listen.certificate and listen.private_key; \
                     or put a TLS proxy in front and set listen.plaintext = true; or listen on 127.0.0.1"
                ));
            }
        }
        self.root.check().map_err(ConfigError::Contradiction)?;
        let lease = Duration::from(self.vault.lease);
        if !(Duration::from_secs(3)..=Duration::from_mins(1)).contains(&lease) {
            return contradiction(format!("vault.lease is {}: it must lie between 3s and 60s", self.vault.lease));
        }
        let outlasts = |lease: LeaseConfig| lease.check(self.cluster.timing.elections().election_max).is_ok();
        if !outlasts(self.lease()) {
            let long_enough = |length| outlasts(LeaseConfig { length, ..self.lease() });
            let needed = (3..=60).find(|seconds| long_enough(Duration::from_secs(*seconds))).unwrap_or(60);
            return contradiction(format!(
                "vault.lease is {}: with cluster.timing = \"{}\" it must be {needed}s or more, to outlast an election of the vault",
                self.vault.lease, self.cluster.timing,
            ));
        }
        if Duration::from(self.cluster.vote_lost_after) < VOTE_LOST_AFTER_MIN {
            return contradiction(format!(
                "cluster.vote_lost_after is {}: with less than 5s a restart would cost a node its votes",
                self.cluster.vote_lost_after
            ));
        }
        if self.storage.move_rate.get() < MOVE_RATE_MIN {
            return contradiction(format!(
                "storage.move_rate is {}: with less than 1MiB a second, a replica might never catch up",
                self.storage.move_rate
            ));
        }
        if Duration::from(self.cluster.lost_after) < Duration::from_secs(5) {
            return contradiction(format!(
                "cluster.lost_after is {}: with less than 5s a node that restarts would count as lost",
                self.cluster.lost_after
            ));
        }
        if Duration::from(self.auth.refresh_ttl) < Duration::from(self.auth.access_ttl) {
            return contradiction(
                "auth.refresh_ttl is shorter than auth.access_ttl: a client could never refresh".to_owned(),
            );
        }
        Ok(())
    }
}

impl ListenSettings {
    /// Refuses two listeners at one place.
    fn check_distinct(&self) -> Result<(), String> {
        let all = [
            ("listen.grpc", self.grpc),
            ("listen.http", self.http),
            ("listen.metrics", self.metrics),
            ("listen.peers", self.peers),
        ];
        for (place, (key, address)) in all.iter().enumerate() {
            // All addresses of a machine include each; port 0 is another one for everybody.
            let meets = |other: &SocketAddr| {
                let everywhere = address.ip().is_unspecified() || other.ip().is_unspecified();
                address.port() != 0 && address.port() == other.port() && (everywhere || address.ip() == other.ip())
            };
            if let Some((other, there)) = all[..place].iter().find(|(_, other)| meets(other)) {
                return Err(format!(
                    "{other} = \"{there}\" and {key} = \"{address}\" are the same port: give each listener one of its own"
                ));
            }
        }
        Ok(())
    }
}

impl RootSettings {
    /// Refuses a provider that lacks what it needs.
    fn check(&self) -> Result<(), String> {
        match self.provider {
            Provider::File | Provider::Passphrase => Ok(()),
            Provider::Command if self.command.is_absolute() => Ok(()),
            Provider::Command => Err(format!(
                "root.command is \"{}\": with root.provider = \"command\" it must be the absolute path of a program",
                self.command.display()
            )),
            Provider::Transit => self.check_transit(),
        }
    }

    fn check_transit(&self) -> Result<(), String> {
        let host = self.transit_address.strip_prefix("https://").map(|rest| rest.trim_end_matches('/'));
        if !host.is_some_and(|host| !host.is_empty() && !host.contains(['/', '?', '#', '@', ' '])) {
            return Err(format!(
                "root.transit_address is \"{}\": it must be https://HOST:PORT, since the vault's master key travels there",
                self.transit_address
            ));
        }
        let names = |text: &str, separators: bool| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c) || (separators && c == '/');
            !text.is_empty()
                && text.len() <= 200
                && text.chars().all(plain)
                && !text.starts_with('/')
                && !text.ends_with('/')
        };
        for (key, value, separators) in
            [("root.transit_mount", &self.transit_mount, true), ("root.transit_key", &self.transit_key, false)]
        {
            if !names(value, separators) {
                return Err(format!(
                    "{key} is \"{value}\": letters, digits, '-', '_' and '.' are what such a name has"
                ));
            }
        }
        Ok(())
    }
}

/// Refuses variables that carry our prefix and belong to no setting.
fn refuse_unknown_variables(names: impl Iterator<Item = String>) -> Result<(), ConfigError> {
    let known: Vec<String> = ServerArgs::augment_args(clap::Command::new("serve"))
        .get_arguments()
        .filter_map(|arg| arg.get_env().and_then(|name| name.to_str()).map(str::to_owned))
        .collect();
    for name in names.filter(|name| name.starts_with(ENV_PREFIX)) {
        if !known.contains(&name) {
            let suggestion = known.iter().min_by_key(|candidate| distance(candidate, &name)).cloned();
            return Err(ConfigError::UnknownVariable { name, suggestion });
        }
    }
    Ok(())
}

/// The edit distance of two short names.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

impl From<Bytes> for ByteCount {
    fn from(bytes: Bytes) -> Self {
        Self(bytes.get())
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn refusal(text: &str) -> String {
        Config::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn the_defaults_are_valid() {
        assert!(Config::default().check().is_ok());
    }

    #[test]
    fn the_example_file_is_valid_and_shows_every_section() {
        let text = include_str!("../../ensign.toml");
        Config::parse(text).unwrap();
        for section in
            ["[node]", "[listen]", "[cluster]", "[storage]", "[auth]", "[vault]", "[root]", "[log]", "[shutdown]"]
        {
            assert!(text.contains(section), "{section} is missing");
        }
    }

    #[test]
    fn an_unknown_key_is_named() {
        assert!(refusal("[node]\nidd = 3").contains("idd"), "{}", refusal("[node]\nidd = 3"));
        assert!(refusal("[nodes]\nid = 3").contains("nodes"));
    }

    #[test]
    fn a_value_of_the_wrong_kind_names_its_key() {
        let message = refusal("[listen]\ngrpc = \"nowhere\"");
        assert!(message.contains("listen.grpc"), "{message}");
        assert!(refusal("[vault]\nlease = \"soon\"").contains("vault.lease"));
        assert!(refusal("[storage]\nprefill = \"12 parsecs\"").contains("storage.prefill"));
        assert!(refusal("[auth]\ntrusted_proxies = [\"proxy.internal\"]").contains("auth.trusted_proxies"));
    }

    #[test]
    fn proxies_are_trusted_by_file_and_by_flag() {
        let proxies = |config: &Config| config.auth.trusted_proxies.iter().map(IpAddr::to_string).collect::<Vec<_>>();
        let config = Config::parse("[auth]\ntrusted_proxies = [\"10.0.0.1\", \"::1\"]").unwrap();
        assert_eq!(proxies(&config), ["10.0.0.1", "::1"]);
        assert!(proxies(&Config::default()).is_empty());
        let command = ServerArgs::augment_args(clap::Command::new("serve"));
        let matches = command.get_matches_from(["serve", "--trusted-proxies", "10.0.0.2,10.0.0.3"]);
        let args = ServerArgs::from_arg_matches(&matches).unwrap();
        assert_eq!(proxies(&Config::load(None, args).unwrap()), ["10.0.0.2", "10.0.0.3"]);
    }

    #[test]
    fn an_unknown_variable_suggests_the_nearest() {
        let error = refuse_unknown_variables(["ENSIGN_SERVER_LISTEN_GRCP".to_owned()].into_iter()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "unknown variable ENSIGN_SERVER_LISTEN_GRCP: no server setting has that name; did you mean ENSIGN_SERVER_LISTEN_GRPC?"
        );
        assert!(refuse_unknown_variables(["ENSIGN_CLIENT_ID".to_owned()].into_iter()).is_ok());
    }

    #[test]
    fn a_flag_beats_the_file() {
        let command = ServerArgs::augment_args(clap::Command::new("serve"));
        let matches = command.get_matches_from(["serve", "--node-id", "3", "--peers", "3=127.0.0.1:1,4=localhost:2"]);
        let args = ServerArgs::from_arg_matches(&matches).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ensign.toml");
        std::fs::write(&file, "[node]\nid = 9\n[vault]\nlease = \"20s\"\n").unwrap();
        let config = Config::load(Some(&file), args).unwrap();
        assert_eq!(config.node.id, 3);
        assert_eq!(config.vault.lease, Seconds::new(20));
        assert_eq!(config.cluster.peers[1].to_string(), "4=localhost:2");
    }

    #[test]
    fn contradictions_are_refused() {
        assert!(refusal("[node]\nid = 0").contains("numbered from 1"));
        assert!(refusal("[node]\nregion = \"\"").contains("node.region is empty"));
        assert!(refusal("[node]\nzone = \"EU West\"").contains("node.zone"));
        assert!(refusal("[node]\nname = \"-a\"").contains("lower-case letters"));
        assert!(refusal("[cluster]\npeers = [\"2=h:1\"]").contains("does not name this node"));
        assert!(refusal("[cluster]\npeers = [\"1=h:1\", \"1=h:2\"]").contains("twice"));
        assert!(refusal("[listen]\ngrpc = \"0.0.0.0:5356\"").contains("listen.plaintext"));
        assert!(refusal("[listen]\ncertificate = \"c.pem\"").contains("belong together"));
        let tls = "[listen]\ngrpc = \"0.0.0.0:5356\"\ncertificate = \"c.pem\"\nprivate_key = \"c.key\"";
        Config::parse(tls).unwrap();
        assert!(refusal("[vault]\nlease = \"1s\"").contains("between 3s and 60s"));
        assert!(refusal("[auth]\nrefresh_ttl = \"1m\"").contains("could never refresh"));
    }

    #[test]
    fn listeners_have_ports_of_their_own() {
        let meet = refusal("[listen]\nhttp = \"127.0.0.1:5356\"");
        assert_eq!(
            meet,
            "listen.grpc = \"127.0.0.1:5356\" and listen.http = \"127.0.0.1:5356\" are the same port: give each listener one of its own"
        );
        assert!(refusal("[listen]\npeers = \"0.0.0.0:1205\"").contains("listen.metrics"), "all addresses include each");
        Config::parse("[listen]\nhttp = \"127.0.0.2:5356\"").unwrap();
        Config::parse("[listen]\ngrpc = \"127.0.0.1:0\"\nhttp = \"127.0.0.1:0\"").unwrap();
    }

    #[test]
    fn what_a_node_cannot_do_without_is_not_empty() {
        assert!(refusal("[node]\ndata_dir = \"\"").contains("node.data_dir is empty"));
        assert!(refusal("[node]\nroot_key = \"\"").contains("node.root_key is empty"));
        Config::parse("[node]\nroot_key = \"\"\n[root]\nprovider = \"passphrase\"").unwrap();
    }

    #[test]
    fn a_provider_of_the_root_key_that_lacks_something_is_refused() {
        assert!(refusal("[root]\nprovider = \"tpm\"").contains("root.provider"));
        for command in ["", "bin/kms"] {
            let refused = refusal(&format!("[root]\nprovider = \"command\"\ncommand = \"{command}\""));
            assert!(refused.contains("it must be the absolute path of a program"), "{refused}");
        }
        Config::parse("[root]\nprovider = \"command\"\ncommand = \"/usr/bin/kms\"").unwrap();
        let transit = |address: &str, mount: &str, key: &str| {
            format!(
                "[root]\nprovider = \"transit\"\ntransit_address = \"{address}\"\ntransit_mount = \"{mount}\"\ntransit_key = \"{key}\""
            )
        };
        for address in ["", "http://vault:8200", "https://", "https://vault/v1", "https://me@vault", "vault:8200"] {
            let refused = refusal(&transit(address, "transit", "root"));
            assert!(refused.contains("it must be https://HOST:PORT"), "{refused}");
        }
        assert!(refusal(&transit("https://vault:8200", "transit", "")).contains("root.transit_key"));
        assert!(refusal(&transit("https://vault:8200", "transit", "a/b")).contains("root.transit_key"));
        assert!(refusal(&transit("https://vault:8200", "/transit", "root")).contains("root.transit_mount"));
        Config::parse(&transit("https://vault:8200/", "team/transit", "ensign-root.v1")).unwrap();
    }

    #[test]
    fn a_lease_outlasts_the_elections_of_its_timing() {
        assert_eq!(Config::parse("").unwrap().vault.lease, Seconds::new(10));
        assert_eq!(Config::parse("[cluster]\ntiming = \"wan\"").unwrap().vault.lease, LEASE_WAN);
        let asked = Config::parse("[cluster]\ntiming = \"wan\"\n[vault]\nlease = \"40s\"").unwrap();
        assert_eq!(asked.vault.lease, Seconds::new(40));
        assert_eq!(
            refusal("[cluster]\ntiming = \"wan\"\n[vault]\nlease = \"10s\""),
            "vault.lease is 10s: with cluster.timing = \"wan\" it must be 23s or more, to outlast an election of the vault"
        );
        assert!(refusal("[vault]\nlease = \"3s\"").contains("with cluster.timing = \"lan\" it must be 5s or more"));
        assert!(refusal("[cluster]\ntiming = \"moon\"").contains("cluster.timing"));
    }

    #[test]
    fn every_setting_has_a_variable_with_the_prefix_and_help() {
        #[derive(clap::Parser)]
        struct Probe {
            #[command(flatten)]
            _args: ServerArgs,
        }
        for arg in Probe::command().get_arguments().filter(|arg| arg.get_id() != "help") {
            let name = arg.get_env().and_then(|name| name.to_str()).unwrap_or_default();
            assert!(name.starts_with(ENV_PREFIX), "{:?}", arg.get_id());
            assert!(arg.get_help().is_some(), "{name} has no help");
        }
    }
}
