//! The target: takes in memory and state, then waits for `cont`.
//!
//! As with QEMU before 9.1, an incoming migration that fails ends the process.

use super::Status;
use super::stream::{CHANNEL, Device, Frame, Header, MAGIC};
use crate::stub::block::reason;
use crate::stub::chardev::listen;
use crate::stub::error::Error;
use crate::stub::guest::Page;
use crate::stub::lock;
use crate::stub::machine::{Machine, Qemu, RunState};
use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Barrier};

/// `migrate-incoming`, or `-incoming` with a URI.
///
/// # Errors
/// As QEMU; then it can be tried again.
pub fn begin(qemu: &Arc<Qemu>, machine: &mut Machine, uri: &str) -> Result<(), Error> {
    if !machine.incoming.wanted {
        return Err(Error::generic("'-incoming' was not specified on the command line"));
    }
    if machine.incoming.begun {
        return Err(Error::generic("The incoming migration has already been started"));
    }
    machine.incoming.status = Status::Setup;
    qemu.tell_status(machine, Status::Setup);
    let Some(path) = uri.strip_prefix("unix:") else {
        return Err(Error::generic(format!("unknown migration protocol: {uri}")));
    };
    let listener = listen(path)?;
    machine.incoming.begun = true;
    machine.incoming.path = Some(path.to_owned());
    let (qemu, path) = (qemu.clone(), path.to_owned());
    std::thread::spawn(move || {
        if let Err(error) = run(&qemu, &listener, &path) {
            end(&error);
        }
    });
    Ok(())
}

/// What QEMU does before 9.1. N.B. it leaves its sockets behind.
fn end(error: &io::Error) -> ! {
    let text = match error.kind() {
        io::ErrorKind::UnexpectedEof => "Input/output error".to_owned(),
        _ => reason(error),
    };
    eprintln!("stub-qemu: load of migration failed: {text}");
    std::process::exit(1)
}

fn run(qemu: &Arc<Qemu>, listener: &UnixListener, path: &str) -> io::Result<()> {
    // N.B. the first connection is the main one, whatever it is.
    let (main, _) = listener.accept()?;
    let channels = {
        let migration = &qemu.lock().migration;
        if migration.has("multifd") { migration.number("multifd-channels") } else { 0 }
    };
    let channels = (0..channels)
        .map(|_| listener.accept().map(|(stream, _)| stream))
        .collect::<io::Result<Vec<_>>>()?;
    let _ = std::fs::remove_file(path);
    let streams = std::iter::once(&main).chain(&channels);
    qemu.streams.set(streams.map(UnixStream::try_clone).collect::<io::Result<_>>()?);
    {
        let machine = &mut *qemu.lock();
        machine.incoming.status = Status::Active;
        qemu.tell_status(machine, Status::Active);
    }
    let count = channels.len();
    let barrier = Arc::new(Barrier::new(count + 1));
    for channel in channels {
        let (qemu, barrier) = (qemu.clone(), barrier.clone());
        std::thread::spawn(move || {
            if let Err(error) = receive_channel(&qemu, channel, &barrier) {
                end(&error);
            }
        });
    }
    let (header, device) = receive_main(qemu, &main, &barrier, count as u64)?;
    load(qemu, &device)?;
    if header.return_path {
        // A source that is gone by now has its answer from somebody else.
        let _ = (&main).write_all(&[1]);
    }
    Ok(())
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.to_owned())
}

fn expect_magic(from: &mut impl Read, magic: [u8; 8]) -> io::Result<()> {
    let mut found = [0; 8];
    match from.read_exact(&mut found) {
        Ok(()) if found == magic => Ok(()),
        _ => Err(invalid("Not a migration stream")),
    }
}

fn receive_channel(qemu: &Qemu, channel: UnixStream, barrier: &Barrier) -> io::Result<()> {
    let mut from = BufReader::new(channel);
    expect_magic(&mut from, CHANNEL)?;
    loop {
        match Frame::read(&mut from) {
            Ok(Frame::Pages(pages)) => put(qemu, pages)?,
            Ok(Frame::Sync) => {
                barrier.wait();
            }
            Ok(_) => return Err(invalid("Unexpected frame on a memory channel")),
            // The main connection tells a good end from a bad one.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

fn put(qemu: &Qemu, pages: Vec<Page>) -> io::Result<()> {
    let good = qemu.guest.with(move |guest| pages.iter().all(|page| guest.ram.put(page)));
    if good { Ok(()) } else { Err(invalid("Illegal RAM offset")) }
}

fn receive_main(
    qemu: &Qemu,
    main: &UnixStream,
    barrier: &Barrier,
    channels: u64,
) -> io::Result<(Header, Device)> {
    let mut from = BufReader::new(main);
    expect_magic(&mut from, MAGIC)?;
    let Frame::Header(header) = Frame::read(&mut from)? else {
        return Err(invalid("Not a migration stream"));
    };
    let memory = [qemu.asked_memory, qemu.memory];
    if header.memory != memory {
        let [theirs, ours] = [header.memory[0] << 10, memory[0] << 10];
        return Err(invalid(&format!("Size mismatch: pc.ram: {theirs:#x} != {ours:#x}")));
    }
    if header.channels != channels {
        return Err(invalid("Unknown combination of migration flags: 0x0"));
    }
    let mut device = None;
    loop {
        match Frame::read(&mut from)? {
            Frame::Pages(pages) => put(qemu, pages)?,
            Frame::Sync => {
                barrier.wait();
            }
            Frame::Device(given) => device = Some(given),
            Frame::End => break,
            Frame::Header(_) => return Err(invalid("Unexpected frame")),
        }
    }
    let device = device.ok_or_else(|| invalid("The state of the devices is missing"))?;
    Ok((header, device))
}

/// The guest is all here.
fn load(qemu: &Qemu, device: &Device) -> io::Result<()> {
    let machine = &mut *qemu.lock();
    if device.disks > lock(&qemu.graph).disks() {
        return Err(invalid("Unknown savevm section or instance 'virtio-blk' 0"));
    }
    let state = RunState::by_name(&device.state).ok_or_else(|| invalid("Unknown run state"))?;
    let saved = device.guest.clone();
    if !qemu.guest.with(move |guest| guest.load(&saved)) {
        return Err(invalid("The guest's state makes no sense"));
    }
    let runs = machine.autostart && state == RunState::Running;
    if runs || !machine.migration.has("late-block-activate") {
        let activated = lock(&qemu.graph).activate();
        if let Err(error) = &activated {
            eprintln!("stub-qemu: {error}");
            machine.autostart = false;
        }
        if !runs {
            // N.B. QEMU takes the locks only when the guest runs, whatever the capability says.
            lock(&qemu.graph).inactivate();
        }
    }
    machine.state = match state {
        RunState::Running => RunState::Paused,
        other => other,
    };
    if runs && machine.autostart {
        qemu.start(machine);
    }
    machine.incoming.status = Status::Completed;
    machine.incoming.path = None;
    qemu.streams.set(Vec::new());
    qemu.tell_status(machine, Status::Completed);
    Ok(())
}
