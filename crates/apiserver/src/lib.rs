//! An embedded Kubernetes API: any kind of object over one generic handler, kept in SQLite.
//!
//! So far the store alone: [`store`].

pub mod store;
