//! Serial ports: nobody misses anything, nobody holds up anybody.

use crate::world::{Host, PATIENCE, firmware};
use channel::socket::connect_beneath;
use launcher::console::Console;
use launcher::status::Phase;
use std::path::Path;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Reads until `text` was said; returns all that was.
pub async fn hear(stream: &mut UnixStream, text: &str) -> String {
    let mut heard = Vec::new();
    let hear = async {
        let mut buffer = [0; 4096];
        while !String::from_utf8_lossy(&heard).contains(text) {
            let n = stream.read(&mut buffer).await.unwrap();
            assert_ne!(n, 0, "the port was closed after {:?}", String::from_utf8_lossy(&heard));
            heard.extend_from_slice(&buffer[..n]);
        }
    };
    let done = tokio::time::timeout(PATIENCE, hear).await;
    let heard = String::from_utf8_lossy(&heard).into_owned();
    assert!(done.is_ok(), "'{text}' was never said, only: {heard}");
    heard
}

async fn connect(folder: &Path, name: &str) -> UnixStream {
    connect_beneath(folder, name).await.unwrap()
}

#[tokio::test]
async fn a_late_client_hears_the_guest_from_its_first_word() {
    let host = Host::start();
    let launcher = host.launcher_with(Some(&firmware())).await;
    launcher.until_phase(Phase::Running).await;
    let mut early = launcher.serial("console").await;
    let heard = hear(&mut early, "No bootable device").await;
    let mut late = launcher.serial("console").await;
    assert_eq!(hear(&mut late, "No bootable device").await, heard);
    assert!(heard.contains("SeaBIOS"), "{heard}");
}

// In the next two the test plays QEMU, which cannot be made to speak fast or to hear nothing.

#[tokio::test]
async fn a_client_that_never_reads_holds_up_nobody_and_is_dropped() {
    const FLOOD: usize = 8 << 20;
    let folder = tempfile::tempdir().unwrap();
    let _console = Console::open(folder.path(), "console").unwrap();
    let mut qemu = connect(folder.path(), "console.qemu").await;
    let mut deaf = connect(folder.path(), "console.sock").await;
    let mut reader = connect(folder.path(), "console.sock").await;
    qemu.write_all(b"begin").await.unwrap();
    hear(&mut deaf, "begin").await;
    hear(&mut reader, "begin").await;
    let speak = async {
        let line = [b'x'; 1024];
        for _ in 0..FLOOD / line.len() {
            qemu.write_all(&line).await.unwrap();
        }
        qemu.write_all(b"end").await.unwrap();
    };
    tokio::time::timeout(PATIENCE, speak).await.expect("QEMU was made to wait");
    // All that is left for it is what the socket took before it was dropped.
    let mut rest = Vec::new();
    let read = tokio::time::timeout(PATIENCE, deaf.read_to_end(&mut rest)).await;
    read.expect("it was not dropped").unwrap();
    assert!(rest.len() < FLOOD && !rest.ends_with(b"end"));
    // A new one hears the last 64 KiB.
    let mut new = connect(folder.path(), "console.sock").await;
    assert_eq!(hear(&mut new, "end").await.len(), 64 << 10);
}

#[tokio::test]
async fn what_clients_type_reaches_the_guest_though_it_floods_and_they_say_no_more() {
    let folder = tempfile::tempdir().unwrap();
    let _console = Console::open(folder.path(), "console").unwrap();
    let mut qemu = connect(folder.path(), "console.qemu").await;
    qemu.write_all(b"login: ").await.unwrap();
    for name in ["root", "toor"] {
        let mut client = connect(folder.path(), "console.sock").await;
        hear(&mut client, "login: ").await;
        client.write_all(name.as_bytes()).await.unwrap();
        client.shutdown().await.unwrap();
        hear(&mut qemu, name).await;
        qemu.write_all(b"welcome").await.unwrap();
        hear(&mut client, "welcome").await;
    }
}
