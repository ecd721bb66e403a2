//! How fast a link is: bytes that are thrown away at the other end.
//!
//! ```text
//! Opening::Probe ->        <- Ready                      a round trip
//! piece, piece, piece ... ->   <- one byte for each piece   what arrives, and when
//! ```

use super::{Shared, dial};
use crate::identity::SpiffeId;
use crate::preface::{self, Opening, Refusal, Reply, code};
use crate::wire::Failure;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::Semaphore;
use tokio::time::timeout;

/// A piece, in bytes.
const PIECE: usize = 64 << 10;
/// Most pieces of one probe.
const MOST: usize = 1024;
/// Pieces under way at first. Each that arrives makes room for two, so that no link is filled with
/// more than it carries in the time that there is.
const FIRST: usize = 4;
/// How long pieces are sent.
const SPAN: Duration = Duration::from_millis(800);
/// The last ones get this long to arrive.
const LAST: Duration = Duration::from_secs(5);
/// A rate is that of what arrived within this time.
const BUCKET: Duration = Duration::from_millis(50);

/// A link as it was measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Link {
    /// Round-trip time, with what the other gateway takes to answer.
    pub rtt: Duration,
    /// Bytes per second, of several short spans one after another.
    pub rates: Vec<f64>,
}

/// Opens a probe of the way to the gateway `expect`, and measures the time until it is answered.
pub(super) async fn open(
    shared: &Shared,
    address: &str,
    expect: &SpiffeId,
) -> Result<(dial::Tls, Duration), Failure> {
    let mut tls = dial::connect(shared, address, expect).await?;
    let asked = Instant::now();
    // A write that fails was refused: the reason is there to be read.
    let _ = preface::write(&mut tls, &Opening::Probe).await;
    match dial::reply(shared, &mut tls, address).await? {
        Reply::Ready => {}
        Reply::Refused(refusal) => return Err(Failure::Refused(refusal)),
        Reply::Accepted { .. } => return Err(dial::nonsense()),
    }
    Ok((tls, asked.elapsed()))
}

/// Measures the way to the gateway `expect`, for about a second.
pub(super) async fn probe(
    shared: &Shared,
    address: &str,
    expect: &SpiffeId,
) -> Result<Link, Failure> {
    let (tls, rtt) = open(shared, address, expect).await?;
    let asked = Instant::now();
    let (mut from, mut to) = tokio::io::split(tls);
    let room = Semaphore::new(FIRST);
    let send = async {
        let (piece, since) = (vec![0x5a; PIECE], Instant::now());
        for _ in 0..MOST {
            match room.acquire().await {
                Ok(place) => place.forget(),
                Err(_) => break,
            }
            to.write_all(&piece).await?;
            to.flush().await?;
            if since.elapsed() > SPAN {
                break;
            }
        }
        to.shutdown().await
    };
    let hear = async {
        let mut arrived = Vec::new();
        while from.read_u8().await.is_ok() {
            arrived.push(asked.elapsed());
            room.add_permits(2);
        }
        room.close();
        arrived
    };
    let both = async { tokio::join!(send, hear) };
    let (_, arrived) = timeout(SPAN + LAST, both).await.map_err(|_| silent(address))?;
    match rates(&arrived) {
        rates if rates.is_empty() => Err(silent(address)),
        rates => Ok(Link { rtt, rates }),
    }
}

fn silent(address: &str) -> Failure {
    Failure::Unreachable(format!("{address}: too little arrives there to be measured"))
}

/// Bytes per second between pieces that arrived. Pure. The first only starts the clock.
fn rates(arrived: &[Duration]) -> Vec<f64> {
    let mut rates = Vec::new();
    let (mut since, mut pieces) = match arrived {
        [first, _, ..] => (*first, 0),
        _ => return rates,
    };
    for at in &arrived[1..] {
        pieces += 1;
        let took = at.saturating_sub(since);
        if took >= BUCKET || (rates.is_empty() && Some(at) == arrived.last()) {
            rates.push((pieces * PIECE) as f64 / took.as_secs_f64().max(1e-6));
            (since, pieces) = (*at, 0);
        }
    }
    rates
}

/// Serves one: reads what comes, and says of each piece that it has come.
pub(super) async fn serve(
    shared: &Shared,
    tls: &mut (impl AsyncRead + AsyncWrite + Unpin),
) -> Result<(), Refusal> {
    let ended = |e: &dyn std::fmt::Display| {
        Refusal::new(code::BAD_REQUEST, format!("the link could not be measured: {e}"))
    };
    let work = async {
        preface::write(tls, &Reply::Ready).await?;
        let mut piece = vec![0; PIECE];
        for _ in 0..MOST {
            if tls.read_exact(&mut piece).await.is_err() {
                // The other end has sent all that it wanted to.
                break;
            }
            tls.write_u8(1).await?;
            tls.flush().await?;
        }
        tls.shutdown().await
    };
    let served = timeout(shared.limits.handshake + SPAN + LAST, work).await;
    served.map_err(|_| ended(&"it took too long"))?.map_err(|error| ended(&error))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn rates_are_of_what_arrived_and_one_piece_alone_tells_nothing() {
        let at = |millis: u64| Duration::from_millis(millis);
        assert!(rates(&[]).is_empty() && rates(&[at(1)]).is_empty());
        // A piece every 100 ms, after the first took long.
        let steady = [at(900), at(1000), at(1100), at(1200)];
        let one = PIECE as f64 * 10.0;
        assert!(rates(&steady).iter().all(|rate| (rate - one).abs() < one / 100.0));
        assert_eq!(rates(&steady).len(), 3);
        // A link that is too fast for its buckets still has a rate.
        assert_eq!(rates(&[at(1), at(2), at(3)]).len(), 1);
    }
}
