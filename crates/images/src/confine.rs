//! The confinement of programs that read images which are not trusted.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use rustix::process::{Resource, Rlimit, setrlimit};

/// Tells [`confine`] the size of the disk that the command works for.
pub(crate) const BYTES: &str = "IMAGES_BYTES";

/// Enough for qemu-img with the largest tables that its formats may have.
const MEMORY: u64 = 1 << 30;
/// A few minutes, and a second more for each of these pieces of the disk.
const CPU_SECONDS: u64 = 300;
const BYTES_PER_CPU_SECOND: u64 = 4 << 20;

/// Becomes the program of the given command line, with bounds on memory, processor time and
/// the length of files, without core dumps, and without the means to gain privileges.
///
/// Call this in a process of its own: it replaces the process, and only returns if that fails.
/// A program that does nothing but `confine(env::args_os().skip(1))` can be a job's shim. Its
/// environment must be the one that [`import`](crate::import) gives to the shim; nothing but
/// PATH is left of it. Standard input is the target, which qemu-img opens again as
/// `/proc/self/fd/0`: what else the caller adds, such as another user, must allow this.
pub fn confine(args: impl IntoIterator<Item = OsString>) -> io::Error {
    match bounded(args) {
        Ok(mut command) => command.exec(),
        Err(error) => error,
    }
}

fn bounded(args: impl IntoIterator<Item = OsString>) -> io::Result<Command> {
    let mut args = args.into_iter();
    let program = args.next().ok_or_else(|| invalid("no command was given to confine"))?;
    let bytes = std::env::var(BYTES).ok().and_then(|text| text.parse::<u64>().ok());
    let bytes = bytes.ok_or_else(|| invalid("IMAGES_BYTES is not set to the size of a disk"))?;
    limit(Resource::As, MEMORY)?;
    limit(Resource::Cpu, CPU_SECONDS + bytes / BYTES_PER_CPU_SECOND)?;
    limit(Resource::Fsize, bytes)?;
    limit(Resource::Core, 0)?;
    rustix::thread::set_no_new_privs(true)?;
    let mut command = Command::new(program);
    command.args(args).env_clear();
    if let Some(path) = std::env::var_os("PATH") {
        command.env("PATH", path);
    }
    Ok(command)
}

fn limit(resource: Resource, most: u64) -> io::Result<()> {
    setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) })?;
    Ok(())
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}
