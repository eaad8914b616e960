//! The `patrickstar` command.
fn main() {}
