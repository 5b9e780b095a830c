//! How fresh what is read has to be.

use ensign_proto::pb::ensign::v1beta1 as pb;

/// How fresh what is read has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Consistency {
    /// What the call does unless it is told otherwise.
    #[default]
    Default,
    /// Everything that was acknowledged before the call. The server asks a majority first, and refuses if it cannot.
    Latest,
    /// What the nearest replica has: what was acknowledged within the last five seconds may be missing, and nothing older. Usually
    /// without asking anyone; a server that cannot tell how old its replica is refuses.
    Local,
}

impl Consistency {
    pub(crate) fn to_wire(self) -> i32 {
        let wire = match self {
            Self::Default => pb::Consistency::Default,
            Self::Latest => pb::Consistency::Latest,
            Self::Local => pb::Consistency::Local,
        };
        wire.into()
    }
}
