//! The guest's own witness.
fn main() {}
