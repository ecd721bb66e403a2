//! A launcher's folder is its own, and what lies in it is never followed.

use crate::world::{Host, Launcher, firmware};
use launcher::status::Phase;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

#[tokio::test]
async fn of_two_launchers_in_one_folder_the_second_is_refused() {
    let host = Host::start();
    let first = host.launcher().await;
    let mut second = host.spawn(None);
    assert!(!second.ended().await.success());
    assert!(second.words().contains("another launcher holds"), "{}", second.words());
    assert_eq!(first.client.status().await.unwrap().phase, Phase::Empty);
}

/// A launcher that finds a link to `victim` in its folder.
fn with_link(host: &Host, name: &str) -> (PathBuf, Launcher) {
    let victim = host.path().join("victim");
    std::fs::write(&victim, "untouched").unwrap();
    std::fs::create_dir_all(host.folder()).unwrap();
    symlink(&victim, host.folder().join(name)).unwrap();
    (victim, host.spawn(Some(&firmware())))
}

#[tokio::test]
async fn a_link_in_place_of_a_socket_the_lock_or_the_log_is_refused() {
    for name in
        ["lock", "launcher.sock", "streams.sock", "console.sock", "console.qemu", "qemu.log"]
    {
        let host = Host::start();
        let (victim, mut launcher) = with_link(&host, name);
        assert!(!launcher.ended().await.success(), "{name}");
        assert!(launcher.words().contains(name), "{name}: {}", launcher.words());
        assert_eq!(std::fs::read_to_string(victim).unwrap(), "untouched", "{name}");
    }
}

#[tokio::test]
async fn a_link_in_place_of_qemus_socket_is_removed_and_not_followed() {
    let host = Host::start();
    let (victim, launcher) = with_link(&host, "qmp.sock");
    while launcher.client.status().await.is_err() {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    launcher.until_phase(Phase::Running).await;
    assert_eq!(std::fs::read_to_string(victim).unwrap(), "untouched");
}
