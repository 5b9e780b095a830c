//! For operators on this machine: a socket in the file system, which works when nobody can log in.
//!
//! A sealed vault verifies no secret and signs no token, so who may unseal it cannot be asked of the cluster. The file system answers
//! instead: the socket is for the server's own user and for root, who could read everything that this node keeps anyway. A passphrase
//! that is typed here travels over no network. Each connection's user is checked besides the file's mode, so that there is no moment
//! between making the socket and closing it to others. Not here: what unsealing is (`keyvault`).
#![deny(clippy::wildcard_enum_match_arm)]

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ensign_keyvault::{CallError, Held, Passphrase, RootError, UnsealError, Vault, VaultClient};
use ensign_proto::pb::admin::v1 as pb;
use ensign_proto::pb::admin::v1::local_server::{Local, LocalServer};
use ensign_proto::{ClusterVersion, LogIndex, NodeId};
use ensign_raft::env::{Stop, Tasks};
use futures::Stream;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{Instant, sleep};
use tonic::transport::Server;
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Response, Status};
use tracing::{error, info, warn};
use zeroize::{Zeroize as _, Zeroizing};

use crate::admin;
use crate::catalog::Patience;
use crate::report::vault_report;

/// The largest request: a passphrase and its frame.
const REQUEST_MAX: usize = 4 << 10;
/// Calls of one connection at once.
const STREAMS: u32 = 8;
/// How long a call may take: a passphrase that needs two gigabytes takes seconds, and a lift waits for the vault's leader.
const CALL_TIME: Duration = Duration::from_mins(1);
/// After the system had no file for a connection.
const PAUSE: Duration = Duration::from_millis(500);
/// How long an answer waits for this node's replica to see what was lifted.
const SEEN: Duration = Duration::from_secs(3);
const LOOK: Duration = Duration::from_millis(10);

/// What operators on this machine may ask of the node.
pub(crate) struct LocalParts {
    /// This node.
    pub(crate) node: NodeId,
    /// The vault's replica on it.
    pub(crate) vault: Vault,
    /// The vault.
    pub(crate) client: VaultClient,
    /// The cluster's version.
    pub(crate) version: Arc<dyn Fn() -> ClusterVersion + Send + Sync>,
}

/// Serves operators at `path` until the tasks stop. A node whose socket cannot be made runs all the same, and says so.
pub(crate) fn serve(path: PathBuf, parts: LocalParts, tasks: &Tasks) {
    let listener = match bind(&path) {
        Ok(listener) => listener,
        Err(error) => {
            error!(
                socket = %path.display(), %error,
                "operators on this machine cannot reach the node, and cannot unseal it: set listen.operator to another path and restart"
            );
            return;
        }
    };
    tasks.spawn("operator-socket", |stop| async move {
        let service = LocalServer::new(Service(parts)).max_decoding_message_size(REQUEST_MAX);
        let server = Server::builder().timeout(CALL_TIME).max_concurrent_streams(STREAMS).add_service(service);
        let incoming = guests(listener, stop.clone());
        if let Err(error) = server.serve_with_incoming_shutdown(incoming, stop.cancelled_owned()).await {
            error!(%error, "the operators' socket failed");
        }
        let _ = fs::remove_file(path);
    });
}

/// Makes the socket. One that is there already is what a crash left: the data directory is locked, so nobody serves it.
fn bind(path: &Path) -> io::Result<UnixListener> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => fs::remove_file(path)?,
        Ok(_) => return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is something else than a socket")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Connections of the server's own user and of root.
fn guests(listener: UnixListener, stop: Stop) -> impl Stream<Item = io::Result<UnixStream>> {
    futures::stream::unfold((listener, stop), |(listener, stop)| async move {
        loop {
            match stop.run_until_cancelled(listener.accept()).await? {
                Ok((stream, _)) => match stream.peer_cred() {
                    Ok(who) if is_welcome(who.uid()) => return Some((Ok(stream), (listener, stop))),
                    Ok(who) => warn!(uid = who.uid(), "another user was turned away from the operators' socket"),
                    Err(error) => warn!(%error, "somebody without a user was turned away from the operators' socket"),
                },
                Err(error) => {
                    warn!(%error, "the operators' socket accepts nobody for a moment");
                    sleep(PAUSE).await;
                }
            }
        }
    })
}

fn is_welcome(uid: u32) -> bool {
    uid == 0 || uid == rustix::process::geteuid().as_raw()
}

struct Service(LocalParts);

impl Service {
    /// Who is named in the vault's record of events.
    fn actor<T>(&self, request: &Request<T>) -> String {
        let who = request.extensions().get::<UdsConnectInfo>().and_then(|info| info.peer_cred);
        let uid = who.map_or_else(|| "?".to_owned(), |who| who.uid().to_string());
        format!("operator on node {}, uid {uid}", self.0.node)
    }

    /// Returns once this node's replica has seen `index`, or after a while.
    async fn seen(&self, index: LogIndex) {
        let deadline = Instant::now() + SEEN;
        while self.0.vault.seal_status().applied < index && Instant::now() < deadline {
            sleep(LOOK).await;
        }
        self.0.vault.settle().await;
    }
}

#[tonic::async_trait]
impl Local for Service {
    async fn local_vault_status(
        &self,
        _request: Request<pb::LocalVaultStatusRequest>,
    ) -> Result<Response<pb::VaultReport>, Status> {
        Ok(Response::new(vault_report(&self.0.vault)))
    }

    async fn unseal_vault(
        &self,
        request: Request<pb::UnsealVaultRequest>,
    ) -> Result<Response<pb::UnsealVaultReply>, Status> {
        let actor = self.actor(&request);
        let phrase = phrase(request.into_inner().passphrase)?;
        let unsealed = self.0.vault.unseal(phrase.as_ref()).await.map_err(|error| refusal(&error))?;
        drop(phrase);
        if !unsealed.already {
            info!(by = actor, "the root key was proven on this node");
        }
        if unsealed.held {
            let lifted = repeated(|| self.0.client.lift(&actor)).await;
            let lifted = lifted.map_err(|error| {
                let status = admin::vault_status(&error);
                let message = format!(
                    "the root key is right, but the seal of the whole vault could not be lifted: {}. Run the command again",
                    status.message()
                );
                Status::new(status.code(), message)
            })?;
            info!(by = actor, index = lifted.index.0, "the vault's seal was lifted");
            self.seen(lifted.index).await;
        }
        let vault = Some(vault_report(&self.0.vault));
        Ok(Response::new(pb::UnsealVaultReply { already: unsealed.already, lifted: unsealed.held, vault }))
    }

    async fn local_seal_vault(
        &self,
        request: Request<pb::SealVaultRequest>,
    ) -> Result<Response<pb::SealVaultReply>, Status> {
        let actor = self.actor(&request);
        seal(&self.0.client, (self.0.version)(), &actor).await.map(Response::new)
    }
}

/// Seals the vault.
///
/// # Errors
/// FAILED_PRECONDITION: a node of an older build could not follow. UNAVAILABLE, DEADLINE_EXCEEDED: as for every change of the vault.
pub(crate) async fn seal(
    client: &VaultClient,
    version: ClusterVersion,
    actor: &str,
) -> Result<pb::SealVaultReply, Status> {
    if version < ClusterVersion::V2 {
        return Err(Status::failed_precondition(format!(
            "the cluster is at version {version}, and a vault can be sealed from version {} on: `ensign cluster version` shows which nodes are behind; \
             to stop everything now, stop the nodes that hold the vault",
            ClusterVersion::V2
        )));
    }
    let held = repeated(|| client.seal(actor)).await.map_err(|error| admin::vault_status(&error))?;
    warn!(by = actor, index = held.index.0, "an operator has sealed the vault");
    let keys_end_within = prost_types::Duration::try_from(held.wait).ok();
    Ok(pb::SealVaultReply { index: held.index.0, keys_end_within })
}

/// Repeats a call while the vault is only on its way: both calls may be repeated.
async fn repeated<F>(call: impl Fn() -> F) -> Result<Held, CallError>
where
    F: Future<Output = Result<Held, CallError>>,
{
    let patience = Patience::new();
    loop {
        match call().await {
            Err(error) if patience.again(&error).await => {}
            settled => return settled,
        }
    }
}

/// What was typed, taken out of the buffer that it came in.
fn phrase(typed: bytes::Bytes) -> Result<Option<Passphrase>, Status> {
    if typed.is_empty() {
        return Ok(None);
    }
    let copied = Zeroizing::new(typed.to_vec());
    if let Ok(mut buffer) = typed.try_into_mut() {
        buffer[..].zeroize();
    }
    Passphrase::new(copied).map(Some).map_err(|error| Status::invalid_argument(error.to_string()))
}

fn refusal(error: &UnsealError) -> Status {
    let message = error.to_string();
    match error {
        UnsealError::Busy | UnsealError::TooSoon { .. } | UnsealError::Root(RootError::Memory { .. }) => {
            Status::resource_exhausted(message)
        }
        UnsealError::NoPassphrase { .. } | UnsealError::Root(RootError::PassphraseRefused(_)) => {
            Status::invalid_argument(message)
        }
        UnsealError::Root(RootError::PassphraseWrong) => Status::permission_denied(message),
        UnsealError::Root(RootError::Damaged { .. }) => Status::data_loss(message),
        UnsealError::Root(RootError::Provider { .. }) => Status::unavailable(message),
        UnsealError::NotNow { .. }
        | UnsealError::Root(
            RootError::PassphraseNeeded
            | RootError::WrongKind { .. }
            | RootError::Unsupported { .. }
            | RootError::WrongKey { .. }
            | RootError::Missing { .. }
            | RootError::File(_),
        ) => Status::failed_precondition(message),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use ensign_keyvault::Entropy;
    use ensign_keyvault::testing::TestVault;
    use ensign_proto::ClusterId;

    use super::*;

    #[tokio::test]
    async fn a_socket_is_for_its_user_and_replaces_what_a_crash_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ensign.sock");
        drop(bind(&path).unwrap());
        assert!(path.exists(), "a dropped listener leaves its socket, as a crash does");
        let _listener = bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        let other = folder.path().join("file");
        fs::write(&other, "precious").unwrap();
        assert_eq!(bind(&other).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&other).unwrap(), b"precious");
        let far = folder.path().join("x".repeat(200));
        assert!(bind(&far).is_err(), "longer than a socket's name may be");
    }

    #[tokio::test]
    async fn a_vault_is_sealed_only_where_every_node_can_follow() {
        let vault = TestVault::new(ClusterId::from_bytes([1; 16]));
        let client =
            VaultClient::new(vault.link(NodeId(1)), ClusterId::from_bytes([1; 16]), NodeId(1), &Entropy::kernel());
        let refused = seal(&client, ClusterVersion::V1, "ada").await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
        assert!(refused.message().contains("`ensign cluster version` shows which nodes are behind"), "{refused}");
        assert!(!client.lift("ada").await.unwrap().held, "nothing was sealed");
        let sealed = seal(&client, ClusterVersion::V2, "ada").await.unwrap();
        assert!(sealed.index > 0 && sealed.keys_end_within.is_some_and(|within| within.seconds >= 10), "{sealed:?}");
        assert!(client.seal("ada").await.unwrap().held);
    }

    #[test]
    fn only_the_servers_user_and_root_are_welcome() {
        let own = rustix::process::geteuid().as_raw();
        assert!(is_welcome(own) && is_welcome(0));
        assert!(!is_welcome(own + 1) && !is_welcome(u32::MAX));
    }

    #[test]
    fn what_is_typed_is_a_passphrase_or_an_error_that_says_why() {
        assert!(phrase(bytes::Bytes::new()).unwrap().is_none());
        assert_eq!(phrase("a b\n".into()).unwrap().unwrap().expose(), b"a b");
        let refused = phrase("a\nb".into()).unwrap_err();
        assert_eq!(
            (refused.code(), refused.message()),
            (tonic::Code::InvalidArgument, "the passphrase has more than one line")
        );
    }

    #[test]
    fn each_way_to_stay_sealed_has_a_code_that_says_what_to_do() {
        let code = |error: UnsealError| refusal(&error).code();
        assert_eq!(code(RootError::PassphraseWrong.into()), tonic::Code::PermissionDenied);
        assert_eq!(code(UnsealError::TooSoon { wait: Duration::from_millis(1_200) }), tonic::Code::ResourceExhausted);
        assert_eq!(code(RootError::Damaged { what: "it" }.into()), tonic::Code::DataLoss);
        assert_eq!(code(RootError::PassphraseNeeded.into()), tonic::Code::FailedPrecondition);
        let soon = refusal(&UnsealError::TooSoon { wait: Duration::from_millis(1_200) });
        assert!(soon.message().contains("in 2 s"), "{}", soon.message());
    }
}
