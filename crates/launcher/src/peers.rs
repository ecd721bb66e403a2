//! Where the hosts were last to which VMs went: a start of a VM that has left asks
//! the ledger of that host first, because a move may have ended badly there.
//!
//! One small file for each host, `peers/<hash of its id>.json` in the own host's folder.

use crate::migration::ticket::Peer;
use handover::record::HostId;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// Whatever is larger was not written by us.
const MAX_PEER: u64 = 64 << 10;

/// Keeps where `peer` is, in `host`'s folder; survives a loss of power.
///
/// # Errors
/// When it cannot be written.
pub fn remember(host: &Path, peer: &Peer) -> io::Result<()> {
    let path = path_of(host, &peer.id.to_string());
    let folder = host.join("peers");
    std::fs::create_dir_all(&folder)?;
    let draft = path.with_extension(format!("{}.new", std::process::id()));
    let mut file = File::create(&draft)?;
    file.write_all(&serde_json::to_vec(peer)?)?;
    file.sync_all()?;
    std::fs::rename(&draft, &path)?;
    File::open(folder)?.sync_all()
}

/// Where the host `id` was; None when no VM went there.
///
/// # Errors
/// When what is there cannot be read or understood.
pub fn find(host: &Path, id: &HostId) -> io::Result<Option<Peer>> {
    let file = match File::open(path_of(host, &id.0)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let mut text = String::new();
    file.take(MAX_PEER).read_to_string(&mut text)?;
    let peer: Peer = serde_json::from_str(&text)?;
    Ok(Some(peer).filter(|peer| peer.id.to_string() == id.0))
}

fn path_of(host: &Path, id: &str) -> PathBuf {
    let hash = xxhash_rust::xxh3::xxh3_128(id.as_bytes());
    host.join("peers").join(format!("{hash:032x}.json"))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_peer_is_found_where_it_was_last_and_a_cut_file_is_an_error() {
        let host = tempfile::tempdir().unwrap();
        let id: HostId = "spiffe://godwit/handler/b".into();
        assert_eq!(find(host.path(), &id).unwrap(), None);
        for address in ["127.0.0.3:1", "127.0.0.3:2"] {
            let peer = Peer { address: address.into(), id: id.0.parse().unwrap() };
            remember(host.path(), &peer).unwrap();
            assert_eq!(find(host.path(), &id).unwrap(), Some(peer));
        }
        std::fs::write(path_of(host.path(), &id.0), "{\"addr").unwrap();
        assert!(find(host.path(), &id).is_err());
    }
}
