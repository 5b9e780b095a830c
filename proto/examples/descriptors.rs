//! Writes the public API's file descriptors to standard output, for `tests/pyensign/wire_compat.py`.

use std::io::{self, Write as _};

fn main() -> io::Result<()> {
    io::stdout().write_all(ensign_proto::FILE_DESCRIPTOR_SET)
}
