//! Ids are strict, keys are private, and a CA speaks for its own cluster.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use channel::identity::{Ca, Error, Identity, Role, SpiffeId, Trust};
use channel::socket;
use tempfile::tempdir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[test]
fn an_id_is_one_spelling_only() {
    let id: SpiffeId = "spiffe://east-1.example/handler/Node_a.1".parse().expect("a good id");
    assert_eq!(
        (id.cluster(), id.role(), id.instance()),
        ("east-1.example", Role::Handler, "Node_a.1")
    );
    assert_eq!(id.to_string(), "spiffe://east-1.example/handler/Node_a.1");
    let long = format!("spiffe://east/handler/{}", "n".repeat(129));
    for bad in [
        "",
        "spiffe://",
        "spiffe://east/handler",
        "spiffe://east/handler/",
        "spiffe://east/handler/a/",
        "spiffe://east/handler/a/b",
        "spiffe://east//a",
        "spiffe:///handler/a",
        "spiffe://East/handler/a",
        "spiffe://east/Handler/a",
        "spiffe://east/root/a",
        "spiffe://east/handler/..",
        "spiffe://east/handler/a%2f",
        "spiffe://east/handler/a?b",
        "spiffe://east/handler/a b",
        "spiffe://east:1/handler/a",
        "spiffe://me@east/handler/a",
        "SPIFFE://east/handler/a",
        " spiffe://east/handler/a",
        "spiffe://east/handler/a\n",
        "https://east/handler/a",
        &long,
    ] {
        assert!(bad.parse::<SpiffeId>().is_err(), "{bad:?} was taken");
    }
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).expect("it exists").permissions().mode() & 0o777
}

#[test]
fn credentials_come_back_from_a_folder_and_their_keys_are_private() {
    let dir = tempdir().expect("a folder");
    let (ca_dir, node_dir) = (dir.path().join("ca"), dir.path().join("node"));
    Ca::create("east").expect("a CA").save(&ca_dir).expect("saved");
    let ca = Ca::load(&ca_dir).expect("loaded");
    assert_eq!((ca.cluster(), mode(&ca_dir.join("ca.key"))), ("east", 0o600));
    let id = SpiffeId::new("east", Role::Handler, "node-a").expect("an id");
    let day = Duration::from_secs(24 * 3600);
    ca.issue(&id, day).expect("issued").save(&node_dir).expect("saved");
    let identity = Identity::load(&node_dir).expect("loaded");
    assert_eq!((identity.id(), mode(&node_dir.join("tls.key"))), (&id, 0o600));
    let left = identity.expires().expect("a time").duration_since(SystemTime::now());
    assert!(left.expect("in the future") <= day);
    let trust = Trust::load([ca_dir.join("ca.crt")]).expect("trusted");
    assert_eq!(trust.clusters().collect::<Vec<_>>(), ["east"]);
    // Saved again, as a renewal does.
    ca.issue(&id, day).expect("issued").save(&node_dir).expect("saved");
    Identity::load(&node_dir).expect("loaded");
    assert!(!format!("{identity:?} {ca:?}").contains("PRIVATE"));
}

#[test]
fn keys_that_are_links_or_open_to_others_are_refused() {
    let dir = tempdir().expect("a folder");
    let id = SpiffeId::new("east", Role::Handler, "node-a").expect("an id");
    let identity = Ca::create("east").expect("a CA").issue(&id, Duration::from_secs(60));
    identity.expect("issued").save(dir.path()).expect("saved");
    let key = dir.path().join("tls.key");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).expect("chmod");
    assert!(matches!(Identity::load(dir.path()), Err(Error::Unsafe { .. })));
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).expect("chmod");
    let elsewhere = dir.path().join("elsewhere");
    std::fs::rename(&key, &elsewhere).expect("renamed");
    symlink(&elsewhere, &key).expect("a link");
    assert!(matches!(Identity::load(dir.path()), Err(Error::Unsafe { .. })));
}

#[test]
fn a_ca_vouches_for_its_own_cluster_only() {
    let (east, west) = (Ca::create("east").expect("a CA"), Ca::create("west").expect("a CA"));
    let id = SpiffeId::new("west", Role::Handler, "node-a").expect("an id");
    let hour = Duration::from_secs(3600);
    assert!(matches!(east.issue(&id, hour), Err(Error::ForeignCluster { .. })));
    let mut trust = Trust::new();
    let handed_over = format!("{}{}", west.certificate_pem(), east.certificate_pem());
    let refused = trust.add_linked("west", &handed_over);
    assert!(matches!(refused, Err(Error::ForeignCluster { .. })));
    assert_eq!(trust.clusters().count(), 0);
    let leaf = tempdir().expect("a folder");
    west.issue(&id, hour).expect("issued").save(leaf.path()).expect("saved");
    let no_ca = Trust::load([leaf.path().join("tls.crt")]);
    assert!(matches!(no_ca, Err(Error::NotACa)));
}

#[tokio::test]
async fn sockets_work_beneath_a_deep_folder_and_are_private() {
    let dir = tempdir().expect("a folder");
    let deep = (0..12).fold(dir.path().to_owned(), |dir, n| dir.join(format!("quite-deep-{n:03}")));
    std::fs::create_dir_all(&deep).expect("a folder");
    assert!(deep.as_os_str().len() > 107);
    let listener = socket::bind_beneath(&deep, "a.sock").expect("bound");
    assert_eq!(mode(&deep.join("a.sock")), 0o600);
    let below = deep.strip_prefix(dir.path()).expect("below").join("a.sock");
    let name = below.to_str().expect("text");
    let (near, far) = tokio::join!(socket::connect_beneath(dir.path(), name), listener.accept());
    near.expect("connected").write_all(b"x").await.expect("written");
    assert_eq!(far.expect("accepted").0.read_u8().await.expect("read"), b'x');

    assert!(matches!(socket::bind_beneath(&deep, "a.sock"), Err(socket::Error::InUse { .. })));
    for outside in ["../x.sock", "/tmp", "", ".."] {
        assert!(socket::bind_beneath(&deep, outside).is_err(), "{outside}");
        assert!(socket::connect_beneath(&deep, outside).await.is_err(), "{outside}");
    }
    drop(listener);
    let absent = socket::connect_beneath(&deep, "a.sock").await;
    assert!(matches!(absent, Err(socket::Error::Absent { .. })));
    socket::bind_beneath(&deep, "a.sock").expect("a dead socket is replaced");

    std::fs::write(deep.join("precious"), b"data").expect("written");
    symlink(deep.join("precious"), deep.join("link.sock")).expect("a link");
    for taken in ["precious", "link.sock"] {
        let refused = socket::bind_beneath(&deep, taken);
        assert!(matches!(refused, Err(socket::Error::Unsafe { .. })), "{taken}: {refused:?}");
    }
    assert_eq!(std::fs::read(deep.join("precious")).expect("still there"), b"data");
}

#[tokio::test]
async fn a_folder_is_free_again_at_once_whatever_is_forked_meanwhile() {
    let dir = tempdir().expect("a folder");
    let busy = AtomicBool::new(true);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while busy.load(Ordering::Relaxed) {
                // That a user is named makes std fork, instead of the quicker `posix_spawn`.
                let user = rustix::process::geteuid().as_raw();
                let child = std::process::Command::new("true").uid(user).status();
                assert!(child.expect("it runs").success());
            }
        });
        let bound = (0..500).map(|n| socket::bind_beneath(dir.path(), &format!("{n}.sock")));
        let refused: Vec<_> = bound.filter_map(Result::err).collect();
        busy.store(false, Ordering::Relaxed);
        assert!(refused.is_empty(), "{} refused: {}", refused.len(), refused[0]);
    });
}
