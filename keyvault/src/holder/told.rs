//! What the vault's leader tells a holder without being asked: to give keys up, and that there is news.

use std::time::Duration;

use ensign_proto::pb::vault::v1 as pb;
use ensign_proto::{LogIndex, SessionId};
use thiserror::Error;
use tokio::time::timeout;

use super::Holder;
use super::table::Switched;
use crate::metrics;
use crate::wire::{self, Dead};

/// How long a surrender waits for uses in progress before it asks their streams to end.
const SEVER_AFTER: Duration = Duration::from_secs(2);
/// How long it then waits for them to have ended.
const SEVER_GRACE: Duration = Duration::from_secs(1);

/// Why a surrender is not answered with an acknowledgement. The vault then waits until the lease cannot be running any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum SurrenderError {
    /// The keys were held by another process: this one cannot speak for it.
    #[error("that session is not this process's")]
    OtherSession,
    /// A use did not end in time.
    #[error("a use of the key is still in progress")]
    InUse,
    /// The request makes no sense.
    #[error("malformed surrender")]
    Malformed,
}

/// Why news was not taken now. It comes with the next renewal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum RefreshError {
    /// It is for another process.
    #[error("that session is not this process's")]
    OtherSession,
    /// The vault did not answer a renewal in time.
    #[error("the lease was not renewed in time")]
    Late,
}

impl Holder {
    /// The vault's leader asks this process to give keys up. Answers once no use of them is in progress and their memory is
    /// overwritten; new uses are refused from the first moment. Cancel safe: what died stays dead.
    ///
    /// # Errors
    /// See [`SurrenderError`]: never an acknowledgement that is not true.
    pub async fn surrender(&self, request: pb::SurrenderRequest) -> Result<pb::SurrenderReply, SurrenderError> {
        let session = SessionId::try_from(&request.session[..]).map_err(|_| SurrenderError::Malformed)?;
        if session != self.0.session {
            return Err(SurrenderError::OtherSession);
        }
        let dead: Vec<Dead> = request
            .dead
            .iter()
            .map(|dead| wire::dead_from(self.0.config.cluster, dead))
            .collect::<Result<_, _>>()
            .map_err(|_| SurrenderError::Malformed)?;
        let switched = request.switched.iter().map(Switched::parse).collect::<Result<Vec<_>, _>>();
        let switched = switched.map_err(|_| SurrenderError::Malformed)?;
        let dying = {
            let mut table = self.0.table_mut();
            // Replies from before the revoke are on their way still; from now on they are ignored.
            table.lease.saw(LogIndex(request.index));
            table.kill(&dead, self.0.config.node);
            for switched in &switched {
                table.switch(switched);
            }
            table.dying()
        };
        self.0.deaths.send_modify(|count| *count += 1);
        if timeout(SEVER_AFTER, self.0.uses_ended(&dying)).await.is_err() {
            for held in &dying {
                held.severed.cancel();
            }
            let ended = timeout(SEVER_GRACE, self.0.uses_ended(&dying)).await;
            if ended.is_err() {
                metrics::surrendered("in_use");
                return Err(SurrenderError::InUse);
            }
        }
        for held in &dying {
            held.slot.wipe();
        }
        metrics::surrendered("done");
        Ok(pb::SurrenderReply { session: request.session, index: request.index })
    }

    /// The vault's leader says that there is news at `index`: renews the lease now instead of when it is due, and answers once
    /// this process has acted on everything up to there. Nothing is believed but what the vault's own reply says. Cancel safe.
    ///
    /// # Errors
    /// See [`RefreshError`].
    pub async fn refresh(&self, request: pb::RefreshRequest) -> Result<pb::RefreshReply, RefreshError> {
        if request.session[..] != self.0.session.as_bytes()[..] {
            return Err(RefreshError::OtherSession);
        }
        let mut renewed = self.0.renewed.subscribe();
        if renewed.borrow_and_update().0 < request.index {
            self.0.nudge.notify_one();
        }
        let heard =
            timeout(self.0.config.lease.call_deadline(), renewed.wait_for(|seen| seen.0 >= request.index)).await;
        let seen = heard.ok().and_then(Result::ok).map(|seen| seen.0).ok_or(RefreshError::Late)?;
        Ok(pb::RefreshReply { session: request.session, index: seen })
    }
}
