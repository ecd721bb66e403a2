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
        spoil(&mut held, number);
        // A page may lie across two reads.
        let keep = if n == 0 { 0 } else { held.len().min(PAGE - 1) };
        let ready = held.len() - keep;
        to.write_all(&held[..ready]).await?;
        held.drain(..ready);
        if n == 0 {
            return to.shutdown().await;
        }
    }
}

fn spoil(bytes: &mut [u8], number: u64) {
    let mut at = 0;
    while at + PAGE <= bytes.len() {
        if bytes[at] != MAGIC[0] || !bytes[at..].starts_with(MAGIC) {
            at += 1;
            continue;
        }
        let page = &mut bytes[at..at + PAGE];
        if page[NUMBER..NUMBER + 8] == number.to_le_bytes() {
            for counter in COUNTERS {
                page[counter..counter + 8].fill(0);
            }
        }
        at += PAGE;
    }
}
