//! A VM from its start to its end, by every way.

use crate::console::hear;
use crate::world::{self, Host, firmware, spec};
use launcher::migration::marks::{Mark, Marks};
use launcher::qemu::start_time;
use launcher::status::Phase;
use mover::disk::Disk;
use rustix::process::Signal;
use serde_json::json;
use std::time::Duration;

#[tokio::test]
async fn a_vm_runs_stands_still_goes_on_and_is_ended() {
    let host = Host::start();
    let launcher = host.launcher().await;
    let client = &launcher.client;
    assert_eq!(client.status().await.unwrap().phase, Phase::Empty);
    assert_eq!(client.spec().await.unwrap(), None);
    let status = client.start(&firmware(), false).await.unwrap();
    assert_eq!((status.phase, status.epoch), (Phase::Running, Some(1)));
    // As it was given, but for the machine type, which an alias would leave open.
    let spec = client.spec().await.unwrap().unwrap();
    assert!(spec.machine.starts_with("pc-i440fx-"), "{}", spec.machine);
    assert_eq!(launcher::spec::VmSpec { machine: "pc".to_owned(), ..spec }, firmware());
    assert_eq!(client.pause().await.unwrap().phase, Phase::Paused);
    assert!(client.start(&firmware(), false).await.unwrap_err().is_conflict());
    assert_eq!(client.resume().await.unwrap().phase, Phase::Running);
    let pid = status.qemu_pid.unwrap();
    let began = start_time(pid);
    let status = client.kill().await.unwrap();
    assert_eq!((status.phase, status.qemu_pid), (Phase::Stopped, None));
    assert_eq!(status.reason.as_deref(), Some("it was ended"));
    assert_ne!(start_time(pid), began);
    // Every start is an epoch of its own.
    assert_eq!(client.start(&firmware(), false).await.unwrap().epoch, Some(2));
}

#[tokio::test]
async fn a_guest_that_ignores_the_power_button_is_ended_after_the_grace() {
    let host = Host::start();
    let launcher = host.launcher_with(Some(&firmware())).await;
    launcher.until_phase(Phase::Running).await;
    let status = launcher.client.shut_down(Duration::from_millis(300)).await.unwrap();
    assert_eq!(status.phase, Phase::ShuttingDown);
    launcher.until_phase(Phase::Stopped).await;
}

#[tokio::test]
async fn a_qemu_that_is_killed_from_outside_leaves_a_stopped_vm_and_the_reason() {
    let host = Host::start();
    let launcher = host.launcher_with(Some(&firmware())).await;
    let status = launcher.until_phase(Phase::Running).await;
    world::signal(status.qemu_pid.unwrap(), Signal::SEGV);
    let status = launcher.until("stopped, with a reason", |status| {
        status.phase == Phase::Stopped && status.reason.is_some()
    });
    let reason = status.await.reason.unwrap();
    assert!(reason.contains("by itself") && reason.contains("signal: 11"), "{reason}");
}

#[tokio::test]
async fn no_qemu_outlives_a_launcher_that_is_killed() {
    let host = Host::start();
    let mut launcher = host.launcher_with(Some(&firmware())).await;
    let qemu = launcher.until_phase(Phase::Running).await.qemu_pid.unwrap();
    let began = start_time(qemu);
    world::signal(launcher.pid(), Signal::KILL);
    assert!(world::was_killed(launcher.ended().await));
    world::until_gone(qemu, began).await;
    // What it left in its folder is in nobody's way.
    let next = host.launcher_with(Some(&firmware())).await;
    assert_eq!(next.until_phase(Phase::Running).await.epoch, Some(2));
}

#[tokio::test]
async fn a_launcher_that_is_told_to_end_leaves_no_process_and_no_socket() {
    let host = Host::start();
    let mut launcher = host.launcher_with(Some(&firmware())).await;
    let qemu = launcher.until_phase(Phase::Running).await.qemu_pid.unwrap();
    let began = start_time(qemu);
    world::signal(launcher.pid(), Signal::TERM);
    launcher.until_phase(Phase::ShuttingDown).await;
    // The firmware would be waited for; who is told twice does not.
    world::signal(launcher.pid(), Signal::TERM);
    assert!(launcher.ended().await.success(), "{}", launcher.words());
    world::until_gone(qemu, began).await;
    let left = std::fs::read_dir(host.folder()).unwrap().map(|e| e.unwrap().file_name());
    let mut left: Vec<_> = left.map(|name| name.into_string().unwrap()).collect();
    left.sort();
    assert_eq!(left, ["lock", "qemu.log"]);
}

#[tokio::test]
async fn a_launcher_takes_at_most_15_mib_beside_its_qemu() {
    let host = Host::start();
    let launcher = host.launcher_with(Some(&firmware())).await;
    launcher.until_phase(Phase::Running).await;
    let mut console = launcher.serial("console").await;
    hear(&mut console, "No bootable device").await;
    let status = std::fs::read_to_string(format!("/proc/{}/status", launcher.pid())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let kib: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kib <= 15 << 10, "{kib} KiB");
}

#[tokio::test]
async fn what_qemu_says_before_it_fails_is_told_and_nothing_runs() {
    let host = Host::start();
    let launcher = host.launcher().await;
    let error = launcher.client.start(&spec(json!({"cpu": "no-such-cpu"})), false).await;
    let error = error.unwrap_err().to_string();
    assert!(error.contains("no-such-cpu") && error.contains("exit status: 1"), "{error}");
    let status = launcher.client.status().await.unwrap();
    assert_eq!(status.phase, Phase::Empty);
    assert!(status.reason.unwrap().contains("no-such-cpu"));
    let log = std::fs::read_to_string(host.folder().join("qemu.log")).unwrap();
    assert!(log.contains("unable to find CPU model 'no-such-cpu'"), "{log}");
    // And it is in nobody's way.
    assert_eq!(launcher.client.start(&firmware(), false).await.unwrap().epoch, Some(1));
}

#[tokio::test]
async fn a_machine_type_that_qemu_does_not_know_is_named_with_a_remedy() {
    let host = Host::start();
    let launcher = host.launcher().await;
    let error = launcher.client.start(&spec(json!({"machine": "pc-q35-999.9"})), false).await;
    let error = error.unwrap_err().to_string();
    assert!(error.contains("does not know machine type pc-q35-999.9; install"), "{error}");
}

#[tokio::test]
async fn a_disk_that_was_left_is_not_started_unless_a_person_insists() {
    let host = Host::start();
    let path = host.disk("root.raw", 1 << 20);
    let disk = Disk::source(&path).unwrap();
    let mark = Mark::Superseded {
        vm: "web".to_owned(),
        epoch: 7,
        heir: "elsewhere".to_owned(),
        left_as: disk.identity().unwrap(),
    };
    Marks::of_host(host.path()).set(&disk, &mark).unwrap();
    let spec = spec(json!({"disks": [{"name": "root", "path": path}]}));
    let launcher = host.launcher().await;
    let error = launcher.client.start(&spec, false).await.unwrap_err();
    assert!(error.is_conflict() && error.to_string().contains("elsewhere"), "{error}");
    assert_eq!(launcher.client.start(&spec, true).await.unwrap().phase, Phase::Running);
}

#[tokio::test]
async fn two_launchers_never_share_a_disk() {
    let (one, other) = (Host::start(), Host::start());
    let path = one.disk("root.raw", 1 << 20);
    let spec = spec(json!({"disks": [{"name": "root", "path": path}]}));
    let first = one.launcher_with(Some(&spec)).await;
    first.until_phase(Phase::Running).await;
    let mut second = other.spawn(Some(&spec));
    assert!(!second.ended().await.success());
    assert!(second.words().contains("in use"), "{}", second.words());
}

#[tokio::test]
async fn every_bus_and_every_slot_works_on_both_kinds_of_machine() {
    for machine in ["pc", "q35"] {
        let host = Host::start();
        let disk = |bus: &str, n: usize| {
            let name = format!("{bus}{n}");
            json!({"path": host.disk(&name, 1 << 20), "name": name, "bus": bus})
        };
        let virtio = (0..15).map(|n| disk("virtio", n));
        let sata = (0..6).map(|n| disk("sata", n));
        let scsi = (0..3).map(|n| disk("scsi", n));
        let nic = |n| json!({"name": format!("lan{n}"), "mac": format!("52:54:00:00:00:0{n}")});
        let spec = spec(json!({
            "machine": machine, "vcpus": 2, "memoryMiB": 64,
            "disks": virtio.chain(sata).chain(scsi).collect::<Vec<_>>(),
            "nics": (0..8).map(nic).collect::<Vec<_>>(),
            "serials": ["console", "a", "b", "c"],
        }));
        let launcher = host.launcher().await;
        let started = launcher.client.start(&spec, false).await;
        assert_eq!(started.unwrap().phase, Phase::Running, "{machine}");
        let log = std::fs::read_to_string(host.folder().join("qemu.log")).unwrap();
        assert!(!log.contains("warning"), "{log}");
    }
}

#[tokio::test]
async fn without_a_handler_to_ask_nothing_is_started() {
    let mut host = Host::start();
    host.stop_gateway().await;
    let launcher = host.launcher().await;
    let error = launcher.client.start(&firmware(), false).await.unwrap_err().to_string();
    assert!(error.contains("handler does not answer"), "{error}");
    assert_eq!(launcher.client.status().await.unwrap().qemu_pid, None);
}
