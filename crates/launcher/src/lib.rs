//! One VM: QEMU, mover and handover put together.
//!
//! A launcher is a process with one VM in it, or none yet, or none any more. It holds the VM's
//! folder on its host and is spoken to through the sockets in it:
//!
//! ```text
//! <host>/gateway.sock             this host's handler: owner record, ways to other hosts
//! <host>/disks/                   marks: disks that must not be started
//! <host>/vms/<vm>/lock            held by the launcher while it lives
//!                 launcher.sock   its API: HTTP and JSON              [api], [client]
//!                 streams.sock    a move's streams come in            [migration]
//!                 <serial>.sock   a serial port, for any program      [console]
//!                 <serial>.qemu, qmp.sock, nbd.sock    between the launcher and its QEMU
//!                 qemu.log, qemu.log.1                 what QEMU says
//! ```
//!
//! It knows nothing of Kubernetes. What may run is the owner record's affair ([owner]), what a VM
//! is the spec's ([spec]), what it does now the status's ([status]).

pub mod api;
pub mod client;
pub mod console;
pub mod folder;
pub mod forecast;
pub mod migration;
pub mod owner;
pub mod peers;
pub mod qemu;
mod run;
pub mod spec;
pub mod status;
pub mod usage;
pub mod vm;

pub use run::{Error, run};

/// An error with all its causes, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join("; ")
}
