//! Storage: classes, and the volumes that claims get of them.

pub mod claims;
