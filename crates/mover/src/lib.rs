//! Moves disks from a source to a target while a guest writes them.
//!
//! ```text
//! source                                            target
//! Sender: take work, read, hash, compress --Data--> Receiver: check, write
//!         forget what is safe         <--Durable--  fsync, acknowledge
//! ```
//!
//! - [`extent`], [`work`], [`wire`], [`codec`], [`counters`], [`bucket`], [`zeros`] and [`rounds`] are pure.
//! - [`disk`] is the one place that touches disks, under QEMU's [`locks`]; [`sender`] and [`receiver`] are threads over it.
//!
//! Acknowledged means fsynced. Nothing here knows of QEMU's life, of owners or of a network: a
//! stream is a unix socket that somebody else connects.

pub mod bucket;
pub mod codec;
pub mod counters;
pub mod disk;
pub mod extent;
pub mod locks;
pub mod receiver;
pub mod rounds;
pub mod sender;
pub mod window;
pub mod wire;
pub mod work;
pub mod zeros;
