//! How the cluster is: each node's word about itself, and the words of all nodes put together.
//!
//! ```text
//! ensign doctor ── Admin.ClusterReport ──> this node ── Report.Node ──> every other node       (gather.rs)
//!                                              └── Reporter::own                              (own.rs)
//! ```
//! Nothing here needs a quorum, a lease or an up-to-date catalog: it is for the hour in which those are missing. What the
//! reports mean, and what to do about it, is told by the command line (`cli::doctor`).

mod gather;
pub(crate) mod metrics;
mod own;

pub use gather::{PeerReports, ReportService};
pub(crate) use own::vault_report;
pub use own::{Reporter, ReporterParts};
