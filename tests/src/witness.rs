//! The host's ear at the guest's oracle: follows its serial line on every host
//! that the guest passes, and knows what the guest saw.

use anyhow::{Context, Result, bail};
use oracle::protocol::{Check, Report};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Everything the oracle has said, wherever it ran.
#[derive(Debug, Default)]
struct Heard {
    /// It listens.
    ready: bool,
    /// When each tick arrived, and from where.
    ticks: BTreeMap<u64, (Instant, Arc<Path>)>,
    /// Ticks that came from two hosts: two instances ran.
    doubled: Vec<u64>,
    /// Highest acknowledged write of each writer.
    written: BTreeMap<u64, u64>,
    /// Answers that nobody took yet, by the ear that heard them: several ears
    /// at one host each hear all.
    answers: Vec<(u64, Report)>,
    /// Losses that were reported.
    losses: Vec<String>,
    /// Lines that made no sense: the pieces of one that a move cut in two.
    broken: Vec<String>,
}

/// Follows one guest's oracle.
#[derive(Debug, Clone, Default)]
pub struct Witness {
    heard: Arc<(Mutex<Heard>, Condvar)>,
}

impl Witness {
    /// Nothing heard yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Listens to the oracle's socket on one more host. The line that is
    /// returned is for commands.
    ///
    /// # Errors
    /// When the socket cannot be reached.
    pub fn listen(&self, socket: &Path) -> Result<Line> {
        let stream = connect(socket)?;
        let from = stream.try_clone()?;
        let (heard, here) = (self.heard.clone(), Arc::from(socket));
        let ear = EARS.fetch_add(1, Relaxed);
        std::thread::spawn(move || follow(from, &heard, ear, &here));
        Ok(Line { stream, ear, witness: self.clone() })
    }

    fn lock(&self) -> MutexGuard<'_, Heard> {
        self.heard.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `found` finds something in what was heard.
    fn wait<T>(
        &self,
        what: &str,
        deadline: Duration,
        mut found: impl FnMut(&mut Heard) -> Option<T>,
    ) -> Result<T> {
        let until = Instant::now() + deadline;
        let mut heard = self.lock();
        loop {
            if let Some(value) = found(&mut heard) {
                return Ok(value);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("the guest's oracle did not say {what} within {deadline:?}; heard {heard:?}");
            }
            heard =
                self.heard.1.wait_timeout(heard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until the oracle has said that it listens: what is sent before is cut.
    ///
    /// # Errors
    /// When it does not in time.
    pub fn wait_ready(&self, deadline: Duration) -> Result<()> {
        self.wait("READY", deadline, |heard| heard.ready.then_some(()))
    }

    /// Waits for a tick that arrives after this call: the guest runs now.
    ///
    /// # Errors
    /// When none comes in time.
    pub fn wait_alive(&self, deadline: Duration) -> Result<()> {
        let from = Instant::now();
        self.wait("a tick", deadline, |heard| {
            heard.ticks.last_key_value().filter(|(_, (at, _))| *at > from).map(|_| ())
        })
    }

    /// The highest acknowledged write.
    pub fn written(&self) -> u64 {
        self.written_by(0)
    }

    /// The highest acknowledged write of writer `id`.
    pub fn written_by(&self, id: u64) -> u64 {
        self.lock().written.get(&id).copied().unwrap_or(0)
    }

    /// Waits until write `n` is acknowledged.
    ///
    /// # Errors
    /// When it is not in time.
    pub fn wait_written(&self, n: u64, deadline: Duration) -> Result<()> {
        self.wait_written_by(0, n, deadline)
    }

    /// Waits until write `n` of writer `id` is acknowledged.
    ///
    /// # Errors
    /// When it is not in time.
    pub fn wait_written_by(&self, id: u64, n: u64, deadline: Duration) -> Result<()> {
        let what = format!("that write {n} of writer {id} is durable");
        self.wait(&what, deadline, |heard| heard.written.get(&id).filter(|w| **w >= n).map(|_| ()))
    }

    /// The longest time that the guest stood still since `from`: the largest
    /// gap between two ticks that follow each other.
    pub fn longest_pause_since(&self, from: Instant) -> Duration {
        let heard = self.lock();
        let times: Vec<Instant> = heard.ticks.values().map(|(at, _)| *at).collect();
        let gaps = times.windows(2).filter(|w| w[1] >= from);
        gaps.map(|w| w[1].saturating_duration_since(w[0])).max().unwrap_or_default()
    }

    /// The time between the last tick on one host and the first on the next, of the
    /// last switchover since `from`; zero when there was none.
    pub fn pause_at_switchover_since(&self, from: Instant) -> Duration {
        let heard = self.lock();
        let ticks: Vec<_> = heard.ticks.values().collect();
        let switched = ticks.windows(2).rev().find(|w| w[0].1 != w[1].1 && w[1].0 >= from);
        switched.map(|w| w[1].0.saturating_duration_since(w[0].0)).unwrap_or_default()
    }

    /// Ticks that came from two hosts: a guest ran on after it had gone elsewhere.
    pub fn doubled(&self) -> Vec<u64> {
        self.lock().doubled.clone()
    }

    /// Losses that the oracle reported by itself.
    pub fn losses(&self) -> Vec<String> {
        self.lock().losses.clone()
    }
}

/// A line to the oracle on the host where the guest runs.
#[derive(Debug)]
pub struct Line {
    stream: UnixStream,
    ear: u64,
    witness: Witness,
}

impl Line {
    /// Gives a command and returns its answer.
    ///
    /// # Errors
    /// When the oracle refuses it or does not answer in time.
    pub fn command(&mut self, command: &str, deadline: Duration) -> Result<Report> {
        self.skip_the_past(deadline)?;
        self.stream.write_all(format!("{command}\n").as_bytes())?;
        let answer =
            self.witness.wait(&format!("an answer to `{command}`"), deadline, |heard| {
                let at = heard.answers.iter().position(|(ear, _)| *ear == self.ear)?;
                Some(heard.answers.remove(at).1)
            })?;
        match answer {
            Report::Err(why) => bail!("the oracle refuses `{command}`: {why}"),
            answer => Ok(answer),
        }
    }

    /// A serial line begins with what was said before: old answers are not
    /// ours. A command that nobody knows is quoted in its refusal, and so marks
    /// where the present begins.
    fn skip_the_past(&mut self, deadline: Duration) -> Result<()> {
        let fence = format!("fence-{}-{}", std::process::id(), EARS.fetch_add(1, Relaxed));
        // The past may end within a line, which the next answer completes: that of the ping.
        self.stream.write_all(format!("ping\n{fence}\n").as_bytes())?;
        self.witness.wait("that it does not know a fence", deadline, |heard| {
            let is_fence = |(ear, answer): &(u64, Report)| {
                *ear == self.ear && matches!(answer, Report::Err(why) if why.contains(&fence))
            };
            let at = heard.answers.iter().position(is_fence)?;
            let before: Vec<_> = heard.answers.drain(..=at).collect();
            heard.answers.extend(before.into_iter().filter(|(ear, _)| *ear != self.ear));
            Some(())
        })
    }

    /// Has the guest check all that it wrote and counted.
    ///
    /// # Errors
    /// When it gives no answer.
    pub fn check(&mut self) -> Result<Check> {
        match self.command("check", Duration::from_secs(60))? {
            Report::Check(sums) => Ok(sums),
            other => bail!("the oracle answered `check` with `{other}`"),
        }
    }
}

fn connect(socket: &Path) -> Result<UnixStream> {
    channel_connect(socket).with_context(|| format!("cannot listen to {}", socket.display()))
}

/// Paths of sockets may be longer than an address holds: go through the folder.
fn channel_connect(socket: &Path) -> std::io::Result<UnixStream> {
    use std::os::fd::AsRawFd;
    let (Some(folder), Some(name)) = (socket.parent(), socket.file_name()) else {
        return Err(std::io::ErrorKind::InvalidInput.into());
    };
    let folder = std::fs::File::open(folder)?;
    UnixStream::connect(Path::new(&format!("/proc/self/fd/{}", folder.as_raw_fd())).join(name))
}

/// Numbers for ears and fences.
static EARS: AtomicU64 = AtomicU64::new(0);

fn follow(stream: UnixStream, heard: &(Mutex<Heard>, Condvar), ear: u64, here: &Arc<Path>) {
    let mut from = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        let limited = (&mut from).take(4096).read_until(b'\n', &mut line);
        if !matches!(limited, Ok(1..)) {
            return;
        }
        let now = Instant::now();
        let text = String::from_utf8_lossy(&line).trim().to_owned();
        let mut state = heard.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.hear(&text, now, ear, here);
        heard.1.notify_all();
    }
}

impl Heard {
    fn hear(&mut self, text: &str, now: Instant, ear: u64, here: &Arc<Path>) {
        match text.parse::<Report>() {
            Ok(Report::Tick { n, .. }) => {
                let (_, first) = self.ticks.entry(n).or_insert_with(|| (now, here.clone()));
                if first != here {
                    self.doubled.push(n);
                }
            }
            Ok(Report::Written { n, id }) => {
                let newest = self.written.entry(id).or_default();
                *newest = n.max(*newest);
            }
            Ok(Report::Ready) => self.ready = true,
            Ok(Report::LostWrite { .. } | Report::LostPage { .. }) => {
                self.losses.push(text.to_owned());
            }
            Ok(Report::Died(status)) => self.losses.push(format!("the oracle died: {status}")),
            Ok(answer) => self.answers.push((ear, answer)),
            Err(_) if text.is_empty() => {}
            Err(_) => self.broken.push(text.to_owned()),
        }
    }
}
