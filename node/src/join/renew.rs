//! A node's certificate is renewed by the cluster's own authority before it ends. The key stays, so one file is replaced, at once.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use ensign_proto::NodeId;
use ensign_raft::env::{Clock, Stop, UnixNanos};
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use tracing::{info, warn};
use zeroize::Zeroizing;

use super::machine::pem;
use super::{AuthorityUnavailable, Joins};
use crate::certificates::validity;
use crate::config::ClusterSettings;
use crate::files::write_public;

/// How often it is asked whether it is time, beginning a while after the start.
const LOOK_EVERY: Duration = Duration::from_hours(1);
const FIRST_LOOK: Duration = Duration::from_mins(1);

/// A node's certificate, and what it is renewed with.
pub struct Renewal {
    /// Who signs.
    pub joins: Joins,
    /// Which node.
    pub node: NodeId,
    /// Further names that it is to carry.
    pub names: Vec<String>,
    /// Where its files are.
    pub cluster: ClusterSettings,
    /// What time it is.
    pub clock: Arc<dyn Clock>,
}

impl Renewal {
    /// Renews whenever a third of the certificate's time is left, until `stop`. One task a node.
    pub async fn keep(self, stop: Stop) {
        let mut wait = FIRST_LOOK;
        while stop.run_until_cancelled(tokio::time::sleep(wait)).await.is_some() {
            wait = LOOK_EVERY;
            match stop.run_until_cancelled(self.renew()).await {
                Some(Ok(true)) => info!("this node's certificate was renewed"),
                Some(Ok(false)) => {}
                Some(Err(error)) => {
                    warn!(%error, "this node's certificate could not be renewed; tried again in an hour");
                }
                None => return,
            }
        }
    }

    /// Renews if it is time and the cluster's own authority signed the certificate in use; answers whether it did.
    ///
    /// # Errors
    /// A file cannot be read or written, or the vault gives no key.
    pub async fn renew(&self) -> anyhow::Result<bool> {
        let validity = validity(&self.cluster.certificate).context("the certificate cannot be read")?;
        if !is_due(validity, self.clock.wall()) {
            return Ok(false);
        }
        let authority = match self.joins.authority().await {
            Ok(authority) => authority,
            Err(AuthorityUnavailable::ByHand) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        // A node whose files are of another authority is looked after by whoever runs that one.
        let trusted = std::fs::read(&self.cluster.authority).context("the authority's file cannot be read")?;
        let mut trusted = CertificateDer::pem_slice_iter(&trusted).filter_map(Result::ok);
        if !trusted.any(|der| der == *authority.der()) {
            return Ok(false);
        }
        let text = std::fs::read_to_string(&self.cluster.private_key).context("the private key cannot be read")?;
        let key = KeyPair::from_pem(&Zeroizing::new(text)).context("the private key cannot be used")?;
        let request = CertificateParams::default().serialize_request(&key).context("cannot make a request")?;
        let (certificate, _) = self.joins.certify(request.der(), self.node, self.names.clone()).await?;
        write_public(&self.cluster.certificate, pem("CERTIFICATE", &certificate).as_bytes())?;
        Ok(true)
    }
}

/// Whether a third of the time, or less, is left.
fn is_due((from, until): (UnixNanos, UnixNanos), now: UnixNanos) -> bool {
    let third = until.0.saturating_sub(from.0) / 3;
    now.0 >= until.0.saturating_sub(third)
}
