//! Brings disk images to where a virtual machine's disk is: a raw file or a block device.
//!
//! [`import`] fetches an image from an HTTP server, a container registry, another node or a file,
//! decompresses it, converts it and writes it to a [`Target`]. Everything that comes from
//! outside is bounded and checked before the target is touched. What was done is kept in the
//! job's work folder: the same job goes on where it was when its future was dropped or its
//! process died.
//!
//! [`Cache`] keeps the disks of container images on a node, and [`seed`] builds the small
//! disks that configure a guest.
//!
//! It runs `qemu-img` (Debian's qemu-utils) for qcow2 images, and `xorriso` or `genisoimage`
//! for seeds.
//!
//! TLS needs a process-wide provider, which the caller installs once before the first import:
//! `rustls::crypto::aws_lc_rs::default_provider().install_default()`.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod cache;
mod checksum;
mod confine;
mod convert;
mod error;
mod format;
mod frames;
mod http;
mod job;
mod layers;
mod layout;
mod lend;
mod patience;
pub mod peer;
mod progress;
mod qcow2;
mod registry;
pub mod seed;
mod source;
mod sparse;
mod target;
mod unpack;
mod work;

pub use cache::{Cache, Cached, Pull};
pub use checksum::Checksum;
pub use confine::confine;
pub use error::Error;
pub use format::{Format, detect, virtual_size};
pub use job::{Imported, Job, Limits, Target, import};
pub use lend::Lent;
pub use progress::{Progress, Reports, Step};
pub use qcow2::Qcow2Fault;
pub use source::{Credentials, Http, Peer, Registry, Source};
pub use sparse::ephemeral;
