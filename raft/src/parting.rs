//! What a replica leaves behind when its place is elsewhere: its vote, and where its log ended.
//!
//! A replica that leaves a group gives its log up, and may be asked back one day. Had it forgotten what it promised, it could promise the
//! opposite. Two members of an old membership that slept through the change, this one with an empty memory among them, would be
//! a majority of that membership: they would elect a leader without what was committed since, or follow one that was deposed. So two things
//! are kept, and with them it is as if it had forgotten nothing:
//!
//! * the vote, so that neither a leader nor a candidate of an older term finds it willing, and
//! * the end of the log (the *floor*): whoever stands for election with a log that ends before it gets no vote. An empty log, or one that is
//!   on its way back, would let anybody pass.
//!
//! What it acknowledges it has on disk, as ever, so appends need no such check. The floor does no harm: a leader that takes the replica in
//! again wrote an entry of its own term first, which is past it.

use bytes::Bytes;
use ensign_storage::GroupState;
use openraft::raft::{VoteRequest, VoteResponse};
use thiserror::Error;

use crate::codec;
use crate::replica::Replica;
use crate::types::{Types, Vote, log_id};

/// The vote in the log is not one.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the vote of a replica that leaves cannot be read: {what}")]
pub struct PartingError {
    what: String,
}

/// What to keep of a replica that leaves its group and has stopped: the vote for [`ensign_storage::NodeLog::forget`]. None for one that never
/// promised anything, which may be removed whole.
///
/// # Errors
/// [`PartingError`]: the log is damaged. Keep it.
pub fn parting(state: &GroupState) -> Result<Option<Bytes>, PartingError> {
    let stored = state.vote.clone().map(codec::decode_vote).transpose();
    let stored = stored.map_err(|error| PartingError { what: error.to_string() })?;
    if stored.is_none() && state.last.is_none() {
        return Ok(None);
    }
    // A founder that has not voted yet holds its first entry and no vote: the first vote of all binds it to nothing.
    let (vote, before) = stored.unwrap_or((Vote::new(0, 0), None));
    let floor = state.last.map(log_id).max(before);
    Ok(Some(codec::encode_vote(&vote, floor.as_ref())))
}

impl Replica {
    /// The answer to who asks for a vote, or would, with a log that ends before what this replica once held. `None`: ask the core.
    pub(crate) fn remembers_more(&self, request: &VoteRequest<Types>) -> Option<VoteResponse<Types>> {
        let floor = self.floor.filter(|floor| request.last_log_id < Some(*floor))?;
        let standing = self.standing()?;
        Some(VoteResponse::new(standing.vote, Some(floor).max(standing.last), false))
    }
}

#[cfg(test)]
mod tests {
    use ensign_proto::{LogIndex, Term};
    use ensign_storage::EntryId;

    use super::*;
    use crate::types::LogId;

    fn end(term: u64, index: u64) -> EntryId {
        EntryId { term: Term(term), index: LogIndex(index) }
    }

    fn kept(state: &GroupState) -> (Vote, Option<LogId>) {
        codec::decode_vote(parting(state).unwrap().unwrap()).unwrap()
    }

    #[test]
    fn the_vote_and_the_farthest_end_are_kept_however_often_a_replica_leaves() {
        assert_eq!(parting(&GroupState::default()), Ok(None), "it never promised anything");
        let vote = Vote::new_committed(5, 2);
        let state =
            GroupState { vote: Some(codec::encode_vote(&vote, None)), last: Some(end(4, 9)), ..GroupState::default() };
        let floor = LogId::new_term_index(4, 9);
        assert_eq!(kept(&state), (vote, Some(floor)));
        // It came back, got half of the log, and left again.
        let back =
            GroupState { vote: Some(codec::encode_vote(&vote, Some(&floor))), last: Some(end(1, 3)), ..state.clone() };
        assert_eq!(kept(&back), (vote, Some(floor)));
        let past = GroupState { last: Some(end(6, 10)), ..back };
        assert_eq!(kept(&past), (vote, Some(LogId::new_term_index(6, 10))));
        assert!(parting(&GroupState { vote: Some(Bytes::from_static(b"\x09")), ..state }).is_err());
    }
}
