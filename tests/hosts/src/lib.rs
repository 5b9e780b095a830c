//! Clusters of real `ensign serve` processes, faults between and in them, and the promises that are checked meanwhile.
//!
//! ```text
//! scenario ─┬─ cluster    processes with their own certificates, settings and data: start, kill -9, pause, SIGTERM
//!           ├─ links      cut, delay and throttle each direction of each link: in network namespaces, or through a proxy
//!           ├─ faults     what goes wrong and when, drawn from a seed
//!           ├─ workload   our client, which sends until it is acked, and the unmodified PyEnsign, which never sends twice
//!           ├─ balancer   what stands in front of a cluster whose clients know one address
//!           └─ checker    judges what all of them saw; knows nothing of how it came about
//! ```
//!
//! It knows the public API, the command line and process ids, and none of our internals.

pub mod balancer;
pub mod certificates;
pub mod checker;
pub mod cluster;
pub mod faults;
pub mod history;
pub mod links;
pub mod process;
pub mod scenario;
pub mod workload;
