//! Faults that are put in on purpose, so that the checks which must find them
//! are themselves checked: `make demo` and the tests run with each of them and fail.

use std::str::FromStr;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// At most one fault of a target.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Fault {
    /// Of the disks.
    pub disk: mover::receiver::Fault,
    /// The counter of the oracle's memory page with this number stays old.
    pub stale_page: Option<u64>,
}

impl FromStr for Fault {
    type Err = String;

    /// `drop-writes@OFFSET`, `flip-byte@OFFSET`, `stale-page@NUMBER`.
    fn from_str(text: &str) -> Result<Self, String> {
        let unknown = || {
            format!("'{text}' is no fault: drop-writes@OFFSET, flip-byte@OFFSET, stale-page@NUMBER")
        };
        let (kind, number) = text.split_once('@').ok_or_else(unknown)?;
        let number = Some(number.parse().map_err(|_| unknown())?);
        let mut fault = Self::default();
        match kind {
            "drop-writes" => fault.disk.drop_writes_at = number,
            "flip-byte" => fault.disk.flip_byte_at = number,
            "stale-page" => fault.stale_page = number,
            _ => return Err(unknown()),
        }
        Ok(fault)
    }
}

/// What a page of the oracle's memory begins with; then its number and its counter, u64 LE each.
const MAGIC: &[u8] = b"GODWITPAGE\0\0\0\0\0\0";
const PAGE: usize = 4096;
const NUMBER: usize = 16;
/// The counter stands twice, near the begin and at the end.
const COUNTERS: [usize; 2] = [24, PAGE - 8];

/// Copies QEMU's memory stream, setting back the counter of the oracle's page `number`.
///
/// # Errors
/// Those of the streams.
pub async fn stale_page(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    number: u64,
) -> std::io::Result<()> {
    let mut held: Vec<u8> = Vec::new();
    let mut buffer = vec![0; 256 << 10];
    loop {
        let n = from.read(&mut buffer).await?;
        held.extend_from_slice(&buffer[..n]);
        let whole = spoil(&mut held, number);
        // N.B. no byte more than may be a page's begin: QEMU waits for the rest.
        let ready = if n == 0 { held.len() } else { whole };
        to.write_all(&held[..ready]).await?;
        held.drain(..ready);
        if n == 0 {
            return to.shutdown().await;
        }
    }
}

/// Returns how many bytes cannot be part of a page that has not come whole.
fn spoil(bytes: &mut [u8], number: u64) -> usize {
    let mut at = 0;
    while at < bytes.len() {
        let seen = MAGIC.len().min(bytes.len() - at);
        if bytes[at..at + seen] != MAGIC[..seen] {
            at += 1;
            continue;
        }
        let Some(page) = bytes.get_mut(at..at + PAGE) else { return at };
        if page[NUMBER..NUMBER + 8] == number.to_le_bytes() {
            for counter in COUNTERS {
                page[counter..counter + 8].fill(0);
            }
        }
        at += PAGE;
    }
    bytes.len()
}

#[cfg(test)]
mod test {
    use super::*;

    #[tokio::test]
    async fn one_page_gets_old_however_it_is_cut_and_nothing_else_changes_or_waits() {
        let mut page = vec![7; PAGE];
        page[..MAGIC.len()].copy_from_slice(MAGIC);
        page[NUMBER..NUMBER + 8].copy_from_slice(&3u64.to_le_bytes());
        let mut spoiled = page.clone();
        COUNTERS.iter().for_each(|at| spoiled[*at..*at + 8].fill(0));
        let (mut source, mut from) = tokio::io::duplex(1 << 16);
        let (mut to, mut target) = tokio::io::duplex(1 << 16);
        let copying = tokio::spawn(async move { stale_page(&mut from, &mut to, 3).await });
        for piece in [&b"before"[..], &page[..9], &page[9..2000], &page[2000..], b"after"] {
            source.write_all(piece).await.unwrap();
            tokio::task::yield_now().await;
        }
        // N.B. before the stream's end: QEMU would wait for it.
        let mut got = vec![0; 6 + PAGE + 5];
        target.read_exact(&mut got).await.unwrap();
        assert_eq!(got, [&b"before"[..], &spoiled, b"after"].concat());
        drop(source);
        copying.await.unwrap().unwrap();
    }
}
