//! The `ensign` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    ensign_node::cli::main()
}
