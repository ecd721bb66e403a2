//! The command line, as far as the stub heeds it. Everything else is accepted:
//! an option that is not known is skipped, with its argument if it has one.

use super::chardev::Backend;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, VecDeque};

/// What the command line says.
#[derive(Debug, Default)]
pub struct Config {
    /// `-version` was given: nothing else counts.
    pub version: bool,
    /// Chardevs by id.
    pub chardevs: BTreeMap<String, Backend>,
    /// Ids of the chardevs that are QMP monitors.
    pub monitors: Vec<String>,
    /// Ids of the chardevs of the serial ports, in order; `None` for none.
    pub serials: Vec<Option<String>>,
    /// `-object` and `-blockdev`, in order.
    pub parts: Vec<Part>,
    /// The guest's disks.
    pub disks: Vec<Disk>,
    /// The argument of `-incoming`.
    pub incoming: Option<String>,
    /// `-S` was given.
    pub stopped: bool,
    /// `-no-shutdown` was given.
    pub no_shutdown: bool,
    /// KiB of memory.
    pub memory: u64,
    /// vCPUs.
    pub cpus: u64,
    /// Where to write the process id.
    pub pidfile: Option<String>,
}

/// A part of the block graph.
#[derive(Debug)]
pub enum Part {
    /// `-object` with a throttle group.
    Group {
        /// Its id.
        id: String,
        /// Its limits.
        limits: Option<Value>,
        /// As it was given.
        source: String,
    },
    /// `-blockdev`.
    Node {
        /// Its options.
        options: Map<String, Value>,
        /// As it was given.
        source: String,
    },
}

/// A device with a disk.
#[derive(Debug)]
pub struct Disk {
    /// Its id.
    pub id: String,
    /// Its node.
    pub node: String,
    /// Whether others may write the same image.
    pub share: bool,
    /// As it was given.
    pub source: String,
}

/// Options without an argument.
const FLAGS: [&str; 20] = [
    "S",
    "nodefaults",
    "no-user-config",
    "no-shutdown",
    "no-reboot",
    "no-acpi",
    "no-hpet",
    "no-fd-bootchk",
    "nographic",
    "enable-kvm",
    "snapshot",
    "usb",
    "daemonize",
    "full-screen",
    "only-migratable",
    "mem-prealloc",
    "preconfig",
    "win2k-hack",
    "version",
    "s",
];

/// Reads the command line.
///
/// # Errors
/// In QEMU's words.
pub fn parse(arguments: Vec<String>) -> Result<Config, String> {
    let mut config = Config { memory: 128 << 10, cpus: 1, ..Config::default() };
    let mut arguments = VecDeque::from(arguments);
    let mut anonymous = 0;
    while let Some(word) = arguments.pop_front() {
        let Some(option) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
            return Err(format!("{word}: Could not open '{word}'"));
        };
        if FLAGS.contains(&option) {
            match option {
                "version" => config.version = true,
                "S" => config.stopped = true,
                "no-shutdown" => config.no_shutdown = true,
                _ => {}
            }
            continue;
        }
        let Some(argument) = arguments.pop_front_if(|next| !next.starts_with('-')) else {
            continue;
        };
        let fail = |what: String| format!("{word} {argument}: {what}");
        let mut name = |kind: &str| {
            anonymous += 1;
            format!("compat_{kind}{}", anonymous - 1)
        };
        match option {
            "blockdev" => {
                let options = properties(&argument, "driver").map_err(fail)?;
                config.parts.push(Part::Node { options, source: format!("{word} {argument}") });
            }
            "object" => object(&mut config, &word, &argument).map_err(fail)?,
            "device" => device(&mut config, &word, &argument).map_err(fail)?,
            "chardev" => {
                let options = properties(&argument, "backend").map_err(fail)?;
                config.chardevs.insert(text(&options, "id").to_owned(), backend(&options));
            }
            "mon" => {
                let options = properties(&argument, "chardev").map_err(fail)?;
                if text(&options, "mode") == "control" {
                    config.monitors.push(text(&options, "chardev").to_owned());
                }
            }
            "qmp" | "qmp-pretty" => {
                let id = name("monitor");
                config.chardevs.insert(id.clone(), short(&argument));
                config.monitors.push(id);
            }
            "serial" => {
                let id = match argument.strip_prefix("chardev:") {
                    Some(id) => id.to_owned(),
                    None => {
                        let id = name("serial");
                        config.chardevs.insert(id.clone(), short(&argument));
                        id
                    }
                };
                config.serials.push(Some(id));
            }
            "incoming" => config.incoming = Some(argument),
            "m" => config.memory = memory(&argument).map_err(fail)?,
            "smp" => config.cpus = cpus(&argument).map_err(fail)?,
            "pidfile" => config.pidfile = Some(argument),
            _ => {}
        }
    }
    Ok(config)
}

fn object(config: &mut Config, word: &str, argument: &str) -> Result<(), String> {
    let options = properties(argument, "qom-type")?;
    if text(&options, "qom-type") == "throttle-group" {
        let (id, limits) = (text(&options, "id").to_owned(), options.get("limits").cloned());
        config.parts.push(Part::Group { id, limits, source: format!("{word} {argument}") });
    }
    Ok(())
}

fn device(config: &mut Config, word: &str, argument: &str) -> Result<(), String> {
    let options = properties(argument, "driver")?;
    let source = format!("{word} {argument}");
    match text(&options, "driver") {
        "isa-serial" => {
            let chardev = text(&options, "chardev").to_owned();
            let index = options.get("index").and_then(|index| match index {
                Value::String(digits) => digits.parse::<usize>().ok(),
                index => usize::try_from(index.as_u64()?).ok(),
            });
            let index = index.unwrap_or(config.serials.len()).min(3);
            if config.serials.len() <= index {
                config.serials.resize(index + 1, None);
            }
            config.serials[index] = Some(chardev);
        }
        _ if options.contains_key("drive") => config.disks.push(Disk {
            id: text(&options, "id").to_owned(),
            node: text(&options, "drive").to_owned(),
            share: options.get("share-rw").is_some_and(|v| *v == "on" || *v == true),
            source,
        }),
        _ => {}
    }
    Ok(())
}

/// JSON, or QEMU's `value,key=value,a.b=value`, where the first may lack its
/// key and `,,` stands for a comma.
fn properties(argument: &str, first: &str) -> Result<Map<String, Value>, String> {
    if argument.starts_with('{') {
        return serde_json::from_str(argument)
            .map_err(|error| format!("JSON parse error, {error}"));
    }
    let mut all = Map::new();
    for (i, pair) in argument.replace(",,", "\0").split(',').enumerate() {
        let (key, value) = match pair.split_once('=') {
            Some(pair) => pair,
            None if i == 0 => (first, pair),
            None => (pair, "on"),
        };
        let mut steps = key.split('.');
        let last = steps.next_back().unwrap_or_default();
        let mut at = &mut all;
        for step in steps {
            let inner = at.entry(step).or_insert_with(|| Map::new().into());
            let Value::Object(inner) = inner else {
                return Err(format!("Parameters '{key}.*' clash"));
            };
            at = inner;
        }
        at.insert(last.to_owned(), value.replace('\0', ",").into());
    }
    Ok(all)
}

fn text<'a>(options: &'a Map<String, Value>, key: &str) -> &'a str {
    options.get(key).and_then(Value::as_str).unwrap_or_default()
}

fn backend(options: &Map<String, Value>) -> Backend {
    let path = text(options, "path").to_owned();
    match text(options, "backend") {
        "socket" if options.get("server").is_some_and(|server| *server != "off") => {
            Backend::Listen(path)
        }
        "socket" => Backend::Connect(path),
        "file" => Backend::File(path),
        _ => Backend::Null,
    }
}

/// The short form of `-qmp` and `-serial`: `unix:PATH,server=on,wait=off`, `file:PATH`.
fn short(argument: &str) -> Backend {
    match argument.split_once(':') {
        Some(("unix", rest)) => {
            let (path, options) = rest.split_once(',').unwrap_or((rest, ""));
            let server = options.split(',').any(|o| o == "server" || o == "server=on");
            if server { Backend::Listen(path.into()) } else { Backend::Connect(path.into()) }
        }
        Some(("file", path)) => Backend::File(path.into()),
        _ => Backend::Null,
    }
}

fn memory(argument: &str) -> Result<u64, String> {
    let options = properties(argument, "size")?;
    let size = text(&options, "size");
    let (digits, kib) = match size.as_bytes().last() {
        Some(b'K' | b'k') => (&size[..size.len() - 1], 1),
        Some(b'M' | b'm') => (&size[..size.len() - 1], 1 << 10),
        Some(b'G' | b'g') => (&size[..size.len() - 1], 1 << 20),
        _ => (size, 1 << 10),
    };
    let bad = "Parameter 'size' expects a non-negative number below 2^64";
    digits.parse::<u64>().map(|n| n * kib).map_err(|_| bad.to_owned())
}

fn cpus(argument: &str) -> Result<u64, String> {
    let options = properties(argument, "cpus")?;
    text(&options, "cpus").parse().map_err(|_| "Parameter 'cpus' expects a number".to_owned())
}

#[cfg(test)]
mod test {
    use super::*;

    fn config(words: &[&str]) -> Config {
        parse(words.iter().map(|word| (*word).to_owned()).collect()).unwrap()
    }

    #[test]
    fn a_launchers_command_line_is_understood_and_the_rest_of_it_skipped() {
        let config = config(&[
            "-nodefaults",
            "-S",
            "-msg",
            "timestamp=on",
            "-smp",
            "2",
            "-m",
            "65544k",
            "-unknown",
            "-chardev",
            "socket,id=qmp,path=qmp.sock,server=on,wait=off",
            "-mon",
            "chardev=qmp,mode=control",
            "-chardev",
            "socket,id=serial1,path=o,,racle.qemu,server=off",
            "-device",
            "isa-serial,chardev=serial1,id=serial-1,index=1",
            "-object",
            r#"{"qom-type":"throttle-group","id":"a-tg"}"#,
            "-object",
            "rng-random,id=rng0,filename=/dev/urandom",
            "-blockdev",
            r#"{"driver":"file","node-name":"a-file","filename":"a.raw"}"#,
            "-blockdev",
            "driver=raw,node-name=a,file.driver=file,file.filename=b",
            "-device",
            "virtio-blk-pci,drive=a,id=a-disk,share-rw=on",
            "-incoming",
            "defer",
        ]);
        assert!(config.stopped && !config.version);
        assert_eq!((config.cpus, config.memory), (2, 65_544));
        assert_eq!(config.monitors, ["qmp"]);
        assert_eq!(config.chardevs["qmp"], Backend::Listen("qmp.sock".into()));
        assert_eq!(config.chardevs["serial1"], Backend::Connect("o,racle.qemu".into()));
        assert_eq!(config.serials, [None, Some("serial1".to_owned())]);
        assert_eq!(config.parts.len(), 3);
        let Part::Node { options, .. } = &config.parts[2] else { panic!("{:?}", config.parts) };
        assert_eq!(options["file"]["filename"], "b");
        assert!(config.disks[0].share);
        assert_eq!(config.incoming.as_deref(), Some("defer"));
    }

    #[test]
    fn the_short_forms_are_understood_too() {
        let config = config(&["-qmp", "unix:/run/q,server,nowait", "-serial", "null", "-m", "1G"]);
        assert_eq!(config.chardevs[&config.monitors[0]], Backend::Listen("/run/q".into()));
        assert_eq!(config.serials.len(), 1);
        assert_eq!(config.memory, 1 << 20);
        assert!(self::config(&["-m", "64", "--version"]).version);
    }
}
