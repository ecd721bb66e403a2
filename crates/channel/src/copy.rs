//! The relay's copy loop.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};

/// Buffers grow as a stream proves to be a large one: a control stream holds 1 KiB, a
/// memory stream 256 KiB (steps as in Istio's ztunnel).
const STEPS: [(u64, usize); 3] = [(0, 1 << 10), (128 << 10, 64 << 10), (10 << 20, 256 << 10)];

/// Copies both ways until both have ended, each end passed on as a half-close. An error
/// in either direction ends both at once, and is the cut that the peers then see.
pub(crate) async fn both_ways<A, B>(a: A, b: B) -> io::Result<()>
where
    A: AsyncRead + AsyncWrite,
    B: AsyncRead + AsyncWrite,
{
    let (read_a, write_a) = tokio::io::split(a);
    let (read_b, write_b) = tokio::io::split(b);
    tokio::try_join!(one_way(read_a, write_b), one_way(read_b, write_a))?;
    Ok(())
}

async fn one_way<A, B>(mut from: ReadHalf<A>, mut to: WriteHalf<B>) -> io::Result<()>
where
    A: AsyncRead,
    B: AsyncWrite,
{
    let mut buffer = vec![0; STEPS[0].1];
    let mut copied = 0;
    loop {
        let n = from.read(&mut buffer).await?;
        if n == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..n]).await?;
        to.flush().await?;
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
