//! A partition: one ordered, replicated, sealed sequence of events.
//!
//! ```text
//! publish stream ─> appender ─┬─> batcher (on the leader) ─seal─> raft ─> machine ─> tail ─> reader ─open─> subscriber, query
//!                             └─forward─> batcher (on another node)            └─> log ──┘
//! ```
//!
//! Left of `seal` and right of `open` are the only places where event bytes are readable.

mod append;
mod appender;
mod batch;
mod batcher;
mod block;
mod checkpoint;
mod elsewhere;
mod entry;
mod event;
pub mod forward;
mod freshness;
mod handle;
mod index;
mod keys;
mod machine;
pub mod metrics;
mod open;
mod producers;
mod reach;
mod reader;
mod registry;
mod rlid;
mod room;
mod route;
mod seat;
mod tail;
mod types;

pub use append::{AppendError, Appended, AppendedRun, Chunk, Outcome};
pub use appender::{Appender, Numbering, PublishError, Submission};
pub use batcher::{Admission, BatchLimits, Batcher, BatcherParts, Slot};
pub use block::{BodyShape, Envelope, MalformedBlock};
pub use elsewhere::{Counting, Page, Pages, Place, ReadLink, Stand, Unread, Wanted};
pub use freshness::{Freshness, STALENESS_MAX};
pub use handle::{BarrierLink, Counters, Counts, LogPlace, PartitionHandle, ReadError};
pub use keys::{InUse, KeyUse, Keys, KeysError, NewDek};
pub use machine::{Applied, DekRow, PartitionMachine, TypeCount};
pub use producers::{Sequenced, Verdict};
pub use reach::{Extent, Reach};
pub use reader::Reader;
pub use registry::{NotServed, Partitions, PartitionsParts};
pub use route::{ForwardLink, Route};
pub use tail::{StoredBatch, Tail, TailBudget};

pub(crate) use event::{RawKind, encode_body};
pub(crate) use producers::made_at;
pub(crate) use room::FairRoom;

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
