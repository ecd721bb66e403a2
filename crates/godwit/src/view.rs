//! The live view of a move: a block of lines that is redrawn on a terminal,
//! plain lines elsewhere, JSON events on request.

use launcher::migration::progress::Progress;
use launcher::migration::status::{Outcome, Status};
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// How a move is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// For people: redrawn on a terminal, a line now and then elsewhere.
    Text,
    /// One JSON object a line on stdout for every change.
    Json,
}

/// Shows the statuses of one move.
#[derive(Debug)]
pub struct View {
    mode: Mode,
    /// Lines of the block on the terminal.
    drawn: usize,
    phase: String,
    last: Option<Instant>,
}

#[derive(Debug, PartialEq, Eq)]
enum Mode {
    Live,
    Lines,
    Json,
}

/// Off a terminal a line appears at each phase and at most this often within one.
const LINE_PERIOD: Duration = Duration::from_secs(2);

impl View {
    /// A view in the format that was asked for.
    pub fn new(output: Output) -> Self {
        let mode = match output {
            Output::Json => Mode::Json,
            Output::Text if std::io::stderr().is_terminal() => Mode::Live,
            Output::Text => Mode::Lines,
        };
        Self { mode, drawn: 0, phase: String::new(), last: None }
    }

    /// Shows a status.
    pub fn show(&mut self, status: &Status) {
        let turned = self.phase != status.phase || status.outcome.is_some();
        match self.mode {
            Mode::Json => print_json(status),
            Mode::Live => self.redraw(&block(status)),
            Mode::Lines => {
                let due = self.last.is_none_or(|last| last.elapsed() >= LINE_PERIOD);
                if turned || due {
                    eprintln!("{}", line(status));
                    self.last = Some(Instant::now());
                }
            }
        }
        self.phase.clone_from(&status.phase);
    }

    fn redraw(&mut self, lines: &[String]) {
        let mut text = String::new();
        if self.drawn > 0 {
            text.push_str(&format!("\x1b[{}A", self.drawn));
        }
        for line in lines {
            text.push_str("\x1b[2K");
            text.push_str(line);
            text.push('\n');
        }
        self.drawn = lines.len();
        // A terminal that is gone is no reason to end a move.
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
}

fn print_json(status: &Status) {
    if let Ok(text) = serde_json::to_string(status) {
        let _ = writeln!(std::io::stdout(), "{text}");
    }
}

const BAR: usize = 30;

fn bar(done: f64) -> String {
    let full = (done.clamp(0.0, 1.0) * BAR as f64) as usize;
    format!("[{}{}]", "#".repeat(full), ".".repeat(BAR - full))
}

/// The block for a terminal.
pub fn block(status: &Status) -> Vec<String> {
    let progress = &status.progress;
    let mut lines = vec![format!("{:<10} {}", status.phase, waiting(status))];
    for disk in &progress.disks {
        let done = share(disk.left, disk.total);
        let left = bytes(disk.left);
        let total = bytes(disk.total);
        lines.push(format!(
            "{:<10} {} {:>3.0} %  {left} of {total} left",
            disk.name,
            bar(done),
            done * 100.0
        ));
    }
    if let Some(memory) = &progress.memory {
        let done = share(memory.left, memory.total);
        let dirty = bytes(memory.dirty_rate);
        lines.push(format!(
            "{:<10} {} {:>3.0} %  dirtied {dirty}/s",
            "memory",
            bar(done),
            done * 100.0
        ));
    }
    lines.push(figures(progress));
    if let Some(outcome) = &status.outcome {
        lines.push(ending(outcome, status));
    }
    lines
}

/// One line for a log.
pub fn line(status: &Status) -> String {
    if let Some(outcome) = &status.outcome {
        return ending(outcome, status);
    }
    let waiting = waiting(status);
    let gap = if waiting.is_empty() { "" } else { "  " };
    format!("{:<10} {}{gap}{waiting}", status.phase, figures(&status.progress))
}

fn share(left: u64, total: u64) -> f64 {
    if total == 0 { 1.0 } else { 1.0 - left.min(total) as f64 / total as f64 }
}

fn waiting(status: &Status) -> String {
    let Some(waiting) = &status.waiting else { return String::new() };
    match waiting.deadline_seconds {
        Some(seconds) => format!("waiting for {} (at most {seconds:.0} s)", waiting.reason),
        None => format!("waiting for {}", waiting.reason),
    }
}

fn figures(progress: &Progress) -> String {
    let mut parts = vec![
        format!("{} of {} left", bytes(progress.bytes_left), bytes(progress.bytes_total)),
        format!("{}/s", bytes(progress.rate)),
        format!("dirty {}/s", bytes(progress.dirty_rate)),
    ];
    if let Some(eta) = progress.eta_seconds {
        parts.push(format!("ETA {eta:.1} s"));
    }
    if let Some(pause) = progress.predicted_downtime_ms {
        parts.push(format!("pause about {pause:.0} ms"));
    }
    if let Some(limit) = progress.limit {
        parts.push(format!("limit: {limit}"));
    }
    if let Some(throttle) = progress.throttle {
        parts.push(format!("guest's writes slowed to {}/s", bytes(throttle)));
    }
    parts.join(", ")
}

fn ending(outcome: &Outcome, status: &Status) -> String {
    match outcome {
        Outcome::Succeeded => {
            let mut text = "moved".to_owned();
            if let Some(pause) = status.paused_ms {
                text += &format!("; the guest stood still for {pause:.0} ms");
            }
            match status.progress.resumes {
                0 => text,
                resumes => format!("{text}; {resumes} broken streams went on"),
            }
        }
        Outcome::Failed { reason, resumable: true } => {
            format!("failed: {reason}. The guest runs where it ran; go on with --resume")
        }
        Outcome::Failed { reason, resumable: false } => {
            format!("failed: {reason}. The guest runs where it ran")
        }
        Outcome::Cancelled => "cancelled; the guest runs where it ran".to_owned(),
        Outcome::InDoubt { reason } => format!("in doubt: {reason}"),
    }
}

/// Bytes for people: 1.5 MiB.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = count as f64;
    let mut unit = "B";
    for next in UNITS {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    if unit == "B" { format!("{count} B") } else { format!("{value:.1} {unit}") }
}

#[cfg(test)]
mod test {
    use super::*;
    use launcher::migration::status::Half;

    #[test]
    fn a_failure_says_why_where_the_guest_is_and_what_to_do() {
        let mut status = Status::begin("m", Half::Source, "seeding");
        status.outcome =
            Some(Outcome::Failed { reason: "the link is cut".into(), resumable: true });
        let line = line(&status);
        assert!(
            line.contains("the link is cut")
                && line.contains("runs where it ran")
                && line.contains("--resume")
        );
    }

    #[test]
    fn bytes_are_readable() {
        assert_eq!([0, 1023, 1536, 64 << 30].map(bytes), ["0 B", "1023 B", "1.5 KiB", "64.0 GiB"]);
    }
}
