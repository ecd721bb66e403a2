//! An embedded Kubernetes API: any kind of object over one generic handler, kept in SQLite.
//!
//! ```text
//! TLS -> who (auth) -> may they (auth) -> handler: get, list, watch, create, update, patch, delete
//!                                           |  table of resources (resource)
//!                                           |  schemas (schema), patches (patch), server-side apply (apply)
//!                                           v
//!                                         store: SQLite, and the cache that answers all reads
//! ```

pub mod resource;
pub mod schema;
pub mod status;
pub mod store;
