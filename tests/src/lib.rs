//! End-to-end tests with real guests: the world they live in.

pub mod guest;
pub mod witness;
pub mod world;
