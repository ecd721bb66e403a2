//! The relay's copy loop.

use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};

/// Buffers grow as a stream proves to be a large one: a control stream holds 1 KiB, a
/// memory stream 256 KiB (steps as in Istio's ztunnel).
const STEPS: [(u64, usize); 3] = [(0, 1 << 10), (128 << 10, 64 << 10), (10 << 20, 256 << 10)];

/// For what one side still has to say when the other has stopped listening.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Copies both ways until both have ended, each end passed on as a half-close. A side
/// that cannot be read ends both at once, and is the cut that the peers then see.
pub(crate) async fn both_ways<A, B>(a: A, b: B) -> io::Result<()>
where
    A: AsyncRead + AsyncWrite,
    B: AsyncRead + AsyncWrite,
{
    let (read_a, write_a) = tokio::io::split(a);
    let (read_b, write_b) = tokio::io::split(b);
    let mut there = pin!(one_way(read_a, write_b));
    let mut back = pin!(one_way(read_b, write_a));
    tokio::select! {
        ended = &mut there => settle(ended, back).await,
        ended = &mut back => settle(ended, there).await,
    }
}

async fn settle(
    ended: Result<(), Cut>,
    other: Pin<&mut impl Future<Output = Result<(), Cut>>>,
) -> io::Result<()> {
    match ended {
        Ok(()) => Ok(other.await?),
        Err(Cut::Read(e)) => Err(e),
        Err(Cut::Write(e)) => {
            // It closed: what it wrote before may still be on its way to be read.
            let _ = tokio::time::timeout(LAST_WORDS, other).await;
            Err(e)
        }
    }
}

/// Which half of a direction failed.
enum Cut {
    Read(io::Error),
    Write(io::Error),
}

impl From<Cut> for io::Error {
    fn from(cut: Cut) -> Self {
        let (Cut::Read(e) | Cut::Write(e)) = cut;
        e
    }
}

async fn one_way<A, B>(mut from: ReadHalf<A>, mut to: WriteHalf<B>) -> Result<(), Cut>
where
    A: AsyncRead,
    B: AsyncWrite,
{
    let mut buffer = vec![0; STEPS[0].1];
    let mut copied = 0;
    loop {
        let n = from.read(&mut buffer).await.map_err(Cut::Read)?;
        if n == 0 {
            return to.shutdown().await.map_err(Cut::Write);
        }
        to.write_all(&buffer[..n]).await.map_err(Cut::Write)?;
        to.flush().await.map_err(Cut::Write)?;
        copied += n as u64;
        let step = STEPS.iter().rev().find(|(from, _)| copied >= *from);
        if let Some((_, size)) = step.filter(|(_, size)| *size > buffer.len()) {
            buffer = vec![0; *size];
        }
    }
}

/// Ends a connection so that what was written last arrives: a socket closed with bytes
/// unread resets the connection, and a reset may outrun them. Bounded in bytes and time.
pub(crate) async fn farewell<S: AsyncRead + AsyncWrite + Unpin>(io: &mut S) {
    const MOST: usize = 1 << 20;
    let drained = async {
        io.shutdown().await?;
        let mut buffer = vec![0; 16 << 10];
        let mut read = 0;
        while read < MOST {
            match io.read(&mut buffer).await? {
                0 => break,
                n => read += n,
            }
        }
        io::Result::Ok(())
    };
    // Whether it works or not, the connection is over.
    let _ = tokio::time::timeout(Duration::from_secs(1), drained).await;
}
