//! Options of every TCP connection that carries what moves.

use rustix::net::sockopt;
use std::io;
use std::time::Duration;
use tokio::net::TcpStream;

/// A peer that is silent for so long is dead, unless somebody says otherwise.
pub const DEAD_PEER: Duration = Duration::from_secs(5);

/// No delay, and a peer that is dead for so long is noticed.
///
/// # Errors
/// Those of the system.
pub fn tune(tcp: &TcpStream, dead: Duration) -> io::Result<()> {
    let millis = u32::try_from(dead.as_millis()).unwrap_or(u32::MAX);
    let second = Duration::from_secs(1);
    tcp.set_nodelay(true)?;
    sockopt::set_socket_keepalive(tcp, true)?;
    // An idle connection is probed; one with bytes under way has the user timeout.
    sockopt::set_tcp_keepidle(tcp, (dead * 2 / 5).max(second))?;
    sockopt::set_tcp_keepintvl(tcp, (dead / 5).max(second))?;
    sockopt::set_tcp_keepcnt(tcp, 3)?;
    sockopt::set_tcp_user_timeout(tcp, millis)?;
    Ok(())
}
