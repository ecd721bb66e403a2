//! End-to-end tests with real guests: the world they live in.

pub mod bench;
pub mod chaos;
pub mod guest;
pub mod media;
pub mod scene;
pub mod witness;
pub mod world;
