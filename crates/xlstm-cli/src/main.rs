//! The `xlstm` command.
fn main() {}
