//! The source: sends the memory in passes while the guest runs, then the rest.
//!
//! One thread per migration, built like QEMU's, so that what goes wrong goes
//! wrong in the same way: the status changes only if it is the expected one, the
//! thread notices others' changes at the same points, and the switchover holds
//! the big lock while it writes.

use super::stream::{CHANNEL, Device, Frame, Header, MAGIC};
use super::{Migration, Ram, Status, Times};
use crate::stub::block::reason;
use crate::stub::chardev::connect;
use crate::stub::error::Error;
use crate::stub::guest::{PAGE, Page};
use crate::stub::lock;
use crate::stub::machine::{Machine, Qemu, RunState};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::json;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

/// Pages of one message.
const BATCH: u64 = 64;
/// The rate is kept over windows of this length, as in QEMU.
const WINDOW: Duration = Duration::from_millis(100);
/// How often the memory channels are looked at under `STUB_QEMU_MULTIFD_STUCK`.
const GLANCE: Duration = Duration::from_millis(2);
/// How long a status is true before the machine follows it.
const GAP: Duration = Duration::from_millis(2);
const FOR_EVER: Duration = Duration::from_secs(3600);

type Guard<'a> = MutexGuard<'a, Machine>;

/// `migrate`.
///
/// # Errors
/// As QEMU. N.B. some refusals change the status nevertheless, as they do in QEMU.
pub fn begin(qemu: &Arc<Qemu>, machine: &mut Machine, uri: &str) -> Result<(), Error> {
    if machine.migration.status.is_running() {
        return Err(Error::generic("There's a migration process in progress"));
    }
    match machine.state {
        RunState::Inmigrate => {
            return Err(Error::generic("Guest is waiting for an incoming migration"));
        }
        RunState::Postmigrate => {
            let text = "Can't migrate the vm that was paused due to previous migration";
            return Err(Error::generic(text));
        }
        _ => {}
    }
    let now = machine.migration.status;
    machine.migration.error = None;
    machine.migration.ram = Ram { total: qemu.memory << 20, ..Ram::default() };
    machine.migration.times = Times { begun: Some(Instant::now()), ..Times::default() };
    machine.migration.vm_was_running = false;
    qemu.set_status(machine, now, Status::Setup);
    if machine.migration.in_hand {
        return Err(Error::generic("duplicate yank instance"));
    }
    let Some(path) = uri.strip_prefix("unix:") else {
        qemu.set_status(machine, Status::Setup, Status::Failed);
        return Err(Error::generic("Parameter 'uri' expects a valid migration protocol"));
    };
    machine.migration.in_hand = true;
    let (qemu, path) = (qemu.clone(), path.to_owned());
    std::thread::spawn(move || run(&qemu, &path));
    Ok(())
}

/// `migrate_cancel`.
pub fn cancel(qemu: &Qemu, machine: &mut Machine) {
    let status = machine.migration.status;
    if !status.is_running() {
        return;
    }
    if status == Status::PreSwitchover {
        machine.migration.release();
    }
    qemu.set_status(machine, status, Status::Cancelling);
    qemu.streams.cut();
    if machine.migration.block_inactive {
        activate(qemu, &mut machine.migration);
    }
}

fn activate(qemu: &Qemu, migration: &mut Migration) {
    match lock(&qemu.graph).activate() {
        Ok(()) => migration.block_inactive = false,
        Err(error) => eprintln!("stub-qemu: {error}"),
    }
}

fn run(qemu: &Qemu, path: &str) {
    let channels = {
        let machine = qemu.lock();
        let multifd = machine.migration.has("multifd");
        if multifd { machine.migration.number("multifd-channels") } else { 0 }
    };
    match Link::open(path, channels) {
        Ok(link) => Outgoing { qemu, link, window: (Instant::now(), 0) }.run(),
        Err(error) => {
            let mut machine = qemu.lock();
            eprintln!("stub-qemu: {error}");
            machine.migration.error = Some(error.to_string());
            qemu.set_status(&mut machine, Status::Setup, Status::Failed);
            clean_up(qemu, &mut machine);
        }
    }
}

/// What QEMU does last, whatever came before.
fn clean_up(qemu: &Qemu, machine: &mut Machine) {
    qemu.streams.set(Vec::new());
    machine.migration.in_hand = false;
    qemu.set_status(machine, Status::Cancelling, Status::Cancelled);
}

/// The connections.
struct Link {
    main: UnixStream,
    channels: Vec<UnixStream>,
    next: usize,
}

impl Link {
    fn open(path: &str, channels: u64) -> Result<Self, Error> {
        let main = connect(path)?;
        let channels = (0..channels).map(|_| connect(path)).collect::<Result<_, _>>()?;
        Ok(Self { main, channels, next: 0 })
    }

    /// Sends a frame over the main connection; tells how many bytes that took.
    fn send(&mut self, frame: &Frame) -> io::Result<u64> {
        let bytes = frame.encode();
        self.main.write_all(&bytes)?;
        Ok(bytes.len() as u64)
    }

    fn send_pages(&mut self, pages: Vec<Page>) -> io::Result<u64> {
        let frame = Frame::Pages(pages);
        if self.channels.is_empty() {
            return self.send(&frame);
        }
        let bytes = frame.encode();
        let channel = self.next % self.channels.len();
        self.next += 1;
        self.channels[channel].write_all(&bytes)?;
        Ok(bytes.len() as u64)
    }

    fn sync(&mut self) -> io::Result<u64> {
        for channel in &mut self.channels {
            channel.write_all(&Frame::Sync.encode())?;
        }
        self.send(&Frame::Sync)
    }

    /// Whether the peer has left one of the memory channels.
    fn has_lost_a_channel(&self) -> bool {
        let flags = PollFlags::HUP | PollFlags::RDHUP;
        let mut fds: Vec<_> =
            self.channels.iter().map(|channel| PollFd::new(channel, flags)).collect();
        poll(&mut fds, Some(&Timespec::default())).is_ok_and(|n| n > 0)
    }
}

struct Outgoing<'a> {
    qemu: &'a Qemu,
    link: Link,
    /// When the window began, and the bytes sent in it.
    window: (Instant, u64),
}

impl<'a> Outgoing<'a> {
    fn run(mut self) {
        let qemu = self.qemu;
        let streams = std::iter::once(&self.link.main).chain(&self.link.channels);
        qemu.streams.set(streams.filter_map(|stream| stream.try_clone().ok()).collect());
        qemu.guest.with(|guest| guest.ram.log());
        let greeted = self.greet();
        let mut machine = qemu.lock();
        self.pass(&mut machine);
        match greeted {
            Ok(()) => qemu.set_status(&mut machine, Status::Setup, Status::Active),
            Err(error) => self.failed(&mut machine, &error, Status::Setup),
        };
        let limit = machine.migration.number("downtime-limit");
        let times = &mut machine.migration.times;
        times.setup = times.begun.map_or(Duration::ZERO, |begun| begun.elapsed());
        times.expected = Duration::from_millis(limit);
        while machine.migration.status == Status::Active {
            drop(machine);
            let switch = self.iterate();
            machine = qemu.lock();
            if switch {
                machine = self.complete(machine);
                break;
            }
            machine = self.keep_rate(machine);
        }
        // N.B. the status changes before the machine does, in QEMU too: for a moment `completed`
        // or `failed` is true and `cont` is refused.
        machine = self.qemu.wait(machine, GAP);
        self.finish(&mut machine);
    }

    fn greet(&mut self) -> io::Result<()> {
        let return_path = self.qemu.lock().migration.has("return-path");
        let channels = self.link.channels.len() as u64;
        let memory = [self.qemu.asked_memory, self.qemu.memory];
        let header = Header { memory, channels, return_path };
        self.link.main.write_all(&MAGIC)?;
        for channel in &mut self.link.channels {
            channel.write_all(&CHANNEL)?;
        }
        self.link.send(&Frame::Header(header)).map(drop)
    }

    /// A new pass over the memory begins.
    fn pass(&self, machine: &mut Machine) {
        machine.migration.ram.passes += 1;
        if machine.migration.has("events") {
            let data = json!({"pass": machine.migration.ram.passes});
            self.qemu.monitors.event("MIGRATION_PASS", Some(data));
        }
    }

    /// A connection is gone.
    fn failed(&self, machine: &mut Machine, error: &io::Error, from: Status) -> bool {
        let holds = self.qemu.set_status(machine, from, Status::Failed);
        if holds {
            let text = format!("Unable to write to socket: {}", reason(error));
            eprintln!("stub-qemu: {text}");
            machine.migration.error = Some(text);
        }
        holds
    }

    /// Sends some pages; true when the time for the switchover has come.
    fn iterate(&mut self) -> bool {
        let most = {
            let limit = self.qemu.lock().migration.number("max-bandwidth");
            // Small portions at a small rate.
            if limit == 0 { BATCH } else { (limit / 10 / PAGE as u64).clamp(1, BATCH) }
        };
        let (pages, left) = self.qemu.guest.with(move |guest| guest.ram.take(most as usize));
        match self.send(pages, left).and_then(|()| if left == 0 { self.link.sync() } else { Ok(0) })
        {
            Ok(_) if left > 0 => false,
            Ok(_) => self.converged(),
            Err(error) => {
                self.failed(&mut self.qemu.lock(), &error, Status::Active);
                false
            }
        }
    }

    fn send(&mut self, pages: Vec<Page>, left: usize) -> io::Result<()> {
        let zero = pages.iter().filter(|page| page.bytes.is_none()).count() as u64;
        let normal = pages.len() as u64 - zero;
        let bytes = if pages.is_empty() { 0 } else { self.link.send_pages(pages)? };
        self.window.1 += bytes;
        let multifd = if self.link.channels.is_empty() { 0 } else { bytes };
        let ram = &mut self.qemu.lock().migration.ram;
        ram.count(normal, zero, bytes, multifd, left);
        ram.precopy += bytes - multifd;
        Ok(())
    }

    /// After a pass: whether what is left fits the allowed downtime.
    fn converged(&mut self) -> bool {
        let left = self.qemu.guest.with(|guest| guest.ram.sync());
        let mut machine = self.qemu.lock();
        self.pass(&mut machine);
        let limit = machine.migration.number("downtime-limit") as f64 / 1e3;
        let migration = &mut machine.migration;
        let passed = migration.times.begun.map_or(Duration::ZERO, |begun| begun.elapsed());
        let bandwidth = migration.ram.transferred as f64 / passed.as_secs_f64().max(1e-6);
        let bytes = (left * PAGE) as f64;
        migration.ram.left = bytes as u64;
        migration.ram.dirty_rate = (left as f64 / passed.as_secs_f64().max(1e-3)) as u64;
        migration.times.expected = Duration::from_secs_f64((bytes / bandwidth.max(1.0)).min(1e6));
        bytes <= bandwidth * limit
    }

    /// Waits while more was sent than the rate allows.
    fn keep_rate(&mut self, mut machine: Guard<'a>) -> Guard<'a> {
        loop {
            let limit = machine.migration.number("max-bandwidth");
            let over = limit > 0 && self.window.1 >= limit.div_ceil(10);
            let left = WINDOW.saturating_sub(self.window.0.elapsed());
            if left.is_zero() {
                self.window = (Instant::now(), 0);
                return machine;
            }
            if !over || machine.migration.status != Status::Active {
                return machine;
            }
            machine = self.qemu.wait(machine, left);
        }
    }

    /// The switchover.
    fn complete(&mut self, mut machine: Guard<'a>) -> Guard<'a> {
        let qemu = self.qemu;
        if machine.migration.status != Status::Active {
            return machine;
        }
        let before = machine.state;
        machine.migration.times.stopped = Some(Instant::now());
        machine.migration.vm_was_running = before == RunState::Running;
        qemu.stop(&mut machine, RunState::FinishMigrate);
        machine.state = RunState::FinishMigrate;
        let mut current = Status::Active;
        let mut good = true;
        if machine.migration.has("pause-before-switchover") {
            machine.migration.posts = 0;
            if machine.migration.status != Status::Cancelling {
                qemu.set_status(&mut machine, Status::Active, Status::PreSwitchover);
                machine = self.hold(machine);
                qemu.set_status(&mut machine, Status::PreSwitchover, Status::Device);
                current = Status::Device;
            }
            good = machine.migration.status == Status::Device;
        }
        // N.B. under the big lock: a stalled link stalls QMP too, as in QEMU.
        good = good && self.save(&mut machine, before).is_ok();
        if good && machine.migration.has("return-path") {
            drop(machine);
            let mut last_word = [0];
            good = self.link.main.read_exact(&mut last_word).is_ok();
            machine = qemu.lock();
        }
        if good {
            qemu.set_status(&mut machine, current, Status::Completed);
            return machine;
        }
        let status = machine.migration.status;
        if machine.migration.block_inactive && matches!(status, Status::Active | Status::Device) {
            activate(qemu, &mut machine.migration);
        }
        qemu.set_status(&mut machine, current, Status::Failed);
        machine
    }

    /// Waits for `migrate-continue` or `migrate_cancel`.
    fn hold(&self, mut machine: Guard<'a>) -> Guard<'a> {
        let stuck = std::env::var_os("STUB_QEMU_MULTIFD_STUCK").is_some_and(|value| value == "1");
        let glances = stuck && !self.link.channels.is_empty();
        while machine.migration.posts == 0 {
            machine = self.qemu.wait(machine, if glances { GLANCE } else { FOR_EVER });
            let waits = machine.migration.status == Status::PreSwitchover;
            if glances && waits && self.link.has_lost_a_channel() {
                // What a memory channel's thread does in QEMU, now and then: it changes the
                // status, but wakes nobody.
                let error = io::Error::from(rustix::io::Errno::CONNRESET);
                self.failed(&mut machine, &error, Status::PreSwitchover);
            }
        }
        machine.migration.posts -= 1;
        machine
    }

    /// Sends all that is left, and gives the images away.
    fn save(&mut self, machine: &mut Machine, before: RunState) -> io::Result<()> {
        self.pass(machine);
        self.qemu.guest.with(|guest| guest.ram.sync());
        loop {
            let (pages, left) = self.qemu.guest.with(|guest| guest.ram.take(BATCH as usize));
            if pages.is_empty() {
                break;
            }
            let zero = pages.iter().filter(|page| page.bytes.is_none()).count() as u64;
            let normal = pages.len() as u64 - zero;
            let bytes = self.link.send_pages(pages)?;
            let multifd = if self.link.channels.is_empty() { 0 } else { bytes };
            machine.migration.ram.count(normal, zero, bytes, multifd, left);
            machine.migration.ram.downtime += bytes - multifd;
        }
        self.link.sync()?;
        let disks = lock(&self.qemu.graph).disks();
        let guest = self.qemu.guest.with(|guest| guest.save());
        let device = Device { disks, state: before.name().to_owned(), guest };
        let bytes = self.link.send(&Frame::Device(device))?;
        machine.migration.ram.transferred += bytes;
        machine.migration.ram.downtime += bytes;
        // N.B. before the last word: the target takes the images when it has heard it.
        lock(&self.qemu.graph).inactivate();
        machine.migration.block_inactive = true;
        self.link.send(&Frame::End).map(drop)
    }

    /// What becomes of the guest here.
    fn finish(&mut self, machine: &mut Machine) {
        self.qemu.guest.with(|guest| guest.ram.unlog());
        let times = &mut machine.migration.times;
        let since = |begin: Option<Instant>| begin.map_or(Duration::ZERO, |begin| begin.elapsed());
        times.total = since(times.begun);
        times.downtime = since(times.stopped);
        let stopped = machine.state == RunState::FinishMigrate;
        match machine.migration.status {
            Status::Completed => machine.state = RunState::Postmigrate,
            Status::Failed | Status::Cancelled | Status::Cancelling if stopped => {
                match machine.migration.vm_was_running {
                    true => self.qemu.start(machine),
                    false => machine.state = RunState::Postmigrate,
                }
            }
            Status::Failed | Status::Cancelled | Status::Cancelling => {}
            // A `migrate` came too early: QEMU forgets the guest, too.
            status => eprintln!("stub-qemu: Unknown ending state {}", status.name()),
        }
        clean_up(self.qemu, machine);
    }
}

impl Ram {
    fn count(&mut self, normal: u64, zero: u64, bytes: u64, multifd: u64, left: usize) {
        self.normal += normal;
        self.zero += zero;
        self.transferred += bytes;
        self.multifd += multifd;
        self.left = (left * PAGE) as u64;
    }
}
