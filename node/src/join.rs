//! How a machine becomes a node.
//!
//! ```text
//! operator        token create ──> catalog: a hash, a time, a number of uses           (Joins::create_token)
//! new machine     key, made there and never sent ──> request ──> any node              (machine.rs)
//! any node        secret right? ──> catalog: use once, give a number ──> sign          (service.rs)
//! ```
//! The authority's key is a secret of the vault, its certificate a record of the catalog. A cluster whose certificates are made by hand
//! has neither; joining by token is then refused with a message that says how it is done by hand.

mod init;
mod machine;
mod renew;
mod service;
mod settings;
mod token;

pub use init::{InitSpec, Initialized, init};
pub use machine::{JoinSpec, Joined, join};
pub use renew::Renewal;
pub use service::service;
pub use token::Token;

use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ensign_proto::{ClusterId, ClusterVersion, NodeId};
use ensign_raft::env::{Clock, Rng, UnixNanos};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::authority::{Authority, AuthorityError, Subject, fingerprint};
use crate::catalog::{Catalog, JoinError, JoinToken};
use crate::identity::{AttemptLimits, Secret, SecretError, SecretKind, SecretStore};

/// The longest time a token may live.
pub const TTL_MAX: Duration = Duration::from_hours(24 * 30);
/// How many machines one token may let in.
pub const USES_MAX: u32 = 1_000;

/// Why there is no authority to sign with.
#[derive(Debug, Error)]
pub enum AuthorityUnavailable {
    /// The cluster was made with certificates of the operator's own authority.
    #[error(
        "this cluster has no certificate authority of its own: its certificates are made by hand, so nodes cannot join by token. \
         Sign a certificate for ensign-node-ID with your authority, with a number that no node ever had, name the new node in \
         cluster.peers, and start it (docs/operations/first-cluster.md, \"Certificates for the nodes\")"
    )]
    ByHand,
    /// The vault did not give the key.
    #[error(transparent)]
    Vault(#[from] SecretError),
    /// The key in the vault is missing, or not the certificate's.
    #[error(transparent)]
    Unusable(#[from] AuthorityError),
}

/// Why a token was not made.
#[derive(Debug, Error)]
pub enum CreateTokenError {
    /// The time is zero or too long.
    #[error("a join token lives from one second to 30 days")]
    Ttl,
    /// None, or too many.
    #[error("a join token lets in 1 to {USES_MAX} machines")]
    Uses,
    /// See there.
    #[error(transparent)]
    Authority(#[from] AuthorityUnavailable),
    /// See there.
    #[error(transparent)]
    Catalog(#[from] JoinError),
}

/// What joins need of a node.
pub struct JoinParts {
    /// The cluster.
    pub cluster: ClusterId,
    /// No joining machine is given a number up to this one.
    pub above: NodeId,
    /// Tokens and nodes.
    pub catalog: Catalog,
    /// Where the authority's key is.
    pub secrets: Arc<dyn SecretStore>,
    /// What time it is.
    pub clock: Arc<dyn Clock>,
    /// For tokens and serial numbers.
    pub rng: Arc<dyn Rng>,
}

/// Join tokens, and the authority that signs. Clones are cheap and share it.
#[derive(Clone)]
pub struct Joins {
    parts: Arc<JoinParts>,
    limits: Arc<Mutex<AttemptLimits>>,
}

impl fmt::Debug for Joins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Joins").field("cluster", &self.parts.cluster).finish_non_exhaustive()
    }
}

impl Joins {
    /// The joins of this node.
    pub fn new(parts: JoinParts) -> Self {
        Self { parts: Arc::new(parts), limits: Arc::new(Mutex::new(AttemptLimits::new())) }
    }

    /// Gives the cluster its authority: the key into the vault, then the certificate into the catalog. Again changes nothing.
    ///
    /// # Errors
    /// The cluster has another authority, or one of the two cannot be written.
    pub async fn import(&self, authority: &Authority) -> anyhow::Result<()> {
        self.parts.catalog.require(ClusterVersion::V2).await?;
        let secret = Secret::new(authority.private_key().as_bytes().to_vec());
        let place = *self.parts.cluster.as_bytes();
        match self.parts.secrets.put(SecretKind::Authority, place, secret.clone()).await {
            Ok(()) => {}
            // An earlier attempt.
            Err(SecretError::Exists) => {
                let kept = self.parts.secrets.get(SecretKind::Authority, place).await?;
                anyhow::ensure!(
                    kept.is_some_and(|kept| kept == secret),
                    "the vault has the key of another certificate authority already"
                );
            }
            Err(error) => return Err(error.into()),
        }
        self.parts.catalog.set_authority(authority.certificate()).await?;
        Ok(())
    }

    /// The cluster's authority, ready to sign.
    ///
    /// # Errors
    /// See [`AuthorityUnavailable`].
    pub async fn authority(&self) -> Result<Authority, AuthorityUnavailable> {
        let record = self.parts.catalog.authority().ok_or(AuthorityUnavailable::ByHand)?;
        let secret = self.parts.secrets.get(SecretKind::Authority, *self.parts.cluster.as_bytes()).await?;
        let unusable = |what: &str| AuthorityError::Unusable(what.to_owned());
        let secret = secret.ok_or_else(|| unusable("the vault does not have its key"))?;
        let key = std::str::from_utf8(secret.expose()).map_err(|_| unusable("its key in the vault is garbled"))?;
        Ok(Authority::from_pem(&record.certificate, key)?)
    }

    /// Makes a token that lets `uses` machines in within `ttl`. The text is shown once: only a hash of its secret is kept.
    ///
    /// # Errors
    /// See [`CreateTokenError`].
    pub async fn create_token(
        &self,
        ttl: Duration,
        uses: u32,
    ) -> Result<(Arc<JoinToken>, Zeroizing<String>), CreateTokenError> {
        if ttl < Duration::from_secs(1) || ttl > TTL_MAX {
            return Err(CreateTokenError::Ttl);
        }
        if uses == 0 || uses > USES_MAX {
            return Err(CreateTokenError::Uses);
        }
        let authority = self.authority().await?;
        let now = self.parts.clock.wall();
        let token = Token::generate(fingerprint(authority.der()), now, &*self.parts.rng);
        let expires = UnixNanos(now.0 + ttl.as_nanos() as u64);
        let (id, hash) = (token.id.to_bytes(), Token::hash(&*token.secret));
        let record = JoinToken { id, hash, created: now, expires, uses, used: 0, revoked_at: None };
        self.parts.catalog.create_join_token(record.clone()).await?;
        Ok((Arc::new(record), token.text()))
    }

    /// A certificate for a node of this cluster, for the key that signed `request`.
    pub(crate) async fn certify(
        &self,
        request: &[u8],
        node: NodeId,
        names: Vec<String>,
    ) -> Result<(Vec<u8>, Authority), AuthorityUnavailable> {
        let authority = self.authority().await?;
        let subject = Subject { names, ..Subject::node(node, self.parts.cluster, self.parts.clock.wall()) };
        let certificate = authority.sign(request, &subject, &*self.parts.rng)?;
        Ok((certificate.to_vec(), authority))
    }

    /// How long whoever calls from there has to wait; none for not at all.
    fn wait(&self, from: Option<IpAddr>, token: &[u8; 32]) -> Option<Duration> {
        self.limits.lock().unwrap_or_else(PoisonError::into_inner).wait(from, token, self.parts.clock.boot())
    }

    fn failed(&self, from: Option<IpAddr>, token: [u8; 32]) {
        self.limits.lock().unwrap_or_else(PoisonError::into_inner).failed(from, token, self.parts.clock.boot());
    }
}
