//! The lines that host and oracle exchange. Both directions parse and print
//! here, so that a host program may use this module as it is.
//!
//! # Commands (host to guest, one line each, `\n` at the end)
//!
//! Arguments are `key=value` in any order; numbers are decimal and may end in
//! `K`, `M` or `G` (powers of 1024). Each command is answered by exactly one
//! line: the one named here, or `ERR <reason>`. Other lines may come between.
//!
//! | command | arguments, `[default]` | answer |
//! |---|---|---|
//! | `ping` | | `PONG` |
//! | `status` | | `STATUS …`, for people |
//! | `tick start` | `us` period `[1000]` | `OK tick start` |
//! | `tick stop` | | `OK tick stop` |
//! | `write start` | `dev`, `offset [0]`, `len`, `block [4096]`, `rate` blocks/s `[0: as fast as it goes]`, `batch` blocks per flush `[1]`, `seed [1]`, `id [0]` | `OK write start` |
//! | `write stop` | `id [0]` | `OK write stop` |
//! | `memory start` | `mib`, `rate` pages/s `[0: as fast as it goes]` | `OK memory start` |
//! | `memory stop` | | `OK memory stop` |
//! | `dirty memory` | `mib` working set, `mibps [0: as fast as it goes]` | `OK dirty memory` |
//! | `dirty disk` | `dev`, `offset [0]`, `len`, `mibps [0: …]` | `OK dirty disk` |
//! | `dirty stop` | | `OK dirty stop` |
//! | `check` | | `LOST …` lines, then `CHECK …` |
//! | `quit` | | `BYE`, then init says `DIED 0` |
//!
//! Starting a job again replaces it. What was written or counted stays known
//! after `write stop` and `memory stop`, so that `check` still covers it.
//!
//! # Reports (guest to host)
//!
//! | line | meaning |
//! |---|---|
//! | `READY` | the oracle has begun to listen |
//! | `T <n> <us>` | tick `n` (1, 2, … without gaps: a tick that the line has no room for is never numbered) at `us`, the guest's monotonic microseconds since the oracle began |
//! | `W <n>` | every write up to and including `n` is durable: its flush returned. `W <n> <id>` for writers other than 0 |
//! | `LOST write slot=<s> expected=<n> found=<f>` | slot `s` must hold write `n`; `f` is a number, `foreign` or `torn` |
//! | `LOST page <i> expected <a> found <b>` | page `i` must have counter `a`; `b` is a number or `broken` |
//! | `CHECK writes=<n> slots=<k> lost=<m> pages=<p> stale=<q>` | `n` writes went to `k` slots that hold something, of which `m` are not as they must be; of `p` pages `q` were not as they must be since `memory start`. `LOST` lines are bounded, the counts are not |
//! | `ERR <reason>` | a command was refused, or a job failed and stopped |
//! | `DIED <status>` | init: the oracle has ended and nothing restarts it |

use std::fmt;
use std::str::FromStr;

/// The longest line, in bytes, that either side sends.
pub const MAX_LINE: usize = 512;

/// What to do, in the words of the person who typed it.
pub const USAGE: &str = "ping | status | check | quit | tick start [us=] | tick stop | \
write start dev= len= [offset= block= rate= batch= seed= id=] | write stop [id=] | \
memory start mib= [rate=] | memory stop | dirty memory mib= [mibps=] | \
dirty disk dev= len= [offset= mibps=] | dirty stop";

/// Why a line is not understood.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// No such command.
    #[error("unknown command `{0}`; known: {USAGE}")]
    Unknown(String),
    /// An argument is missing.
    #[error("`{command}` needs {key}=…")]
    Missing {
        /// The command.
        command: String,
        /// The missing key.
        key: &'static str,
    },
    /// An argument has a value that cannot be.
    #[error("`{argument}`: {why}")]
    Argument {
        /// As it came.
        argument: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Not one of the reports.
    #[error("`{0}` is not a line of the oracle")]
    Report(String),
}

/// A range of a disk, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range {
    /// The device or file.
    pub dev: String,
    /// Where the range begins.
    pub offset: u64,
    /// How long it is.
    pub len: u64,
}

/// The arguments of `write start`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// Which of several writers; 0 is the one whose lines do not name it.
    pub id: u64,
    /// Where to write.
    pub range: Range,
    /// Bytes of a block: a multiple of 512, at most 1 MiB.
    pub block: u64,
    /// Blocks per second; 0: as fast as it goes.
    pub rate: u64,
    /// Blocks per flush.
    pub batch: u64,
    /// The run's seed: a new one for each run over the same range.
    pub seed: u64,
}

/// What the host asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the module's first table says it all")]
pub enum Command {
    Ping,
    Status,
    Check,
    Quit,
    TickStart { us: u64 },
    TickStop,
    WriteStart(Write),
    WriteStop { id: u64 },
    MemoryStart { mib: u64, rate: u64 },
    MemoryStop,
    DirtyMemory { mib: u64, mibps: u64 },
    DirtyDisk { range: Range, mibps: u64 },
    DirtyStop,
}

impl FromStr for Command {
    type Err = Error;

    fn from_str(line: &str) -> Result<Self, Error> {
        let mut arguments = Arguments::split(line);
        let command = match arguments.command.as_str() {
            "ping" => Command::Ping,
            "status" => Command::Status,
            "check" => Command::Check,
            "quit" => Command::Quit,
            "tick start" => Command::TickStart { us: arguments.at_least("us", Some(1000), 1)? },
            "tick stop" => Command::TickStop,
            "write start" => Command::WriteStart(Write {
                range: arguments.range()?,
                block: arguments.number("block", Some(4096))?,
                rate: arguments.number("rate", Some(0))?,
                batch: arguments.at_least("batch", Some(1), 1)?,
                seed: arguments.number("seed", Some(1))?,
                id: arguments.number("id", Some(0))?,
            }),
            "write stop" => Command::WriteStop { id: arguments.number("id", Some(0))? },
            "memory start" => Command::MemoryStart {
                mib: arguments.at_least("mib", None, 1)?,
                rate: arguments.number("rate", Some(0))?,
            },
            "memory stop" => Command::MemoryStop,
            "dirty memory" => Command::DirtyMemory {
                mib: arguments.at_least("mib", None, 1)?,
                mibps: arguments.number("mibps", Some(0))?,
            },
            "dirty disk" => Command::DirtyDisk {
                range: arguments.range()?,
                mibps: arguments.number("mibps", Some(0))?,
            },
            "dirty stop" => Command::DirtyStop,
            _ => return Err(Error::Unknown(line.trim().to_owned())),
        };
        arguments.none_left()?;
        Ok(command)
    }
}

/// `key=value` words, taken out as they are understood. Also what the command
/// line of `oracle verify-image` is read with.
pub struct Arguments {
    command: String,
    pairs: Vec<(String, String)>,
}

impl Arguments {
    /// Splits a line: words without `=` are the command, the others arguments.
    pub fn split(line: &str) -> Self {
        let mut command = Vec::new();
        let mut pairs = Vec::new();
        for word in line.split_whitespace() {
            match word.split_once('=') {
                None => command.push(word),
                Some((key, value)) => pairs.push((key.to_owned(), value.to_owned())),
            }
        }
        Arguments { command: command.join(" "), pairs }
    }

    /// Takes a text argument.
    ///
    /// # Errors
    /// When it is missing.
    pub fn text(&mut self, key: &'static str) -> Result<String, Error> {
        self.take(key).ok_or_else(|| self.missing(key))
    }

    /// Takes a number; `default` stands in when it is absent.
    ///
    /// # Errors
    /// When it is missing without a default, or is no number.
    pub fn number(&mut self, key: &'static str, default: Option<u64>) -> Result<u64, Error> {
        match self.take(key) {
            Some(value) => number(&value).ok_or_else(|| Error::Argument {
                argument: format!("{key}={value}"),
                why: "not a number (decimal, K, M or G at the end) that fits in 64 bits",
            }),
            None => default.ok_or_else(|| self.missing(key)),
        }
    }

    /// Ends the parse.
    ///
    /// # Errors
    /// When an argument was given that nobody took.
    pub fn none_left(self) -> Result<(), Error> {
        match self.pairs.first() {
            None => Ok(()),
            Some((key, value)) => Err(Error::Argument {
                argument: format!("{key}={value}"),
                why: "this command has no such argument",
            }),
        }
    }

    fn at_least(
        &mut self,
        key: &'static str,
        default: Option<u64>,
        least: u64,
    ) -> Result<u64, Error> {
        let value = self.number(key, default)?;
        if value < least {
            let argument = format!("{key}={value}");
            return Err(Error::Argument { argument, why: "must not be 0" });
        }
        Ok(value)
    }

    fn range(&mut self) -> Result<Range, Error> {
        Ok(Range {
            dev: self.text("dev")?,
            offset: self.number("offset", Some(0))?,
            len: self.at_least("len", None, 1)?,
        })
    }

    fn take(&mut self, key: &str) -> Option<String> {
        let at = self.pairs.iter().position(|(name, _)| name == key)?;
        Some(self.pairs.remove(at).1)
    }

    fn missing(&self, key: &'static str) -> Error {
        Error::Missing { command: self.command.clone(), key }
    }
}

fn number(text: &str) -> Option<u64> {
    let (digits, unit) = match text.as_bytes().last()? {
        b'K' => (&text[..text.len() - 1], 1 << 10),
        b'M' => (&text[..text.len() - 1], 1 << 20),
        b'G' => (&text[..text.len() - 1], 1 << 30),
        _ => (text, 1),
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

/// The sums of a `check`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Check {
    /// Writes done.
    pub writes: u64,
    /// Slots that hold something.
    pub slots: u64,
    /// Slots that do not hold what they must.
    pub lost: u64,
    /// Pages counted.
    pub pages: u64,
    /// Times that a page was not what it must be.
    pub stale: u64,
}

/// What the guest says.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the module's second table says it all")]
pub enum Report {
    Ready,
    Pong,
    Bye,
    Ok(String),
    Err(String),
    Status(String),
    Tick { n: u64, us: u64 },
    Written { n: u64, id: u64 },
    LostWrite { slot: u64, expected: u64, found: String },
    LostPage { page: u64, expected: u64, found: String },
    Check(Check),
    Died(String),
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Report::Ready => write!(f, "READY"),
            Report::Pong => write!(f, "PONG"),
            Report::Bye => write!(f, "BYE"),
            Report::Ok(command) => write!(f, "OK {command}"),
            Report::Err(reason) => write!(f, "ERR {reason}"),
            Report::Status(text) => write!(f, "STATUS {text}"),
            Report::Tick { n, us } => write!(f, "T {n} {us}"),
            Report::Written { n, id: 0 } => write!(f, "W {n}"),
            Report::Written { n, id } => write!(f, "W {n} {id}"),
            Report::LostWrite { slot, expected, found } => {
                write!(f, "LOST write slot={slot} expected={expected} found={found}")
            }
            Report::LostPage { page, expected, found } => {
                write!(f, "LOST page {page} expected {expected} found {found}")
            }
            Report::Check(c) => write!(
                f,
                "CHECK writes={} slots={} lost={} pages={} stale={}",
                c.writes, c.slots, c.lost, c.pages, c.stale
            ),
            Report::Died(status) => write!(f, "DIED {status}"),
        }
    }
}

impl FromStr for Report {
    type Err = Error;

    fn from_str(line: &str) -> Result<Self, Error> {
        let line = line.trim();
        parse_report(line).ok_or_else(|| Error::Report(line.to_owned()))
    }
}

fn parse_report(line: &str) -> Option<Report> {
    let (head, rest) = line.split_once(' ').unwrap_or((line, ""));
    let words: Vec<&str> = rest.split_whitespace().collect();
    let mut arguments = Arguments::split(rest);
    let mut key = |name| arguments.number(name, None).ok();
    Some(match (head, words.as_slice()) {
        ("READY", []) => Report::Ready,
        ("PONG", []) => Report::Pong,
        ("BYE", []) => Report::Bye,
        ("OK", _) => Report::Ok(rest.to_owned()),
        ("ERR", _) => Report::Err(rest.to_owned()),
        ("STATUS", _) => Report::Status(rest.to_owned()),
        ("DIED", _) => Report::Died(rest.to_owned()),
        ("T", [n, us]) => Report::Tick { n: n.parse().ok()?, us: us.parse().ok()? },
        ("W", [n]) => Report::Written { n: n.parse().ok()?, id: 0 },
        ("W", [n, id]) => Report::Written { n: n.parse().ok()?, id: id.parse().ok()? },
        ("LOST", ["write", ..]) => Report::LostWrite {
            slot: key("slot")?,
            expected: key("expected")?,
            found: arguments.text("found").ok()?,
        },
        ("LOST", ["page", page, "expected", expected, "found", found]) => Report::LostPage {
            page: page.parse().ok()?,
            expected: expected.parse().ok()?,
            found: (*found).to_owned(),
        },
        ("CHECK", _) => Report::Check(Check {
            writes: key("writes")?,
            slots: key("slots")?,
            lost: key("lost")?,
            pages: key("pages")?,
            stale: key("stale")?,
        }),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_report_reads_back_as_it_was_printed() {
        let check = Check { writes: 9, slots: 4, lost: 1, pages: 7, stale: 2 };
        let found = || "torn".to_owned();
        for report in [
            Report::Ready,
            Report::Ok("tick start".into()),
            Report::Err("no such device".into()),
            Report::Tick { n: 3, us: 3001 },
            Report::Written { n: 8, id: 0 },
            Report::Written { n: 8, id: 2 },
            Report::LostWrite { slot: 1, expected: 2, found: found() },
            Report::LostPage { page: 1, expected: 2, found: found() },
            Report::Check(check),
            Report::Died("137".into()),
        ] {
            assert_eq!(report.to_string().parse(), Ok(report));
        }
        assert!("T 1".parse::<Report>().is_err(), "a line cut short is not a tick");
    }

    #[test]
    fn a_command_takes_its_arguments_in_any_order_and_refuses_others() {
        let command = "write start len=16M dev=/dev/vda seed=5 offset=32M".parse();
        let range = Range { dev: "/dev/vda".into(), offset: 32 << 20, len: 16 << 20 };
        let write = Write { id: 0, range, block: 4096, rate: 0, batch: 1, seed: 5 };
        assert_eq!(command, Ok(Command::WriteStart(write)));
        assert_eq!("tick start".parse(), Ok(Command::TickStart { us: 1000 }));
        for bad in [
            "",
            "write",
            "write start dev=/dev/vda",
            "tick start us=0",
            "tick start ms=1",
            "check now",
            "memory start mib=99999999999G",
        ] {
            assert!(bad.parse::<Command>().is_err(), "{bad}");
        }
    }
}
