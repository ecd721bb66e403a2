//! A way to another gateway that goes through others: a port of this host, whose connections pass whatever is
//! opened for each. Who answers at the other end is checked as ever: TLS goes from end to end.

use crate::{copy, tcp};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// Connections that pass at the same time: as many as a gateway takes.
const MOST: usize = 1024;

/// A stream of bytes.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A stream that is being opened.
pub type Opening<'a> = Pin<Box<dyn Future<Output = Result<Box<dyn Stream>, String>> + Send + 'a>>;

/// Opens a stream to the other gateway, for each connection anew.
pub trait Opener: Send + Sync + 'static {
    /// One more.
    fn open(&self) -> Opening<'_>;
}

/// The port. It goes when this is dropped, with all that passes.
#[derive(Debug)]
pub struct Passage {
    address: SocketAddr,
    _tasks: JoinSet<()>,
}

impl Passage {
    /// Takes a port at `ip`, which only this host can reach, or whoever reaches its gateway.
    ///
    /// # Errors
    /// Those of listening.
    pub async fn start(ip: IpAddr, opener: impl Opener) -> io::Result<Self> {
        let listener = TcpListener::bind(SocketAddr::new(ip, 0)).await?;
        let address = listener.local_addr()?;
        let mut tasks = JoinSet::new();
        tasks.spawn(serve(listener, Arc::new(opener)));
        Ok(Self { address, _tasks: tasks })
    }

    /// Where it is.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

async fn serve(listener: TcpListener, opener: Arc<impl Opener>) {
    let mut passing = JoinSet::new();
    loop {
        while passing.try_join_next().is_some() {}
        let Ok((near, from)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        if passing.len() >= MOST {
            tracing::warn!(%from, "{MOST} connections pass through others already: one is refused");
            continue;
        }
        let opener = Arc::clone(&opener);
        passing.spawn(async move {
            // Without it a peer that is gone is noticed later.
            let _ = tcp::tune(&near, tcp::DEAD_PEER);
            match opener.open().await {
                Ok(far) => drop(copy::both_ways(near, far).await),
                Err(why) => tracing::warn!(%from, "the way through others is not open: {why}"),
            }
        });
    }
}

/// Copies both ways until both have ended.
///
/// # Errors
/// Those of either side.
pub async fn join(
    one: impl AsyncRead + AsyncWrite,
    other: impl AsyncRead + AsyncWrite,
) -> io::Result<()> {
    copy::both_ways(one, other).await
}
