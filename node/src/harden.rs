//! What keeps the keys of this process in this process.

use rustix::process::{Resource, Rlimit, setrlimit};
use tracing::warn;

/// Makes sure that no core dump ever holds a key. Both are needed: a handler that cores are piped to ignores the limit.
pub(crate) fn no_core_dumps() {
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    if let Err(error) = setrlimit(Resource::Core, none) {
        warn!(%error, "core dumps cannot be turned off, and would hold keys: start the server with `ulimit -c 0`");
    }
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable) {
        warn!(%error, "this process may be dumped, and a dump would hold keys: turn core dumps off on this machine");
    }
}
