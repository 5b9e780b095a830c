//! How fresh a client wants what it reads to be.

use ensign_proto::pb::ensign::v1beta1 as api;
use tonic::Status;

use crate::partition::Freshness;

/// What the field says; none if it says nothing.
///
/// # Errors
/// INVALID_ARGUMENT for a number that this build does not know: it may be one that promises more.
pub(super) fn asked(field: i32) -> Result<Option<Freshness>, Status> {
    match api::Consistency::try_from(field) {
        Ok(api::Consistency::Default) => Ok(None),
        Ok(api::Consistency::Latest) => Ok(Some(Freshness::Latest)),
        Ok(api::Consistency::Local) => Ok(Some(Freshness::Bounded)),
        Err(_) => {
            let message =
                format!("invalid consistency field: {field} is none of 0 (default), 1 (latest) and 2 (local)");
            Err(Status::invalid_argument(message))
        }
    }
}

/// What the field says, or what the call is by default.
pub(super) fn of(field: i32, default: Freshness) -> Result<Freshness, Status> {
    asked(field).map(|asked| asked.unwrap_or(default))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_consistency_is_one_that_is_known_or_refused() {
        assert_eq!(of(0, Freshness::Latest).unwrap(), Freshness::Latest);
        assert_eq!(of(0, Freshness::Known).unwrap(), Freshness::Known);
        assert_eq!(of(1, Freshness::Known).unwrap(), Freshness::Latest);
        assert_eq!(of(2, Freshness::Known).unwrap(), Freshness::Bounded);
        let refused = of(3, Freshness::Known).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument);
        assert!(refused.message().contains("2 (local)"), "{refused:?}");
    }
}
