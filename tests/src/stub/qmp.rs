//! The QMP server: one client at a time per monitor, events to all of them.
//!
//! ```text
//! client --> reader --channel--> executor --> answers, events --> client
//!               |  exec-oob: at once, without the big lock
//! ```

use super::commands;
use super::error::Error;
use super::lock;
use super::machine::Qemu;
use serde_json::{Map, Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The longest command that is read, in bytes.
const LONGEST: u64 = 16 << 20;
/// A client that reads nothing for so long is cut off.
const PATIENCE: Duration = Duration::from_secs(10);

/// Whoever is connected and has negotiated.
#[derive(Default)]
pub struct Monitors {
    clients: Mutex<Vec<Arc<Client>>>,
}

impl Monitors {
    /// Sends an event to every client.
    pub fn event(&self, name: &str, data: Option<Value>) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let timestamp = json!({"seconds": now.as_secs(), "microseconds": now.subsec_micros()});
        let mut event = json!({"timestamp": timestamp, "event": name});
        if let Some(data) = data {
            event["data"] = data;
        }
        for client in lock(&self.clients).iter() {
            client.say(&event);
        }
    }
}

struct Client {
    stream: Mutex<UnixStream>,
    negotiated: AtomicBool,
    oob: AtomicBool,
}

impl Client {
    fn say(&self, message: &Value) {
        let stream = lock(&self.stream);
        // A client that left, or hangs, hears no more.
        if (&*stream).write_all(format!("{message}\r\n").as_bytes()).is_err() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    fn answer(&self, id: Option<Value>, result: Result<Value, Error>) {
        let mut answer = match result {
            Ok(value) => json!({ "return": value }),
            Err(error) => json!({ "error": error.to_json() }),
        };
        if let Some(id) = id {
            answer["id"] = id;
        }
        self.say(&answer);
    }
}

/// A command as it came.
struct Command {
    name: String,
    arguments: Map<String, Value>,
    id: Option<Value>,
}

/// QEMU's version, for the greeting and `query-version`.
pub fn version() -> Value {
    json!({"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "stub"})
}

/// Serves clients for ever, on a thread of its own.
pub fn serve(qemu: Arc<Qemu>, listener: UnixListener) {
    std::thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            if let Err(error) = session(&qemu, stream) {
                eprintln!("stub-qemu: QMP: {error}");
            }
        }
    });
}

fn session(qemu: &Arc<Qemu>, stream: UnixStream) -> std::io::Result<()> {
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let (negotiated, oob) = (AtomicBool::new(false), AtomicBool::new(false));
    let client = Arc::new(Client { stream: Mutex::new(stream), negotiated, oob });
    client.say(&json!({"QMP": {"version": version(), "capabilities": ["oob"]}}));
    let (queue, commands) = channel();
    let executor = {
        let (qemu, client) = (qemu.clone(), client.clone());
        std::thread::spawn(move || execute_all(&qemu, &client, &commands))
    };
    while let Some(input) = read_value(&mut reader) {
        match input.and_then(|value| understand(value, &client)) {
            Ok((command, true)) => {
                let result = commands::out_of_band(qemu, &command.name, &command.arguments);
                client.answer(command.id, result);
            }
            Ok((command, false)) => drop(queue.send(command)),
            Err((id, error)) => client.answer(id, Err(error)),
        }
    }
    drop(queue);
    lock(&qemu.monitors.clients).retain(|other| !Arc::ptr_eq(other, &client));
    let _ = executor.join();
    Ok(())
}

/// Why something is no command, and the id that came with it.
type Refusal = (Option<Value>, Error);

/// The next JSON value; `None` at the end. What is no JSON is skipped to its line's end.
fn read_value(reader: &mut BufReader<UnixStream>) -> Option<Result<Value, Refusal>> {
    let mut values =
        serde_json::Deserializer::from_reader(reader.by_ref().take(LONGEST)).into_iter::<Value>();
    match values.next()? {
        Ok(value) => Some(Ok(value)),
        Err(error) if error.is_io() || error.is_eof() => None,
        Err(error) => {
            reader.skip_until(b'\n').ok()?;
            Some(Err((None, Error::generic(format!("JSON parse error, {error}")))))
        }
    }
}

/// A command out of a value, and whether it is out of band.
fn understand(value: Value, client: &Client) -> Result<(Command, bool), Refusal> {
    let Value::Object(mut members) = value else {
        return Err((None, Error::generic("QMP input must be a JSON object")));
    };
    let id = members.remove("id");
    let refuse = |text: String| Err((id.clone(), Error::generic(text)));
    let oob_enabled = client.oob.load(Ordering::Relaxed);
    let oob = oob_enabled && members.contains_key("exec-oob");
    let verb = if oob { "exec-oob" } else { "execute" };
    let name = members.remove(verb);
    let arguments = members.remove("arguments");
    if let Some(other) = members.keys().next() {
        return refuse(format!("QMP input member '{other}' is unexpected"));
    }
    let name = match name {
        Some(Value::String(name)) => name,
        Some(_) => return refuse(format!("QMP input member '{verb}' must be a string")),
        None => return refuse("QMP input lacks member 'execute'".into()),
    };
    let arguments = match arguments {
        None => Map::new(),
        Some(Value::Object(arguments)) => arguments,
        Some(_) => return refuse("QMP input member 'arguments' must be an object".into()),
    };
    Ok((Command { name, arguments, id }, oob))
}

fn execute_all(qemu: &Arc<Qemu>, client: &Arc<Client>, queue: &Receiver<Command>) {
    for Command { name, arguments, id } in queue {
        let result = match client.negotiated.load(Ordering::Relaxed) {
            true => commands::execute(qemu, &name, &arguments),
            false => negotiate(qemu, client, &name, &arguments),
        };
        client.answer(id, result);
        let bottom_halves = std::mem::take(&mut qemu.lock().bottom_halves);
        bottom_halves.into_iter().for_each(|act| act(qemu));
    }
}

fn negotiate(
    qemu: &Qemu,
    client: &Arc<Client>,
    name: &str,
    arguments: &Map<String, Value>,
) -> Result<Value, Error> {
    if name != "qmp_capabilities" {
        let text = "Expecting capabilities negotiation with 'qmp_capabilities'";
        return Err(Error::command(text));
    }
    qemu.schema.check(name, arguments)?;
    let oob = arguments.get("enable").and_then(Value::as_array).is_some_and(|all| !all.is_empty());
    client.oob.store(oob, Ordering::Relaxed);
    client.negotiated.store(true, Ordering::Relaxed);
    lock(&qemu.monitors.clients).push(client.clone());
    Ok(json!({}))
}
