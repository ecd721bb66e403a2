//! QMP client: typed commands, raw events, one connection to one QEMU.
//!
//! ```text
//!                        Client (cheap clones)             QEMU
//!  Client::connect  ───────────────────────────────────────▶  socket
//!                   ◀─ {"QMP": {version, capabilities}} ────
//!                   ── qmp_capabilities (oob if offered) ──▶
//!  execute(a) ──┐   ┌─ {"execute": a, "id": 1} ────────────▶
//!  execute(b) ──┴ queue {"execute": b, "id": 2} ───────────▶
//!  Events     ◀──┐  ◀─ {"event": …}  ───────────────────────
//!  a, b       ◀──┴──◀─ {"return": …, "id": 1}, {"error": …} ─
//! ```
//!
//! One task owns the socket. A reply finds its waiter by id; a reply that
//! nobody waits for any more (its deadline passed, its future was dropped) is
//! thrown away and the connection lives on.
//!
//! What QEMU may add without breaking anything here: events, members of
//! replies, values of enums ([open enums](commands) keep them as `Unknown`).
//! What a QEMU at hand has is asked of it, never guessed from its version:
//! see [`schema`].
//!
//! ```no_run
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! use qmp::commands::{Migrate, QueryStatus};
//! use std::time::Duration;
//!
//! let second = Duration::from_secs(1);
//! let client = qmp::Client::connect("/run/vm/qmp.sock", second).await?;
//! let mut events = client.events();
//! assert!(client.execute(QueryStatus, second).await?.running);
//! client.execute(Migrate { uri: "unix:/run/vm/out.sock".into() }, second).await?;
//! while let Ok(event) = events.next().await {
//!     println!("{:?}", event.typed()?);
//! }
//! # Ok(())
//! # }
//! ```

#[macro_use]
mod open_enum;

pub mod client;
pub mod commands;
pub mod connect;
pub mod event;
pub mod schema;

mod connection;
mod line;

pub use client::{Client, Command, Error, ErrorClass, OutOfBand};
pub use connect::Options;
pub use connection::Closed;
pub use event::{Event, Events, Typed};
