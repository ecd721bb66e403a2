//! qcow2 becomes raw by qemu-img, which is confined and only sees two files.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::{Child, Command};
use tokio::sync::oneshot;

use crate::confine::BYTES;
use crate::job::Image;
use crate::progress::{Reports, Step, report};
use crate::target::Disk;
use crate::work::{Held, Work};
use crate::{Error, Format};

const PROGRAM: &str = "qemu-img";
const PACKAGE: &str = "qemu-utils";
/// The most of a program's output that is kept.
const KEPT: usize = 64 << 10;
/// The most of its complaints that a user gets to read.
const SAID: usize = 1 << 10;

/// What `qemu-img info` tells, as far as it matters.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    format: String,
    virtual_size: u64,
    backing_filename: Option<Value>,
    full_backing_filename: Option<Value>,
    #[serde(default)]
    encrypted: bool,
    format_specific: Option<Specific>,
}

#[derive(Deserialize)]
struct Specific {
    #[serde(default)]
    data: HashMap<String, Value>,
}

impl Info {
    /// What contradicts what the header said.
    fn disagreement(&self, image: &Image) -> Option<&'static str> {
        let data_file = |it: &Specific| it.data.contains_key("data-file");
        match () {
            () if self.format != image.format.to_string() => Some("format"),
            () if self.virtual_size != image.virtual_size => Some("size"),
            () if self.backing_filename.is_some() => Some("backing file"),
            () if self.full_backing_filename.is_some() => Some("backing file"),
            () if self.format_specific.as_ref().is_some_and(data_file) => Some("data file"),
            () if self.encrypted => Some("encryption"),
            () => None,
        }
    }
}

/// Makes sure that qemu-img sees in a qcow2 image what we see.
pub(crate) async fn inspect(
    image: &Image,
    work: &Work,
    shim: &[OsString],
    size: u64,
) -> Result<(), Error> {
    if image.format != Format::Qcow2 {
        return Ok(());
    }
    let mut command = command(shim, size);
    command.args(["info", "--output=json", "-f", "qcow2"]).arg(operand(&image.path));
    command.stdin(Stdio::null());
    let said = run(command, shim, &image.path, work, |_| ()).await?;
    let info = serde_json::from_slice::<Info>(&said)
        .map_err(|_| Error::Disagreement { path: image.path.clone(), field: "description" })?;
    match info.disagreement(image) {
        Some(field) => Err(Error::Disagreement { path: image.path.clone(), field }),
        None => Ok(()),
    }
}

/// Writes a qcow2 image's disk to the beginning of a target.
pub(crate) async fn convert(
    image: &Image,
    disk: &Disk,
    work: &Work,
    shim: &[OsString],
    reports: &Reports,
) -> Result<(), Error> {
    let mut command = command(shim, disk.size);
    command.args(["convert", "-p", "-n", "-f", "qcow2", "-O", "raw"]);
    // The open file is handed over, so that its path cannot lead elsewhere meanwhile.
    let is_device = disk.file.metadata().is_ok_and(|it| it.file_type().is_block_device());
    let driver = if is_device { "host_device" } else { "file" };
    if disk.zero {
        command.arg("--target-is-zero");
    }
    command.arg(operand(&image.path)).arg(format!("{driver}:/proc/self/fd/0"));
    let target = disk.file.try_clone().map_err(Error::io("open", &disk.path))?;
    command.stdin(target);
    let (reports, total) = (reports.clone(), image.virtual_size);
    report(&reports, Step::Converting, 0, Some(total));
    run(command, shim, &image.path, work, move |said| {
        if let Some(percent) = percent(said) {
            let done = (total as f64 * percent / 100.0) as u64;
            report(&reports, Step::Converting, done, Some(total));
        }
    })
    .await
    .map(drop)
}

/// `file:` keeps qemu-img from taking a path for a protocol or a description.
fn operand(path: &Path) -> OsString {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut operand = OsString::from("file:");
    operand.push(absolute);
    operand
}

fn command(shim: &[OsString], bytes: u64) -> Command {
    let mut words = shim.iter().map(OsString::as_os_str).chain([OsStr::new(PROGRAM)]);
    let mut command = Command::new(words.next().unwrap_or(OsStr::new(PROGRAM)));
    command.args(words).env_clear().env(BYTES, bytes.to_string());
    if let Some(path) = std::env::var_os("PATH") {
        command.env("PATH", path);
    }
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

/// How far `qemu-img convert -p` says to be, such as `    (12.34/100%)`.
fn percent(said: &[u8]) -> Option<f64> {
    let text = std::str::from_utf8(said).ok()?;
    let (_, last) = text.rsplit_once('(')?;
    last.split_once('/')?.0.trim().parse().ok()
}

/// Runs a command to its end, and returns what it wrote to its standard output.
///
/// A task of its own ends the command when the import is given up, and keeps the work folder
/// until it has ended.
async fn run(
    mut command: Command,
    shim: &[OsString],
    path: &Path,
    work: &Work,
    each: impl Fn(&[u8]) + Send + 'static,
) -> Result<Vec<u8>, Error> {
    let program = shim.first().map_or(PROGRAM.into(), |it| it.to_string_lossy()).into_owned();
    let child =
        command.spawn().map_err(|source| Error::Tool { program, package: PACKAGE, source })?;
    // The parent's copy of the target must not outlive the import.
    drop(command);
    let (alive, given_up) = oneshot::channel::<()>();
    let task = tokio::spawn(attend(child, path.to_owned(), given_up, work.held(), each));
    let result = task.await;
    drop(alive);
    result.unwrap_or(Err(Error::Stopped))
}

async fn attend(
    mut child: Child,
    path: PathBuf,
    given_up: oneshot::Receiver<()>,
    held: Arc<Held>,
    each: impl Fn(&[u8]),
) -> Result<Vec<u8>, Error> {
    let ended = tokio::select! {
        ended = listen(&mut child, each) => Some(ended),
        _ = given_up => None,
    };
    let result = match ended {
        None => {
            // It may have ended by itself already.
            let _ = child.kill().await;
            Err(Error::Stopped)
        }
        Some(Err(source)) => Err(Error::io("run qemu-img for", &path)(source)),
        Some(Ok((status, said, _))) if status.success() => Ok(said),
        Some(Ok((status, _, complaints))) => {
            let start = complaints.len().saturating_sub(SAID);
            let said = String::from_utf8_lossy(&complaints[start..]).trim().to_owned();
            Err(Error::ToolFailed { program: PROGRAM, path, status, said })
        }
    };
    drop(held);
    result
}

async fn listen(
    child: &mut Child,
    each: impl Fn(&[u8]),
) -> std::io::Result<(ExitStatus, Vec<u8>, Vec<u8>)> {
    let (output, complaints) = (child.stdout.take(), child.stderr.take());
    let (output, complaints) = tokio::try_join!(keep(output, each), keep(complaints, |_| ()))?;
    Ok((child.wait().await?, output, complaints))
}

/// Reads to the end, since a full pipe would stop the program, but keeps only the beginning.
async fn keep(
    from: Option<impl AsyncRead + Unpin>,
    each: impl Fn(&[u8]),
) -> std::io::Result<Vec<u8>> {
    let Some(mut from) = from else { return Ok(Vec::new()) };
    let mut kept = Vec::new();
    let mut piece = [0; 4096];
    loop {
        let count = from.read(&mut piece).await?;
        if count == 0 {
            return Ok(kept);
        }
        each(&piece[..count]);
        kept.extend_from_slice(&piece[..count.min(KEPT - kept.len())]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_percentage_counts() {
        assert_eq!(percent(b"    (1.00/100%)\r    (12.50/100%)\r"), Some(12.5));
        assert_eq!(percent(b"nothing"), None);
    }
}
