//! The API with what is added to it, as its clients meet it: a server of its own for each test.

mod access;
mod aggregated;
mod bad;
mod console;
mod evictions;
mod lifecycle;
mod manifests;
mod site;
mod types;
mod webhooks;
mod world;
