//! The importer, which is what a DataVolume's pod runs; and the lender, which is what the pod runs
//! that reads another claim for it.
//!
//! It ends at once when it is asked to. What it has done is in its work folder, with which the next
//! one goes on; that is removed once the disk is complete and says so itself.

mod door;
mod lend;
mod upload;

use crate::roles::root;
use anyhow::{Context, Result, bail};
use api::import::{BLOCK, CERTIFICATES, Lent, ORDER, Order, PASSWORD, Source, Target, USER};
use images::{Credentials, Job, Limits, Peer, Progress};
use rustix::fs::{FallocateFlags, XattrFlags};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Where a container says why it ended.
const LAST_WORDS: &str = "/dev/termination-log";
/// Attribute of a disk that is complete: of which order.
const COMPLETE: &str = "user.godwit.import";
/// How often it says how far it is.
const OFTEN: Duration = Duration::from_secs(1);
/// Certificates are text.
const MAX_CERTIFICATES: u64 = 4 << 20;

/// Brings a disk to where the environment says.
///
/// # Errors
/// Why it could not be brought; the pod says it as well.
pub async fn run() -> Result<ExitCode> {
    until_asked(import()).await
}

/// Lends a disk as the environment says.
///
/// # Errors
/// Why it could not be lent; the pod says it as well.
pub async fn lend() -> Result<ExitCode> {
    until_asked(lend::run()).await
}

/// Does a pod's work until it is done, or is asked to end.
async fn until_asked(work: impl Future<Output = Result<()>>) -> Result<ExitCode> {
    let mut terminate = signal(SignalKind::terminate())?;
    let outcome = tokio::select! {
        outcome = work => outcome,
        _ = terminate.recv() => return Ok(ExitCode::from(143)),
    };
    if let Err(error) = &outcome {
        // It is logged in any case.
        let _ = std::fs::write(place(LAST_WORDS), launcher::chain(error.as_ref()));
    }
    outcome.map(|()| ExitCode::SUCCESS)
}

/// A path of the container.
fn place(path: impl AsRef<Path>) -> PathBuf {
    match root() {
        Some(root) => launcher::spec::beneath(&root, path.as_ref()),
        None => path.as_ref().into(),
    }
}

async fn import() -> Result<()> {
    let text = std::env::var(ORDER).with_context(|| format!("{ORDER} does not say what to do"))?;
    let order: Order =
        serde_json::from_str(&text).with_context(|| format!("{ORDER} is not understood"))?;
    let work = place(&order.work);
    let limits = Limits::default();
    let target = target(&order, &limits).await?;
    let disk = match &target {
        images::Target::File { path, .. } => Some(path.clone()),
        _ => None,
    };
    if let Some(disk) = disk.as_deref().filter(|_| !work.exists())
        && is_marked(disk, &order.id)
    {
        return Ok(());
    }
    let own = std::env::current_exe().context("cannot find this program")?;
    let received = work.join("received");
    // What is uploaded is kept beside what is made of it.
    let (source, beside) = match &order.source {
        Source::Upload => {
            std::fs::create_dir_all(&work).context("cannot make the work folder")?;
            upload::receive(&received, limits.max_bytes).await?;
            (images::Source::File { path: received, format: None }, work.join("job"))
        }
        other => (source(other)?, work.clone()),
    };
    let job = Job {
        source,
        target,
        work: beside,
        shim: vec![own.into(), "confine".into(), "--".into()],
        limits,
    };
    let (reports, progress) = watch::channel(Progress::default());
    tokio::select! {
        imported = images::import(&job, &reports) => { imported?; }
        () = tell(progress) => {}
    }
    if order.preallocate {
        let (images::Target::File { path, .. }
        | images::Target::Block { path }
        | images::Target::Allotted { path }) = &job.target;
        allocate(path)?;
    }
    if let Some(disk) = &disk {
        finish(disk, &work, &order.id)?;
    }
    Ok(())
}

/// Says how far it is, until it is dropped.
async fn tell(progress: watch::Receiver<Progress>) {
    let mut pulse = tokio::time::interval(OFTEN);
    loop {
        pulse.tick().await;
        let now = progress.borrow().clone();
        if let Ok(line) = serde_json::to_string(&now) {
            // Nothing depends on it.
            let _ = writeln!(std::io::stdout(), "{line}");
        }
    }
}

fn source(source: &Source) -> Result<images::Source> {
    Ok(match source {
        Source::Blank => images::Source::Blank,
        Source::Http { url, checksum, headers } => images::Source::Http(images::Http {
            url: url.clone(),
            checksum: checksum.as_deref().map(str::parse).transpose()?,
            headers: headers.iter().map(|text| header(text)).collect::<Result<_>>()?,
            credentials: credentials(),
            ca: certificates()?,
        }),
        Source::Registry { url, insecure } => images::Source::Registry(images::Registry {
            url: url.clone(),
            insecure: *insecure,
            credentials: credentials(),
            ca: certificates()?,
            ..images::Registry::default()
        }),
        // It is waited for elsewhere.
        Source::Upload => images::Source::Blank,
        Source::Clone(lent) => images::Source::Peer(peer(lent)?),
    })
}

fn peer(lent: &Lent) -> Result<Peer> {
    let token = std::env::var(PASSWORD).with_context(|| format!("{PASSWORD} is not set"))?;
    Ok(Peer { url: lent.lent.clone(), certificate: lent.certificate.clone(), token })
}

fn header(text: &str) -> Result<(String, String)> {
    match text.split_once(':') {
        Some((name, value)) => Ok((name.trim().to_owned(), value.trim().to_owned())),
        // N.B. not the text itself: it may be a secret.
        None => bail!("a header of extraHeaders is not of the form Name: value"),
    }
}

fn credentials() -> Option<Credentials> {
    let text = |name| std::env::var(name).ok();
    Some(Credentials { user: text(USER)?, password: text(PASSWORD)? })
}

/// All certificates that are mounted.
fn certificates() -> Result<Option<String>> {
    let folder = place(CERTIFICATES);
    let Ok(entries) = std::fs::read_dir(&folder) else { return Ok(None) };
    let mut all = String::new();
    for entry in entries {
        let path = entry.context("cannot read the mounted certificates")?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        // Kubernetes' own folders are hidden.
        if name.starts_with('.') || !path.is_file() {
            continue;
        }
        File::open(&path)
            .and_then(|file| file.take(MAX_CERTIFICATES).read_to_string(&mut all))
            .with_context(|| format!("cannot read certificate {name} of the ConfigMap"))?;
        all.push('\n');
    }
    Ok((!all.is_empty()).then_some(all))
}

/// Where to. A device is one, or the file that stands for it.
async fn target(order: &Order, limits: &Limits) -> Result<images::Target> {
    match &order.target {
        Target::File { path, size } => {
            let size = match (size, &order.source) {
                (Some(size), _) => *size,
                (None, Source::Clone(lent)) => {
                    images::peer::size(&peer(lent)?, limits).await?.next_multiple_of(BLOCK)
                }
                (None, _) => bail!("the size of the disk is not known: say it in the DataVolume"),
            };
            Ok(images::Target::File { path: place(path), size })
        }
        Target::Device { path } => {
            let path = place(path);
            let found = std::fs::symlink_metadata(&path)
                .with_context(|| format!("there is no device {}", path.display()))?;
            Ok(match found.file_type().is_block_device() {
                true => images::Target::Block { path },
                false => images::Target::Allotted { path },
            })
        }
    }
}

/// Opens a disk, and never what a link leads to.
fn open(path: &Path, write: bool) -> std::io::Result<File> {
    let flags = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
    File::options().read(true).write(write).custom_flags(flags).open(path)
}

/// Allocates all of a disk.
fn allocate(path: &Path) -> Result<()> {
    let doing = || format!("cannot allocate all of {}: is there enough room?", path.display());
    let file = open(path, true).with_context(doing)?;
    if !file.metadata().with_context(doing)?.is_file() {
        return Ok(());
    }
    let size = file.metadata().with_context(doing)?.len();
    match rustix::fs::fallocate(&file, FallocateFlags::KEEP_SIZE, 0, size) {
        // A file system that cannot, as most that are shared.
        Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
        other => other.with_context(doing),
    }
}

fn is_marked(disk: &Path, id: &str) -> bool {
    let mut value = [0; 64];
    open(disk, false).is_ok_and(|file| {
        let length = rustix::fs::fgetxattr(&file, COMPLETE, &mut value).unwrap_or(0);
        value[..length] == *id.as_bytes()
    })
}

/// Removes the work folder of a disk that is complete.
///
/// Its container may end before that is known, and is then run again: the disk itself has to say
/// that it is complete. Where it cannot, the folder stays, without what took room.
fn finish(disk: &Path, work: &Path, id: &str) -> Result<()> {
    let file = open(disk, true).with_context(|| format!("cannot open {}", disk.display()))?;
    if rustix::fs::fsetxattr(&file, COMPLETE, id.as_bytes(), XattrFlags::empty()).is_err() {
        return Ok(());
    }
    file.sync_all().with_context(|| format!("cannot write {}", disk.display()))?;
    std::fs::remove_dir_all(work).with_context(|| format!("cannot remove {}", work.display()))
}
