//! The ledger's promises, on a real file system: one winner per swap, nothing
//! acknowledged is lost, and what cannot be understood is never overwritten.

use handler::Handler;
use handler::ledger::{Error, Ledger};
use handover::ledger::{Request, Response};
use handover::record::{Move, Record, Refused, State, Swap, VmId, apply};
use std::error::Error as _;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Barrier;

/// Set in the processes that this test starts: the folder of the host.
const HOST: &str = "GODWIT_TEST_HOST";

fn vm() -> VmId {
    "web".into()
}

/// Takes the epoch after `seen`, or the next one whatever it is.
fn start(
    ledger: &Ledger,
    instance: &str,
    seen: Option<u64>,
) -> Result<Result<Record, Refused>, Error> {
    let change = Swap::Start { seen, instance: instance.into(), forced: false };
    ledger.swap(&vm(), |current| apply(&vm(), current, &change))
}

fn epoch(ledger: &Ledger) -> Option<u64> {
    ledger.read(&vm()).unwrap().map(|record| record.epoch)
}

/// The error and all its causes.
fn told(error: &Error) -> String {
    let cause = error.source().map(|cause| format!(": {cause}"));
    format!("{error}{}", cause.unwrap_or_default())
}

#[test]
fn of_swaps_that_saw_the_same_record_one_wins() {
    let host = tempfile::tempdir().unwrap();
    // Two descriptors of the ledger, as two processes would have them.
    let ledgers = [Ledger::open(host.path()).unwrap(), Ledger::open(host.path()).unwrap()];
    let (threads, rounds) = (8, 20);
    let together = Barrier::new(threads);
    let wins: usize = std::thread::scope(|scope| {
        let runs: Vec<_> = (0..threads)
            .map(|thread| {
                let (ledger, together) = (&ledgers[thread % 2], &together);
                scope.spawn(move || {
                    let mut wins = 0;
                    for _ in 0..rounds {
                        together.wait();
                        let seen = epoch(ledger);
                        together.wait();
                        wins += usize::from(
                            start(ledger, &format!("i{thread}"), seen).unwrap().is_ok(),
                        );
                    }
                    wins
                })
            })
            .collect();
        runs.into_iter().map(|run| run.join().unwrap()).sum()
    });
    assert_eq!(wins, rounds);
    assert_eq!(epoch(&ledgers[0]), Some(rounds as u64));
}

#[test]
fn a_record_outlives_the_ledger_that_wrote_it() {
    let host = tempfile::tempdir().unwrap();
    let written = start(&Ledger::open(host.path()).unwrap(), "i", None).unwrap().unwrap();
    assert_eq!(Ledger::open(host.path()).unwrap().read(&vm()).unwrap(), Some(written));
}

#[test]
fn an_heir_gives_back_unless_the_other_end_was_told_that_it_has_the_vm() {
    for told in [false, true] {
        let host = tempfile::tempdir().unwrap();
        let of = Move { attempt: "a".into(), heir: "heir".into(), peer: "spiffe://east".into() };
        let swap = |change: Swap| Request::Swap { vm: vm(), change };
        let relinquish = |adopted: Option<&str>| {
            swap(Swap::Relinquish {
                epoch: 1,
                source: "source".into(),
                attempt: "a".into(),
                peer: "spiffe://east".into(),
                adopted: adopted.map(Into::into),
                has_guest: true,
            })
        };
        let handler = Handler::open(host.path()).unwrap();
        let expect = Swap::Expect { epoch: 1, source: "source".into(), from: of };
        let adopt = Swap::Adopt { epoch: 1, instance: "heir".into() };
        for change in [expect, adopt] {
            let answer = handler.local(&swap(change));
            assert!(matches!(answer, Response::Done { .. }), "{answer:?}");
        }
        if told {
            let answer = handler.peer(&"spiffe://east".into(), &relinquish(None));
            assert!(matches!(answer, Response::Refused { .. }), "{answer:?}");
        }
        drop(handler);
        // That outlives whoever was asked.
        let handler = Handler::open(host.path()).unwrap();
        let answer = handler.local(&relinquish(Some("heir")));
        assert_eq!(matches!(answer, Response::Refused { .. }), told, "{answer:?}");
        assert_eq!(matches!(answer, Response::Done { .. }), !told, "{answer:?}");
    }
}

#[test]
fn what_cannot_be_understood_is_named_and_never_overwritten() {
    let newer = br#"{"format":2,"record":{"future":true}}"#;
    let other = br#"{"format":1,"record":{"vm":"db","epoch":3,"owner":"i","state":"idle"}}"#;
    let half = &other[..other.len() / 2];
    let large = vec![b' '; 1 << 20];
    let contents: [(&[u8], &str); 7] = [
        (b"", "EOF"),
        (half, "EOF"),
        (b"\xff\xfe{}", "expected value"),
        (b"[1, 2]", "format null"),
        (newer, "format 2"),
        (other, "the record of db"),
        (&large, "EOF"),
    ];
    for (content, why) in contents {
        let host = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(host.path()).unwrap();
        let file = host.path().join("ledger/web.json");
        std::fs::write(&file, content).unwrap();
        for error in [ledger.read(&vm()).unwrap_err(), start(&ledger, "i", None).unwrap_err()] {
            let told = told(&error);
            assert!(told.contains(file.to_str().unwrap()) && told.contains(why), "{told}");
        }
        assert_eq!(std::fs::read(&file).unwrap(), content);
    }
}

#[test]
fn what_is_no_regular_file_is_refused() {
    let host = tempfile::tempdir().unwrap();
    let ledger = Ledger::open(host.path()).unwrap();
    let file = host.path().join("ledger/web.json");
    let elsewhere = host.path().join("elsewhere.json");
    start(&ledger, "i", None).unwrap().unwrap();
    std::fs::rename(&file, &elsewhere).unwrap();
    let before = std::fs::read(&elsewhere).unwrap();
    let refused = |ledger: &Ledger| {
        let error = start(ledger, "j", Some(1)).unwrap_err();
        assert!(matches!(error, Error::Broken { .. }), "{error}");
        assert!(told(&error).contains("web.json"));
    };

    symlink(&elsewhere, &file).unwrap();
    refused(&ledger);
    std::fs::remove_file(&file).unwrap();
    std::fs::create_dir(&file).unwrap();
    refused(&ledger);
    std::fs::remove_dir(&file).unwrap();
    // Nobody will ever write into it: who waits for that waits for ever.
    let made = Command::new("mkfifo").arg(&file).status().unwrap();
    assert!(made.success());
    refused(&ledger);

    assert_eq!(std::fs::read(&elsewhere).unwrap(), before);
    let other = tempfile::tempdir().unwrap();
    symlink(host.path().join("ledger"), other.path().join("ledger")).unwrap();
    assert!(Ledger::open(other.path()).is_err());
}

#[test]
fn names_that_lead_out_of_the_ledger_are_refused() {
    let host = tempfile::tempdir().unwrap();
    let ledger = Ledger::open(host.path()).unwrap();
    let long = "a".repeat(64);
    for name in ["", ".", "..", "../x", "a/b", "/etc/passwd", "-rf", "A", "a b", "a\0b", &long] {
        let error = ledger.read(&name.into()).unwrap_err();
        assert!(matches!(error, Error::Name(_)), "{name}: {error}");
        let swapped = ledger.swap(&name.into(), |_| unreachable!("the name is checked first"));
        assert!(swapped.is_err());
    }
    assert!(ledger.read(&"web-1.example".into()).unwrap().is_none());
}

#[test]
fn a_draft_that_cannot_be_written_leaves_the_record_as_it_was() {
    let host = tempfile::tempdir().unwrap();
    let ledger = Ledger::open(host.path()).unwrap();
    start(&ledger, "i", None).unwrap().unwrap();
    let draft = host.path().join("ledger/web.new");

    std::fs::create_dir(&draft).unwrap();
    let error = start(&ledger, "j", Some(1)).unwrap_err();
    assert!(told(&error).contains("cannot write the owner record of web"), "{error}");
    assert_eq!(epoch(&ledger), Some(1));
    std::fs::remove_dir(&draft).unwrap();

    // What lies at the draft's place is not followed to somebody else's file.
    let victim = host.path().join("victim");
    std::fs::write(&victim, "precious").unwrap();
    symlink(&victim, &draft).unwrap();
    start(&ledger, "j", Some(1)).unwrap_err();
    assert_eq!(std::fs::read_to_string(&victim).unwrap(), "precious");
    std::fs::remove_file(&draft).unwrap();

    // A draft of a writer that was killed is nobody's truth.
    std::fs::write(&draft, "half a rec").unwrap();
    assert_eq!(start(&ledger, "j", Some(1)).unwrap().unwrap().state, State::Idle);
    assert_eq!(epoch(&ledger), Some(2));
}

#[test]
fn a_full_disk_leaves_the_record_as_it_was() {
    const NAME: &str = "a_full_disk_leaves_the_record_as_it_was";
    if let Some(host) = std::env::var_os(HOST) {
        let error = start(&Ledger::open(Path::new(&host)).unwrap(), "j", Some(1)).unwrap_err();
        println!("\n{}", told(&error));
        return;
    }
    let host = tempfile::tempdir().unwrap();
    let ledger = Ledger::open(host.path()).unwrap();
    start(&ledger, "i", None).unwrap().unwrap();

    // No file may grow in a shell with that limit, nor in what it becomes.
    let mut child = Command::new("sh");
    child.args(["-c", r#"trap "" XFSZ; ulimit -f 0; exec "$@""#, "sh"]);
    let output = child.args(again(NAME)).env(HOST, host.path()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("cannot write the owner record of web"), "{said}");

    assert_eq!(epoch(&ledger), Some(1));
    assert!(!host.path().join("ledger/web.new").exists());
}

#[test]
fn a_killed_writer_loses_no_acknowledged_record() {
    const NAME: &str = "a_killed_writer_loses_no_acknowledged_record";
    if let Some(host) = std::env::var_os(HOST) {
        write_until_killed(&Ledger::open(Path::new(&host)).unwrap());
    }
    let host = tempfile::tempdir().unwrap();
    let ledger = Ledger::open(host.path()).unwrap();
    let mut before = 0;
    for round in 0..8 {
        let [program, arguments @ ..] = again(NAME);
        let mut child = Command::new(program)
            .args(arguments)
            .env(HOST, host.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut acknowledged = lines.map_while(Result::ok).filter_map(|line| line.parse().ok());
        // Killed after some answers, at no moment of our choosing.
        let mut last = acknowledged.nth(round * 3).unwrap();
        child.kill().unwrap();
        last = acknowledged.last().unwrap_or(last);
        child.wait().unwrap();

        let now = epoch(&ledger).unwrap();
        assert!(before < last, "it went on where the one before it was killed");
        assert!(now == last || now == last + 1, "{last} was acknowledged, {now} is written");
        before = now;
    }
}

/// This program with nothing but one test, which speaks to its standard output.
fn again(test: &str) -> [OsString; 4] {
    let program = std::env::current_exe().unwrap().into_os_string();
    [program, "--exact".into(), test.into(), "--nocapture".into()]
}

fn write_until_killed(ledger: &Ledger) -> ! {
    loop {
        let record = start(ledger, "i", epoch(ledger)).unwrap().unwrap();
        let mut out = std::io::stdout().lock();
        writeln!(out, "\n{}", record.epoch).unwrap();
        out.flush().unwrap();
    }
}
