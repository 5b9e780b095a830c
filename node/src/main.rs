//! The `ensign` command.

use std::process::ExitCode;

/// Why not the system's: ADR 40.
#[cfg(target_os = "linux")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    ensign_node::cli::main()
}
