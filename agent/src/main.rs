//! See the crate.
fn main() {}
