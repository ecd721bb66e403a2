//! What must not pass, does not: one clear error, the guest runs on where it
//! was, nothing is lost, and once the cause is gone the same move succeeds.

use crate::PROGRAM;
use anyhow::{Context, Result};
use channel::client::GatewayClient;
use channel::identity::{Ca, Role as Part, SpiffeId, Trust};
use channel::preface::{Preface, Stream};
use channel::resumable::{self, Role};
use channel::tls;
use channel::tokens::Token;
use e2e::guest;
use e2e::media::{Loop, Tmpfs};
use e2e::scene::{self, SOON, Scene, VM};
use e2e::world::Host;
use handover::wire::Hello;
use handover::wire::v1::{FromSource, encode};
use launcher::migration::policy::Policy;
use launcher::migration::status::Outcome;
use launcher::migration::ticket::{Here, Ticket};
use launcher::migration::{PrepareRequest, SendRequest};
use launcher::status::Phase;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const MIB: u64 = 1 << 20;

fn scene() -> Result<Scene> {
    scene::scene(Path::new(PROGRAM), &[])
}

/// The proper move, once nothing stands in its way.
fn succeeds(scene: &Scene, more: &[&str]) -> Result<()> {
    scene.moved(&scene.a, &scene.b, more)?;
    scene.nothing_is_lost(&scene.b)?;
    scene.disks_are_equal(&scene.a, &scene.b)
}

fn here(host: &Host) -> Result<Here> {
    Ok(serde_json::from_slice(&std::fs::read(host.dir.join("gateway.json"))?)?)
}

/// Has a host's gateway say something else of itself until `f` is over.
fn pretending<T>(
    host: &Host,
    pretend: impl FnOnce(&mut Here) -> Result<()>,
    f: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let path = host.dir.join("gateway.json");
    let (before, mut said) = (std::fs::read(&path)?, here(host)?);
    pretend(&mut said)?;
    std::fs::write(&path, serde_json::to_vec(&said)?)?;
    let done = f();
    std::fs::write(&path, before)?;
    done
}

/// Has `ca` vouch for a host's gateway as another part of the system.
fn becomes(host: &mut Host, ca: &Ca, part: Part) -> Result<()> {
    let id = SpiffeId::new(ca.cluster(), part, "a")?;
    ca.issue(&id, Duration::from_secs(3600))?.save(&host.dir.join("identity"))?;
    host.kill_gateway();
    host.start_gateway()
}

/// Asks the launcher on `b` for leave to move the guest to it, as the CLI does.
fn ticket(scene: &Scene, attempt: &str) -> Result<Ticket> {
    let mut spec = scene.world.run(scene.a.client(VM).spec())?.context("no guest is on a")?;
    spec.disks[0].path = scene.b.folder(VM).join("root.raw");
    let request = PrepareRequest {
        migration: attempt.into(),
        from: here(&scene.a)?.peer,
        known_as: None,
        spec,
        left: Default::default(),
        policy: Policy::default(),
    };
    Ok(scene.world.run(scene.b.client(VM).prepare(&request))?)
}

fn preface(ticket: &Ticket, stream: Stream, token: &Token) -> Result<Preface> {
    let vm = ticket.vm.parse().map_err(anyhow::Error::msg)?;
    Ok(Preface { vm, migration: ticket.migration.clone(), stream, token: token.clone() })
}

#[test]
fn whoever_is_not_the_right_one_is_refused_on_either_side() -> Result<()> {
    let mut scene = scene()?;
    let stranger = scene.world.host_of("other-ca", "c", 4)?;
    let _waits = stranger.receive(VM, &[])?;
    scene.is_refused(&stranger, &[], "is not vouched for by the CA of cluster")?;

    // The target's address was given to another host of the same CA.
    let d = scene.world.host("d", 5)?;
    let moved_in = |said: &mut Here| {
        said.peer.address = d.address().to_owned();
        Ok(())
    };
    pretending(&scene.b, moved_in, || scene.is_refused(&scene.b, &[], "/d answered where"))?;

    // The target was told to expect another host than the one that comes.
    let expects = |said: &mut Here| {
        said.peer.id = here(&d)?.peer.id;
        Ok(())
    };
    pretending(&scene.a, expects, || scene.is_refused(&scene.b, &[], "(wrong-peer)"))?;

    // The right CA vouches for the source's gateway, but as something that is no gateway.
    let ca = Ca::load(&scene.world.path("ca"))?;
    let refused = becomes(&mut scene.a, &ca, Part::Launcher).map_err(|e| e.to_string());
    assert!(refused.is_err_and(|why| why.contains("needs the credentials of a handler")));
    becomes(&mut scene.a, &ca, Part::Handler)?;

    // A token that somebody else on the source's host has used.
    let ticket = ticket(&scene, "stolen")?;
    let (peer, a) = (ticket.peer.clone(), GatewayClient::new(&scene.a.dir));
    let preface = preface(&ticket, Stream::Control, &ticket.token)?;
    let thief = scene.world.run(a.dial(&peer.address, &peer.id, &preface))?;
    let request = SendRequest { ticket, policy: Policy::default() };
    scene.world.run(scene.a.client(VM).send(&request))?;
    let outcome = scene.outcome(&scene.a)?;
    assert!(format!("{outcome:?}").contains("(token-used)"), "{outcome:?}");
    drop(thief);
    scene.world.run(scene.b.client(VM).cancel())?;
    scene.outcome(&scene.b)?;
    scene.nothing_is_lost(&scene.a)?;

    succeeds(&scene, &[])
}

/// Speaks to the launcher on `b` as a source would whose first words are `words`.
fn target_hears(scene: &Scene, attempt: &str, words: &[u8]) -> Result<Outcome> {
    let ticket = ticket(scene, attempt)?;
    let Ticket { peer, token, .. } = &ticket;
    let preface = preface(&ticket, Stream::Control, token)?;
    let a = GatewayClient::new(&scene.a.dir);
    scene.world.run(async {
        let links = channel::client::Redial::new(a, &peer.address, peer.id.clone(), preface);
        let (mut near, far) = tokio::io::duplex(4 << 20);
        let stream = resumable::run(far, links, resumable::Config::new(Role::Dialing));
        let stream = tokio::spawn(stream);
        near.write_all(words).await?;
        // The target has its say, and closes the stream.
        let mut answer = Vec::new();
        tokio::time::timeout(SOON, near.read_to_end(&mut answer)).await??;
        stream.abort();
        anyhow::Ok(())
    })?;
    scene.outcome(&scene.b)
}

/// One message of the control stream.
fn message(body: &[u8]) -> Vec<u8> {
    [&(body.len() as u32).to_be_bytes(), body].concat()
}

#[test]
fn words_that_are_no_move_end_in_a_refusal_and_leave_the_target_free() -> Result<()> {
    let scene = scene()?;
    let newer = Hello { oldest: 98, newest: 99, ..Hello::ours() };
    let newer = message(&serde_json::to_vec(&newer)?);
    let unasked = message(&serde_json::to_vec(&Hello::ours())?);
    let unasked = [unasked, message(&encode(&FromSource::Commit)?)].concat();
    for (name, words, why) in [
        ("newer", newer, "versions 98 to 99"),
        ("garbage", message(b"\xff\x00GET / HTTP/1.1"), "cannot be understood"),
        ("unasked", unasked, "began with Commit instead of an offer"),
        ("oversized", (2u32 << 20).to_be_bytes().to_vec(), "a message of 2097152 bytes"),
    ] {
        let outcome = target_hears(&scene, name, &words)?;
        let Outcome::Failed { reason, .. } = outcome else { panic!("{name}: {outcome:?}") };
        assert!(reason.contains(why), "{name}: {reason}");
        assert_eq!(scene.world.status(&scene.b, VM)?.phase, Phase::Empty);
        assert!(!scene.b.folder(VM).join("root.raw").exists(), "{name}");
    }
    scene.nothing_is_lost(&scene.a)?;
    succeeds(&scene, &[])
}

/// What a gateway answers to bytes that come after a good handshake.
async fn answer(client: &tls::Client, to: &Here, bytes: &[u8]) -> Result<String> {
    let tcp = tokio::net::TcpStream::connect(&to.peer.address).await?;
    let mut stream = client.connect(&to.peer.id, tcp).await?;
    stream.write_all(bytes).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

#[test]
fn noise_at_the_gateway_does_not_disturb_a_move() -> Result<()> {
    let scene = scene()?;
    let mut moving = scene.stands_at(&scene.a, "source:Converging", &[])?;
    let ca = Ca::load(&scene.world.path("ca"))?;
    let trust = Trust::load([scene.a.dir.join("identity/trust.pem")])?;
    let client = |part| -> Result<_> {
        let id = SpiffeId::new(ca.cluster(), part, "noise")?;
        Ok(tls::Client::new(ca.issue(&id, Duration::from_secs(3600))?, trust.clone()))
    };
    let (client, launcher) = (client(Part::Handler)?, client(Part::Launcher)?);
    let moves = scene.world.status(&scene.a, VM)?.migration.context("it moves")?;
    let guessed = serde_json::json!({"stream": {
        "vm": VM, "migration": moves.migration, "stream": {"memory": 0}, "token": Token::random(),
    }});
    let guessed = guessed.to_string().into_bytes();
    let head = [b"GDWT\x00\x01".as_slice(), &(guessed.len() as u16).to_be_bytes()].concat();
    let guessed = [head, guessed].concat();
    let to = here(&scene.b)?;
    scene.world.run(async {
        let mut plain = tokio::net::TcpStream::connect(&to.peer.address).await?;
        plain.write_all(b"no TLS at all").await?;
        for (bytes, why) in [
            (b"GET / HTTP/1.1\r\nhost: b\r\n\r\n".as_slice(), "bad-preface"),
            (b"GDWT\x00\x63\x00\x02{}", "\"version\""),
            (b"GDWT\x00\x01\xff\xff", "preface-too-large"),
            (&guessed, "wrong-peer"),
        ] {
            let answer = answer(&client, &to, bytes).await?;
            assert!(answer.contains(why), "{why}: {answer}");
        }
        let refused = answer(&launcher, &to, &guessed).await;
        assert!(refused.is_err(), "a launcher spoke to a gateway: {refused:?}");
        anyhow::Ok(())
    })?;
    scene.world.run(scene.a.client(VM).release())?;
    assert!(moving.wait()?.success());
    scene.nothing_is_lost(&scene.b)?;
    scene.disks_are_equal(&scene.a, &scene.b)
}

#[test]
fn links_in_a_launchers_folder_are_not_followed() -> Result<()> {
    let scene = scene()?;
    let folder = scene.b.folder(VM);
    let (socket, aside) = (folder.join("streams.sock"), folder.join("aside.sock"));
    std::fs::rename(&socket, &aside)?;
    symlink(&aside, &socket)?;
    scene.is_refused(&scene.b, &[], "(unsafe-socket)")?;
    std::fs::rename(&aside, &socket)?;

    let (victim, disk) = (scene.world.path("victim"), folder.join("root.raw"));
    std::fs::write(&victim, [0x5a; 4096])?;
    symlink(&victim, &disk)?;
    scene.is_refused(&scene.b, &[], "links are not followed")?;
    assert_eq!(std::fs::read(&victim)?, [0x5a; 4096]);
    std::fs::remove_file(&disk)?;

    succeeds(&scene, &[])
}

#[test]
fn a_target_that_fills_up_fails_the_move_and_the_rest_fits_later() -> Result<()> {
    let full = Tmpfs::new(8 * MIB)?;
    let scene = scene()?;
    let disk = format!("root={}", full.path("root.raw").display());
    scene.is_refused(&scene.b, &["--disk", &disk], "No space left on device")?;
    full.grow(256 * MIB)?;
    succeeds(&scene, &["--disk", &disk, "--resume"])
}

#[test]
fn a_source_that_cannot_be_read_fails_the_move_and_a_mended_one_moves() -> Result<()> {
    let device = Loop::new(72 * MIB)?;
    let mut template = File::open(guest::image("disk.raw")?)?;
    std::io::copy(&mut template, &mut device.backing())?;
    let path = device.path().to_owned();
    let scene = scene::scene_on(Path::new(PROGRAM), &[], |_| Ok(vec![("root", path)]))?;
    // Behind the guest's last partition, where only a copy of the whole disk looks.
    device.backing().set_len(64 * MIB)?;
    scene.is_refused(&scene.b, &[], "Input/output error")?;
    device.backing().set_len(72 * MIB)?;
    succeeds(&scene, &["--resume"])
}

/// A tool of QEMU that has an image open for writing, until it is dropped.
struct Holder(Child);

impl Holder {
    fn of(image: &Path) -> Result<Self> {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw"]).arg(image).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut holder = Self(command.spawn().context("cannot run qemu-io")?);
        holder.0.stdin.as_mut().context("stdin")?.write_all(b"read 0 512\n")?;
        let mut said = String::new();
        while !said.contains("512 bytes") {
            said.clear();
            let stdout = holder.0.stdout.as_mut().context("stdout")?;
            let read = BufReader::with_capacity(1, stdout).read_line(&mut said)?;
            anyhow::ensure!(read > 0, "qemu-io cannot open {}", image.display());
        }
        Ok(holder)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_disk_of_another_vm_is_not_touched() -> Result<()> {
    let scene = scene()?;
    let theirs = scene.b.dir.join("theirs.raw");
    guest::disk(&theirs, 64)?;
    let _other = scene.b.launch("other", &guest::spec("other", &theirs, 64)?, &[])?;
    scene.world.wait_running(&scene.b, "other")?;
    let disk = format!("root={}", theirs.display());
    scene.is_refused(&scene.b, &["--disk", &disk], "is in use by another VM")?;
    let mut region = vec![1; 4 * MIB as usize];
    File::open(&theirs)?.read_exact_at(&mut region, guest::REGION.start)?;
    assert!(region.iter().all(|b| *b == 0), "it was written");
    // Not even marked: it can be started again.
    scene.world.run(scene.b.client("other").kill())?;
    let spec = serde_json::from_str(&guest::spec("other", &theirs, 64)?)?;
    scene.world.run(scene.b.client("other").start(&spec, false))?;
    Ok(())
}

#[test]
fn a_disk_that_is_taken_at_the_last_moment_gives_the_guest_back() -> Result<()> {
    let scene = scene()?;
    let mut moving = scene.stands_at(&scene.b, "target:Released", &[])?;
    let holder = Holder::of(&scene.b.folder(VM).join("root.raw"))?;
    scene.world.run(scene.b.client(VM).release())?;
    assert!(!moving.wait()?.success());
    let outcome = scene.outcome(&scene.a)?;
    assert!(format!("{outcome:?}").contains("lock"), "{outcome:?}");
    scene.nothing_is_lost(&scene.a)?;
    scene.outcome(&scene.b)?;
    drop(holder);
    succeeds(&scene, &[])
}

/// The QEMU of a launcher.
fn qemu_of(launcher: u32) -> Result<rustix::process::Pid> {
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        let mut status = String::new();
        // It may have ended meanwhile.
        let _ =
            File::open(format!("/proc/{pid}/status")).map(|mut f| f.read_to_string(&mut status));
        if status.lines().any(|line| line == format!("PPid:\t{launcher}")) {
            return rustix::process::Pid::from_raw(pid).context("no process");
        }
    }
    anyhow::bail!("launcher {launcher} has no QEMU")
}

#[test]
fn a_qemu_that_hangs_when_it_is_to_run_is_ended_and_its_host_keeps_the_vm() -> Result<()> {
    let scene = scene()?;
    let mut moving = scene.stands_at(&scene.b, "target:Released", &[])?;
    let qemu = qemu_of(scene.on_b.as_ref().context("it runs")?.pid())?;
    rustix::process::kill_process(qemu, rustix::process::Signal::STOP)?;
    scene.world.run(scene.b.client(VM).release())?;
    assert!(!moving.wait()?.success(), "a guest that does not run was called moved");
    // It may have run there: the guest must not go on at the source.
    let stopped = |s: &launcher::status::Status| s.phase == Phase::Stopped;
    scene.world.wait_status(&scene.b, VM, "stopped", stopped)?;
    scene.world.wait_status(&scene.a, VM, "left", |s| s.phase == Phase::Left)?;
    assert!(!Path::new(&format!("/proc/{}", qemu.as_raw_nonzero())).exists());
    let region = oracle::protocol::Range {
        dev: scene.b.folder(VM).join("root.raw").display().to_string(),
        offset: guest::REGION.start,
        len: 4 * MIB,
    };
    let found = oracle::image::verify(&region, 4096, 7, scene.witness.written(), |_| {})?;
    assert_eq!(found.lost, 0);
    let spec = serde_json::from_str(&guest::spec(VM, &scene.b.folder(VM).join("root.raw"), 64)?)?;
    scene.world.run(scene.b.client(VM).start(&spec, false))?;
    Ok(())
}
