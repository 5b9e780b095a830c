//! The ensign command.
fn main() {}
