//! The watch on processes, with real ones, and what a handler makes of it.

use handler::Handler;
use handler::watch::Watch;
use handover::handler::Qemu;
use handover::ledger::{Request, Response};
use handover::record::{HostId, InstanceId, Move, Record, State, Swap, VmId};
use launcher::qemu::start_time;
use std::fs::OpenOptions;
use std::io::Write;
use std::process::{Child, Command, Stdio};

/// A process that stands for QEMU; it does not outlive the test.
struct Process(Child);

impl Process {
    fn begin() -> Self {
        // It ends by itself when this side of its input is gone.
        Self(Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap())
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }

    fn began(&self) -> u64 {
        start_time(self.pid()).unwrap()
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn instance() -> InstanceId {
    "source".into()
}

fn vm() -> VmId {
    "web".into()
}

#[test]
fn the_end_of_a_process_is_seen_even_before_it_is_reaped() {
    let host = tempfile::tempdir().unwrap();
    let watch = Watch::open(host.path()).unwrap();
    let mut qemu = Process::begin();
    assert_eq!(watch.qemu_of(&instance()), Qemu::Unknown);
    watch.add(&instance(), qemu.pid(), qemu.began()).unwrap();
    assert_eq!(watch.qemu_of(&instance()), Qemu::Alive);
    assert_eq!(watch.qemu_of(&"another".into()), Qemu::Unknown);

    qemu.0.kill().unwrap();
    // A killed process that nobody has waited for yet is a zombie: it runs no guest.
    while watch.qemu_of(&instance()) == Qemu::Alive {
        std::thread::yield_now();
    }
    assert_eq!(watch.qemu_of(&instance()), Qemu::Ended);
}

#[test]
fn a_process_with_a_reused_id_is_not_taken_for_the_one_meant() {
    let host = tempfile::tempdir().unwrap();
    let watch = Watch::open(host.path()).unwrap();
    let qemu = Process::begin();
    watch.add(&instance(), qemu.pid(), qemu.began() - 1).unwrap();
    assert_eq!(watch.qemu_of(&instance()), Qemu::Ended);
    for nonsense in [0, u32::MAX] {
        watch.add(&instance(), nonsense, 1).unwrap_err();
    }
}

#[test]
fn the_process_that_was_named_last_stands_for_the_instance() {
    let host = tempfile::tempdir().unwrap();
    let watch = Watch::open(host.path()).unwrap();
    let (launcher, mut qemu) = (Process::begin(), Process::begin());
    watch.add(&instance(), launcher.pid(), launcher.began()).unwrap();
    watch.add(&instance(), qemu.pid(), qemu.began()).unwrap();
    qemu.kill();
    assert_eq!(watch.qemu_of(&instance()), Qemu::Ended);
    assert_eq!(Watch::open(host.path()).unwrap().qemu_of(&instance()), Qemu::Ended);
}

#[test]
fn a_handler_that_starts_again_knows_what_it_knew() {
    let host = tempfile::tempdir().unwrap();
    let (lives, mut ends) = (Process::begin(), Process::begin());
    {
        let watch = Watch::open(host.path()).unwrap();
        watch.add(&"lives".into(), lives.pid(), lives.began()).unwrap();
        watch.add(&"ends".into(), ends.pid(), ends.began()).unwrap();
    }
    // It was killed while it wrote, and there is a line of before the reboot.
    let mut list = OpenOptions::new().append(true).open(host.path().join("watched")).unwrap();
    let (pid, start_time) = (lives.pid(), lives.began());
    let line = |boot: &str| {
        format!(r#"{{"instance":"old","pid":{pid},"start_time":{start_time},"boot":"{boot}"}}"#)
    };
    writeln!(list, "{}\n{}", line("before"), &line("cut")[..20]).unwrap();
    ends.kill();

    let watch = Watch::open(host.path()).unwrap();
    assert_eq!(watch.qemu_of(&"lives".into()), Qemu::Alive);
    assert_eq!(watch.qemu_of(&"ends".into()), Qemu::Ended);
    assert_eq!(watch.qemu_of(&"old".into()), Qemu::Ended);
}

#[test]
fn a_vm_is_not_started_again_while_its_qemu_lives() {
    let host = tempfile::tempdir().unwrap();
    let handler = Handler::open(host.path()).unwrap();
    let mut qemu = Process::begin();
    started(&handler, &qemu);
    let start = |forced| Swap::Start { seen: Some(1), instance: "second".into(), forced };
    assert!(matches!(handler.local(&swap(start(false))), Response::Refused { .. }));
    assert!(matches!(handler.local(&swap(start(true))), Response::Refused { .. }));
    qemu.kill();
    assert_eq!(done(handler.local(&swap(start(false)))).epoch, 2);
}

#[test]
fn a_guest_whose_source_ended_is_given_to_the_target_that_asks() {
    for ended in [false, true] {
        let host = tempfile::tempdir().unwrap();
        let handler = Handler::open(host.path()).unwrap();
        let mut qemu = Process::begin();
        started(&handler, &qemu);
        let to = Move { attempt: "a".into(), heir: "target".into(), peer: "west".into() };
        let arm = Swap::Arm { epoch: 1, owner: instance(), to: to.clone() };
        done(handler.local(&swap(arm)));
        if ended {
            qemu.kill();
        }

        let abort = swap(Swap::Abort { epoch: 1, attempt: "a".into() });
        let stranger: HostId = "east".into();
        assert!(matches!(handler.peer(&stranger, &abort), Response::Refused { .. }));
        let read = Request::Read { vm: vm() };
        assert!(matches!(handler.peer(&"west".into(), &read), Response::Failed { .. }));

        let record = done(handler.peer(&"west".into(), &abort));
        let expected = if ended { State::Committed(to) } else { State::Idle };
        assert_eq!(record.state, expected);
    }
}

fn started(handler: &Handler, qemu: &Process) {
    done(handler.local(&swap(Swap::Start { seen: None, instance: instance(), forced: false })));
    let (pid, start_time) = (qemu.pid(), qemu.began());
    let watched = handler.local(&Request::Watch { instance: instance(), pid, start_time });
    assert_eq!(watched, Response::Watching);
}

fn swap(change: Swap) -> Request {
    Request::Swap { vm: vm(), change }
}

fn done(response: Response) -> Record {
    match response {
        Response::Done { record } => record,
        other => panic!("{other:?}"),
    }
}
