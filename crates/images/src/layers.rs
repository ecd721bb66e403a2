//! The disk in a container image's layers.

use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Read};
use std::path::{Component, Path, PathBuf};

use tar::{Archive, Entry, EntryType};

use crate::Error;
use crate::format::{HEAD, of_head};
use crate::progress::{Reports, Step, Watched};
use crate::sparse::{Failed, pour, read_up_to};
use crate::unpack::decoder;
use crate::work::{self, Held};

/// Where container disks have their one file.
const FOLDER: &str = "disk";

/// What to look for, and how far.
pub(crate) struct Search {
    pub image: String,
    pub disk_path: Option<String>,
    pub max_bytes: u64,
}

impl Search {
    /// Where the disk should be, as a user would say it.
    pub fn place(&self) -> String {
        self.disk_path.as_ref().map_or("below /disk".to_owned(), |path| format!("at {path}"))
    }

    fn matches(&self, path: &Path) -> bool {
        match &self.disk_path {
            Some(wanted) => {
                plain(Path::new(wanted.trim_start_matches('/'))).as_deref() == Some(path)
            }
            None => path.starts_with(FOLDER) && path != Path::new(FOLDER),
        }
    }

    /// Takes the disk out of a layer into a new file, if the layer has it.
    pub fn extract(
        &self,
        layer: &File,
        sink: &Path,
        held: &Held,
        reports: &Reports,
    ) -> Result<bool, Error> {
        self.scan(layer, sink, held, reports).inspect_err(|_| {
            // The failure says more than one of this.
            let _ = work::remove(sink);
        })
    }

    fn scan(
        &self,
        layer: &File,
        sink: &Path,
        held: &Held,
        reports: &Reports,
    ) -> Result<bool, Error> {
        let total = layer.metadata().map_err(|error| self.damaged(error))?.len();
        let mut head = vec![0; HEAD];
        let count = read_up_to(layer, &mut head, 0).map_err(|error| self.damaged(error))?;
        let what = Step::Unpacking;
        let inner = layer;
        let watched = Watched { inner, held, reports, what, done: 0, total: Some(total) };
        let reader = BufReader::with_capacity(256 << 10, watched);
        let plain =
            decoder(of_head(&head[..count]), reader).map_err(|error| self.damaged(error))?;
        let mut archive = Archive::new(Bounded { inner: plain, left: self.max_bytes });
        let mut found: Option<PathBuf> = None;
        for entry in archive.entries().map_err(|error| self.damaged(error))? {
            let mut entry = entry.map_err(|error| self.damaged(error))?;
            let Some(path) = disk(&entry).filter(|path| self.matches(path)) else { continue };
            if let Some(first) = found.replace(path.clone()) {
                return Err(self.several(&first, &path));
            }
            self.take(&mut entry, sink)?;
        }
        Ok(found.is_some())
    }

    fn take(&self, entry: &mut Entry<'_, impl Read>, sink: &Path) -> Result<(), Error> {
        let size = entry.size();
        if size > self.max_bytes {
            return Err(self.too_many());
        }
        let file = work::create(sink)?;
        match pour(entry, &file) {
            // The archive's reader does not mind an end within an entry.
            Ok(length) if length < size => Err(self.damaged(ErrorKind::UnexpectedEof.into())),
            Ok(_) => Ok(()),
            Err(Failed::Read(source)) => Err(self.damaged(source)),
            Err(Failed::Write(source)) => Err(Error::io("write", sink)(source)),
        }
    }

    fn damaged(&self, source: io::Error) -> Error {
        match source.kind() {
            ErrorKind::FileTooLarge => self.too_many(),
            _ => Error::Archive { image: self.image.clone(), source },
        }
    }

    fn too_many(&self) -> Error {
        let what = format!("the layer with the disk of {}", self.image);
        Error::TooManyBytes { what, limit: self.max_bytes }
    }

    fn several(&self, first: &Path, second: &Path) -> Error {
        Error::SeveralDisks {
            image: self.image.clone(),
            first: first.display().to_string(),
            second: second.display().to_string(),
        }
    }
}

/// A reader that fails once more was read than allowed: a bare end would be taken for the
/// archive's.
struct Bounded<R> {
    inner: R,
    left: u64,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)? as u64;
        self.left = self.left.checked_sub(count).ok_or(ErrorKind::FileTooLarge)?;
        Ok(count as usize)
    }
}

/// The path of an entry that may be a disk: a regular file, with a path that leads nowhere
/// else.
fn disk(entry: &Entry<'_, impl Read>) -> Option<PathBuf> {
    let kind = entry.header().entry_type();
    let regular = matches!(kind, EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse);
    let path = plain(&entry.path().ok()?)?;
    let name = path.file_name()?.to_str()?;
    // A whiteout is not a file but says that one is gone.
    (regular && !name.starts_with(".wh.")).then_some(path)
}

fn plain(path: &Path) -> Option<PathBuf> {
    path.components()
        .filter(|part| *part != Component::CurDir)
        .map(|part| match part {
            Component::Normal(name) => Some(name),
            _ => None,
        })
        .collect()
}
