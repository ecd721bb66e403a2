//! The NBD server and its exports, as QMP sees them.
//!
//! An export is gone, and its bitmaps are no longer busy, when its last client
//! is: at the event `BLOCK_EXPORT_DELETED`, after the answer to the command.

use super::chardev;
use super::commands::{Arguments, done};
use super::error::Error;
use super::lock;
use super::machine::{Machine, Qemu};
use super::nbd;
use rustix::net::{Shutdown, shutdown};
use serde_json::{Value, json};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, PoisonError};

/// The server, if it runs, and its exports, newest first.
#[derive(Debug, Default)]
pub struct Exports {
    server: Option<Server>,
    all: Vec<Export>,
    last_client: u64,
}

#[derive(Debug)]
struct Server {
    path: String,
    listener: Arc<UnixListener>,
    /// Clients at a time; 0: any number.
    most: u64,
    clients: Vec<(u64, UnixStream)>,
}

/// One export.
#[derive(Debug, Clone)]
pub struct Export {
    /// Its id.
    id: String,
    /// The name that clients ask for.
    pub name: String,
    /// Its node.
    pub node: String,
    /// Bitmaps that it shows: node and name.
    pub bitmaps: Vec<(String, String)>,
    clients: Vec<u64>,
    closing: bool,
}

impl Exports {
    /// `query-block-exports`.
    pub fn query(&self) -> Value {
        let one = |export: &Export| {
            json!({
                "id": export.id, "type": "nbd", "node-name": export.node,
                "shutting-down": export.closing,
            })
        };
        self.all.iter().map(one).collect()
    }

    /// The export that clients know by `name`.
    pub fn by_name(&self, name: &str) -> Option<Export> {
        self.all.iter().find(|export| export.name == name && !export.closing).cloned()
    }

    /// Counts a client of an export; false when it is gone.
    pub fn enter(&mut self, name: &str, client: u64) -> bool {
        let mut all = self.all.iter_mut();
        let export = all.find(|export| export.name == name && !export.closing);
        export.map(|export| export.clients.push(client)).is_some()
    }

    /// Cuts the clients of an export off and lets no new ones in.
    fn close(&mut self, id: &str) {
        let Some(export) = self.all.iter_mut().find(|export| export.id == id) else { return };
        export.closing = true;
        let server = self.server.iter().flat_map(|server| &server.clients);
        for (_, stream) in server.filter(|(client, _)| export.clients.contains(client)) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Takes out what is closing and has no clients.
    fn finished(&mut self) -> Vec<Export> {
        let over = |export: &mut Export| export.closing && export.clients.is_empty();
        self.all.extract_if(.., over).collect()
    }
}

/// `nbd-server-start`.
///
/// # Errors
/// As QEMU.
pub fn start_server(qemu: &Arc<Qemu>, args: Arguments<'_>) -> Result<Value, Error> {
    let mut exports = lock(&qemu.exports);
    if exports.server.is_some() {
        return Err(Error::generic("NBD server already running"));
    }
    let address = args.0.get("addr").cloned().unwrap_or_default();
    if address["type"] != "unix" {
        return Err(Error::generic("The stub serves NBD on Unix sockets only"));
    }
    let path = address["data"]["path"].as_str().unwrap_or_default().to_owned();
    let listener = Arc::new(chardev::listen(&path)?);
    let most = args.0.get("max-connections").and_then(Value::as_u64).unwrap_or(0);
    exports.server = Some(Server { path, listener: listener.clone(), most, clients: Vec::new() });
    let qemu = qemu.clone();
    std::thread::spawn(move || accept_all(&qemu, &listener));
    done()
}

/// Ends when the listener is shut down.
fn accept_all(qemu: &Arc<Qemu>, listener: &UnixListener) {
    loop {
        {
            let full = |exports: &mut Exports| match &exports.server {
                Some(server) => server.most > 0 && server.clients.len() as u64 >= server.most,
                None => false,
            };
            let exports = lock(&qemu.exports);
            drop(qemu.exports_changed.wait_while(exports, full));
        }
        let Ok((stream, _)) = listener.accept() else { return };
        let Some(client) = register(qemu, &stream) else { return };
        let qemu = qemu.clone();
        std::thread::spawn(move || {
            nbd::serve(&qemu, stream, client);
            leave(&qemu, client);
        });
    }
}

fn register(qemu: &Qemu, stream: &UnixStream) -> Option<u64> {
    let mut exports = lock(&qemu.exports);
    exports.last_client += 1;
    let client = exports.last_client;
    let stream = stream.try_clone().ok()?;
    exports.server.as_mut()?.clients.push((client, stream));
    Some(client)
}

fn leave(qemu: &Qemu, client: u64) {
    let mut exports = lock(&qemu.exports);
    if let Some(server) = &mut exports.server {
        server.clients.retain(|(other, _)| *other != client);
    }
    for export in &mut exports.all {
        export.clients.retain(|other| *other != client);
    }
    drop(exports);
    finish(qemu);
    qemu.exports_changed.notify_all();
}

/// Ends the exports whose last client is gone.
fn finish(qemu: &Qemu) {
    let mut exports = lock(&qemu.exports);
    for export in exports.finished() {
        let mut graph = lock(&qemu.graph);
        for (node, name) in &export.bitmaps {
            if let Ok(node) = graph.find_mut(node)
                && let Some(bitmap) = node.bitmaps.iter_mut().find(|bitmap| bitmap.name == *name)
            {
                bitmap.exports -= 1;
            }
        }
        drop(graph);
        qemu.monitors.event("BLOCK_EXPORT_DELETED", Some(json!({"id": export.id})));
    }
}

/// `nbd-server-stop`: waits until all clients are gone.
///
/// # Errors
/// As QEMU.
pub fn stop_server(qemu: &Arc<Qemu>) -> Result<Value, Error> {
    let mut exports = lock(&qemu.exports);
    let Some(server) = exports.server.take() else {
        return Err(Error::generic("NBD server not running"));
    };
    // Wakes whoever accepts.
    let _ = shutdown(&server.listener, Shutdown::Both);
    let _ = std::fs::remove_file(&server.path);
    for (_, stream) in &server.clients {
        let _ = stream.shutdown(std::net::Shutdown::Both);
    }
    exports.all.iter_mut().for_each(|export| export.closing = true);
    qemu.exports_changed.notify_all();
    drop(exports);
    finish(qemu);
    let exports = lock(&qemu.exports);
    let left = qemu.exports_changed.wait_while(exports, |exports| !exports.all.is_empty());
    drop(left.unwrap_or_else(PoisonError::into_inner));
    done()
}

/// `block-export-add`.
///
/// # Errors
/// As QEMU.
pub fn add(qemu: &Qemu, args: Arguments<'_>) -> Result<Value, Error> {
    let (id, node) = (args.text("id"), args.text("node-name"));
    let mut exports = lock(&qemu.exports);
    let mut graph = lock(&qemu.graph);
    if !is_id(id) {
        return Err(Error::generic("Invalid block export id"));
    }
    if exports.all.iter().any(|export| export.id == id) {
        return Err(Error::generic(format!("Block export id '{id}' is already in use")));
    }
    if args.text("type") != "nbd" {
        return Err(Error::generic("The stub exports over NBD only"));
    }
    graph.find_node(node)?;
    if args.flag("writable") {
        return Err(Error::generic(format!(
            "Permission conflict on node '{node}': permissions 'write' are both required by an \
             unnamed block device (uses node '{node}' as 'root' child) and unshared by its user"
        )));
    }
    if exports.server.is_none() {
        return Err(Error::generic("NBD server not running"));
    }
    let name = args.0.get("name").and_then(Value::as_str).unwrap_or(node);
    if exports.by_name(name).is_some() {
        return Err(Error::generic(format!("NBD server already has export named '{name}'")));
    }
    let mut bitmaps = Vec::new();
    for bitmap in args.list("bitmaps") {
        let (from, name) = match bitmap {
            Value::String(name) => (node, name.as_str()),
            other => (
                other["node"].as_str().unwrap_or_default(),
                other["name"].as_str().unwrap_or_default(),
            ),
        };
        graph.find_node(from)?;
        let Some((owner, found)) = graph.find_through_filters(from, name) else {
            return Err(Error::generic(format!("Bitmap '{name}' is not found")));
        };
        if found.is_busy() {
            return Err(Error::generic(format!(
                "Bitmap '{name}' is currently in use by another operation and cannot be used"
            )));
        }
        if found.recording {
            let text = format!("Enabled bitmap '{name}' incompatible with readonly export");
            return Err(Error::generic(text));
        }
        bitmaps.push((owner, name.to_owned()));
    }
    for (node, name) in &bitmaps {
        let bitmaps = &mut graph.find_mut(node)?.bitmaps;
        bitmaps.iter_mut().filter(|b| b.name == *name).for_each(|b| b.exports += 1);
    }
    let (id, name, node) = (id.to_owned(), name.to_owned(), node.to_owned());
    let export = Export { id, name, node, bitmaps, clients: Vec::new(), closing: false };
    exports.all.insert(0, export);
    done()
}

/// What QEMU takes for an id: a letter, then letters, digits, `-`, `.` and `_`.
fn is_id(id: &str) -> bool {
    let mut bytes = id.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphabetic())
        && bytes.all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
}

/// `block-export-del`.
///
/// # Errors
/// As QEMU.
pub fn delete(qemu: &Qemu, machine: &mut Machine, args: Arguments<'_>) -> Result<Value, Error> {
    let id = args.text("id");
    let mut exports = lock(&qemu.exports);
    let Some(export) = exports.all.iter().find(|export| export.id == id) else {
        return Err(Error::generic(format!("Export '{id}' is not found")));
    };
    if export.closing {
        return Err(Error::generic(format!("Export '{id}' is already shutting down")));
    }
    if args.text("mode") != "hard" && !export.clients.is_empty() {
        return Err(Error::generic(format!("export '{id}' still in use")));
    }
    exports.close(id);
    machine.bottom_halves.push(Box::new(finish));
    done()
}
