//! What QEMU says on stderr: its last words for errors, all of it in `qemu.log`.

use crate::folder;
use rustix::fs::OFlags;
use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::io::{AsyncRead, AsyncReadExt};

const LOG: &str = "qemu.log";
const OLD_LOG: &str = "qemu.log.1";
/// The log is put aside when it has this size, so that both take twice as much at most.
const MAX_LOG: u64 = 1 << 20;
/// The last words of QEMU that are kept for error messages, in bytes.
const LAST_WORDS: usize = 4096;

/// The log of one launcher's QEMUs.
#[derive(Debug)]
pub(super) struct Log {
    folder: PathBuf,
    file: File,
    size: u64,
}

impl Log {
    pub(super) fn open(folder: &Path) -> Result<Self, folder::Error> {
        let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE;
        let file = folder::open(folder, LOG, flags)?;
        let size = file.metadata().map_or(0, |meta| meta.len());
        Ok(Self { folder: folder.into(), file, size })
    }

    /// A log that cannot be written must not end a guest.
    pub(super) fn write(&mut self, bytes: &[u8]) {
        if self.size >= MAX_LOG {
            self.turn();
        }
        match self.file.write_all(bytes) {
            Ok(()) => self.size += bytes.len() as u64,
            Err(error) => tracing::warn!(%error, "QEMU's log cannot be written"),
        }
    }

    fn turn(&mut self) {
        let turned =
            folder::rename(&self.folder, LOG, OLD_LOG).and_then(|()| Self::open(&self.folder));
        match turned {
            Ok(new) => *self = new,
            Err(error) => {
                tracing::warn!(%error, "QEMU's log cannot be put aside: it is cut");
                // Of this descriptor's own file: no path is looked up.
                let _ = self.file.set_len(0);
                self.size = 0;
            }
        }
    }
}

/// What QEMU said last.
#[derive(Debug, Clone, Default)]
pub(super) struct Words(Arc<Mutex<VecDeque<u8>>>);

impl Words {
    /// Hears QEMU until it says nothing any more.
    pub(super) async fn hear(self, mut stderr: impl AsyncRead + Unpin, mut log: Log) {
        let mut buffer = vec![0; 4096];
        while let Ok(n @ 1..) = stderr.read(&mut buffer).await {
            log.write(&buffer[..n]);
            let mut words = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            words.extend(&buffer[..n]);
            let excess = words.len().saturating_sub(LAST_WORDS);
            words.drain(..excess);
        }
    }

    pub(super) fn last(&self) -> String {
        let words = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = words.iter().copied().collect();
        String::from_utf8_lossy(&bytes).trim().to_owned()
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_log_goes_on_where_it_was_and_is_put_aside_when_it_is_long() {
        let folder = tempfile::tempdir().unwrap();
        let read = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
        Log::open(folder.path()).unwrap().write(b"first\n");
        Log::open(folder.path()).unwrap().write(b"second\n");
        assert_eq!(read(LOG), b"first\nsecond\n");
        let mut log = Log::open(folder.path()).unwrap();
        log.write(&vec![b'x'; MAX_LOG as usize]);
        log.write(b"third\n");
        assert_eq!(read(LOG), b"third\n");
        assert!(read(OLD_LOG).starts_with(b"first\nsecond\nxxx"));
    }
}
