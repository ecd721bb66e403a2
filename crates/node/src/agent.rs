//! A node's agent: runs the pods that are bound to its node.

pub mod command;
pub mod files;
pub mod images;
pub mod machine;
pub mod record;
pub mod status;
pub mod volumes;
