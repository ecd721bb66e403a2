//! The watch on processes, with real ones, and what a handler makes of it.

use handler::Handler;
use handler::watch::Watch;
use handover::handler::Qemu;
use handover::ledger::{self, Request, Response};
use handover::record::{HostId, InstanceId, Move, Record, State, Swap, VmId};
use launcher::qemu::{pid_namespace, start_time};
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
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

    /// As its launcher names it.
    fn named(&self) -> ledger::Process {
        let start_time = start_time(self.pid()).unwrap();
        ledger::Process { pid: self.pid(), start_time, namespace: pid_namespace(None) }
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
    watch.add(&instance(), &qemu.named()).unwrap();
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
    let later = ledger::Process { start_time: qemu.named().start_time - 1, ..qemu.named() };
    watch.add(&instance(), &later).unwrap();
    assert_eq!(watch.qemu_of(&instance()), Qemu::Ended);
    for nonsense in [0, u32::MAX] {
        let process = ledger::Process { pid: nonsense, start_time: 1, namespace: None };
        watch.add(&instance(), &process).unwrap_err();
    }
}

/// A process in a namespace of process ids of its own, as in a pod; and as who is with it names it.
fn in_a_pod() -> (Process, ledger::Process) {
    let mut unshare = Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        unshare.args(["--user", "--map-root-user"]);
    }
    let tell = "sleep 1000 & echo $! $(cut -d' ' -f22 /proc/$!/stat) $(stat -Lc %i /proc/self/ns/pid); wait";
    unshare.args(["--pid", "--mount-proc", "--fork", "--kill-child", "sh", "-c", tell]);
    let mut pod = Process(unshare.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap());
    let mut line = String::new();
    BufReader::new(pod.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let numbers: Vec<u64> = line.split_whitespace().map(|word| word.parse().unwrap()).collect();
    let [pid, start_time, namespace] = numbers[..] else { panic!("{line}") };
    let pid = pid.try_into().unwrap();
    (pod, ledger::Process { pid, start_time, namespace: Some(namespace) })
}

#[test]
fn a_process_of_a_pod_is_held_though_it_has_another_id_there() {
    let host = tempfile::tempdir().unwrap();
    let watch = Watch::open(host.path()).unwrap();
    let (mut pod, named) = in_a_pod();
    watch.add(&instance(), &named).unwrap();
    assert_eq!(watch.qemu_of(&instance()), Qemu::Alive);
    assert_eq!(Watch::open(host.path()).unwrap().qemu_of(&instance()), Qemu::Alive);
    pod.kill();
    while watch.qemu_of(&instance()) == Qemu::Alive {
        std::thread::yield_now();
    }
    assert_eq!(watch.qemu_of(&instance()), Qemu::Ended);
}

#[test]
fn a_process_that_is_not_seen_is_not_said_to_have_ended() {
    let host = tempfile::tempdir().unwrap();
    let watch = Watch::open(host.path()).unwrap();
    let (_pod, named) = in_a_pod();
    let elsewhere = ledger::Process { namespace: Some(1), ..named.clone() };
    let another = ledger::Process { start_time: named.start_time - 1, ..named };
    for unseen in [elsewhere, another] {
        let why = watch.add(&instance(), &unseen).unwrap_err().to_string();
        assert!(why.contains("hostPID"), "{why}");
        assert_eq!(watch.qemu_of(&instance()), Qemu::Unknown);
    }
}

#[test]
fn the_process_that_was_named_last_stands_for_the_instance() {
    let host = tempfile::tempdir().unwrap();
    let watch = Watch::open(host.path()).unwrap();
    let (launcher, mut qemu) = (Process::begin(), Process::begin());
    watch.add(&instance(), &launcher.named()).unwrap();
    watch.add(&instance(), &qemu.named()).unwrap();
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
        watch.add(&"lives".into(), &lives.named()).unwrap();
        watch.add(&"ends".into(), &ends.named()).unwrap();
    }
    // It was killed while it wrote, and there is a line of before the reboot.
    let mut list = OpenOptions::new().append(true).open(host.path().join("watched")).unwrap();
    let ledger::Process { pid, start_time, .. } = lives.named();
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
    let watched = handler.local(&Request::Watch { instance: instance(), process: qemu.named() });
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
