//! The embedded API as clients see it: over its own service, over TLS by kube-rs, and by kubectl.

mod access;
mod apply;
mod clients;
mod crds;
mod deletion;
mod objects;
mod watching;
mod world;
