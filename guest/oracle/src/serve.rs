//! `oracle serve`: reads commands, keeps one worker per job, answers.

use std::collections::BTreeMap;
use std::io::{self, BufRead, Read};
use std::time::{Duration, Instant};

use crate::dirty::{DirtyDisk, DirtyMemory};
use crate::memory::Memory;
use crate::output::Output;
use crate::protocol::{Check, Command, MAX_LINE, Range, Report, Write};
use crate::ticker::Ticker;
use crate::worker::{Task, Worker};
use crate::writer::{self, Writer};

/// Which job a worker does. A new one of the same kind replaces the old.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Job {
    Tick,
    Write(u64),
    Memory,
    DirtyMemory,
    DirtyDisk,
}

struct Serve {
    began: Instant,
    output: Output,
    workers: BTreeMap<Job, Worker>,
}

/// A command reports its own answer, unless it fails: then the reason is it.
type Outcome = Result<(), Failure>;

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Writer(#[from] writer::Error),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Serves the commands of `input` until `quit` or its end; reports to `sink`.
///
/// # Errors
/// When `input` cannot be read.
pub fn serve(input: &mut impl BufRead, sink: impl io::Write + Send + 'static) -> io::Result<()> {
    let (output, written) = Output::start(sink);
    let mut serve = Serve { began: Instant::now(), output, workers: BTreeMap::new() };
    serve.output.report(Report::Ready);
    while let Some(line) = read_line(input)? {
        if line.trim().is_empty() {
            continue;
        }
        let quit = serve.answer(&line);
        if quit {
            break;
        }
    }
    // The workers and then the last handle go, so that the writer ends after
    // its last line.
    drop(serve);
    let _ = written.join();
    Ok(())
}

/// The next line, cut off at [`MAX_LINE`]; `None` at the end.
fn read_line(input: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut line = Vec::new();
    input.take(MAX_LINE as u64).read_until(b'\n', &mut line)?;
    Ok((!line.is_empty()).then(|| String::from_utf8_lossy(&line).into_owned()))
}

impl Serve {
    /// Carries out one line and reports; tells whether it was the last.
    fn answer(&mut self, line: &str) -> bool {
        let command = match line.parse::<Command>() {
            Ok(command) => command,
            Err(error) => {
                self.output.report(Report::Err(error.to_string()));
                return false;
            }
        };
        let quit = command == Command::Quit;
        if let Err(error) = self.run(command) {
            self.output.report(Report::Err(error.to_string()));
        }
        quit
    }

    fn run(&mut self, command: Command) -> Outcome {
        match command {
            Command::Ping => self.say(Report::Pong),
            Command::Quit => {
                self.workers.clear();
                self.say(Report::Bye)
            }
            Command::Status => self.status(),
            Command::Check => self.check(),
            Command::TickStart { us } => self.tick(us),
            Command::TickStop => self.stop(&[Job::Tick], "tick stop"),
            Command::WriteStart(options) => self.write(options),
            Command::WriteStop { id } => self.stop(&[Job::Write(id)], "write stop"),
            Command::MemoryStart { mib, rate } => self.memory(mib, rate),
            Command::MemoryStop => self.stop(&[Job::Memory], "memory stop"),
            Command::DirtyMemory { mib, mibps } => self.dirty_memory(mib, mibps),
            Command::DirtyDisk { range, mibps } => self.dirty_disk(&range, mibps),
            Command::DirtyStop => self.dirty_stop(),
        }
    }

    fn tick(&mut self, us: u64) -> Outcome {
        let ticker = Ticker::new(Duration::from_micros(us), self.began, self.output.clone());
        self.start(Job::Tick, "tick start", ticker)
    }

    fn write(&mut self, options: Write) -> Outcome {
        let job = Job::Write(options.id);
        self.workers.remove(&job);
        let writer = Writer::new(options, self.output.clone())?;
        self.start(job, "write start", writer)
    }

    fn memory(&mut self, mib: u64, rate: u64) -> Outcome {
        self.workers.remove(&Job::Memory);
        let memory = Memory::new(mib, rate, self.output.clone())?;
        self.start(Job::Memory, "memory start", memory)
    }

    fn dirty_memory(&mut self, mib: u64, mibps: u64) -> Outcome {
        self.workers.remove(&Job::DirtyMemory);
        self.start(Job::DirtyMemory, "dirty memory", DirtyMemory::new(mib, mibps)?)
    }

    fn dirty_disk(&mut self, range: &Range, mibps: u64) -> Outcome {
        self.workers.remove(&Job::DirtyDisk);
        self.start(Job::DirtyDisk, "dirty disk", DirtyDisk::new(range, mibps)?)
    }

    /// Ends both kinds of dirt and gives their memory back: it holds nothing to check.
    fn dirty_stop(&mut self) -> Outcome {
        self.workers.remove(&Job::DirtyMemory);
        self.workers.remove(&Job::DirtyDisk);
        self.say(Report::Ok("dirty stop".into()))
    }

    fn start(&mut self, job: Job, command: &str, task: impl Task) -> Outcome {
        self.workers.remove(&job);
        // N.B. answered before the first step, so that no `W` precedes its `OK`.
        self.say(Report::Ok(command.into()))?;
        self.workers.insert(job, Worker::start(task, self.output.clone())?);
        Ok(())
    }

    fn stop(&mut self, jobs: &[Job], command: &str) -> Outcome {
        for worker in jobs.iter().filter_map(|job| self.workers.get(job)) {
            worker.stop()?;
        }
        self.say(Report::Ok(command.into()))
    }

    fn status(&self) -> Outcome {
        let mut texts = vec![format!("up_us={}", self.began.elapsed().as_micros())];
        for worker in self.workers.values() {
            texts.push(worker.status()?);
        }
        self.say(Report::Status(texts.join("; ")))
    }

    fn check(&self) -> Outcome {
        let mut sums = Check::default();
        for worker in self.workers.values() {
            let one = worker.check()?;
            sums.writes += one.writes;
            sums.slots += one.slots;
            sums.lost += one.lost;
            sums.pages += one.pages;
            sums.stale += one.stale;
        }
        self.say(Report::Check(sums))
    }

    fn say(&self, report: Report) -> Outcome {
        self.output.report(report);
        Ok(())
    }
}
