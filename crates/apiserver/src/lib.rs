//! An embedded Kubernetes API: any kind of object over one generic handler, kept in SQLite.
//!
//! ```text
//! TLS (server) -> who, and may they (auth) -> handler: get, list, watch, create, update, patch, delete
//!                                               |  table of resources (catalog, builtin)
//!                                               |  what is right (schema, kinds), changes (patch, apply)
//!                                               v
//!                                             store: SQLite, and the cache that answers all reads
//! ```

pub mod api;
pub mod apply;
pub mod auth;
pub mod body;
pub mod builtin;
pub mod catalog;
pub mod decode;
pub mod deletion;
mod derived;
pub mod discovery;
pub mod embedded;
pub mod extension;
pub mod handler;
pub mod housekeeping;
pub mod kinds;
pub mod local;
pub mod meta;
pub mod names;
pub mod openapi;
pub mod patch;
pub mod protobuf;
pub mod quantity;
pub mod quota;
pub mod request;
pub mod resource;
pub mod scale;
pub mod schema;
pub mod selector;
pub mod server;
pub mod status;
pub mod store;
pub mod table;

/// Of this program.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Of this machine, as Kubernetes names it.
pub const ARCHITECTURE: &str = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
