//! What a guest has used since its QEMU began: of the kernel's accounts and of QEMU's own.

use crate::qemu::Qemu;
use crate::vm::QMP_DEADLINE;
use qmp::commands::{QueryBlockstats, QueryCpusFast};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::path::Path;

const NANO: f64 = 1e9;

/// Why it cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// QEMU does not say it.
    #[error("QEMU does not say what its guest has used")]
    Qmp(#[from] qmp::Error),
    /// The kernel does not say it: QEMU has most likely ended.
    #[error("cannot read what QEMU has used from {path}: does it still run?")]
    Process {
        /// The file.
        path: String,
    },
}

/// What a guest has used. Times are in seconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Time of all of QEMU's threads in programs: the guest's, and QEMU's own.
    pub user: f64,
    /// Time of all of QEMU's threads in the host's kernel.
    pub system: f64,
    /// The host's memory that QEMU has now, in bytes.
    pub resident: u64,
    /// Of each vCPU.
    pub vcpus: Vec<Vcpu>,
    /// Of each disk.
    pub disks: Vec<Disk>,
}

/// What a vCPU has used.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Vcpu {
    /// Its number.
    pub id: u32,
    /// Time that it ran.
    pub used: f64,
    /// Time that it could have run, and waited for a processor of the host.
    pub delayed: f64,
}

/// What was done to a disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Disk {
    /// Its name in the spec.
    pub name: String,
    /// Requests.
    pub reads: u64,
    /// Requests.
    pub writes: u64,
    /// Requests.
    pub flushes: u64,
    /// Bytes.
    pub read_bytes: u64,
    /// Bytes.
    pub write_bytes: u64,
    /// Time that requests took, added up.
    pub read_time: f64,
    /// Time that requests took, added up.
    pub write_time: f64,
    /// Time that requests took, added up.
    pub flush_time: f64,
}

/// Looks at a guest.
///
/// # Errors
/// [`Error`].
pub async fn of(qemu: &Qemu) -> Result<Usage, Error> {
    let process = Path::new("/proc").join(qemu.process.pid().to_string());
    let (user, system) = read(&process.join("stat"), times)?;
    let resident = read(&process.join("statm"), resident)?;
    Ok(Usage {
        user,
        system,
        resident,
        vcpus: vcpus(qemu, &process).await?,
        disks: disks(qemu).await?,
    })
}

/// Reads a file of /proc. A few hundred bytes that are made at once: this does not block.
fn read<T>(path: &Path, parse: impl FnOnce(&str) -> Option<T>) -> Result<T, Error> {
    let text = std::fs::read_to_string(path).ok();
    let gone = || Error::Process { path: path.display().to_string() };
    text.and_then(|text| parse(&text)).ok_or_else(gone)
}

/// `utime` and `stime`, fields 14 and 15 of `stat`: proc_pid_stat(5).
fn times(stat: &str) -> Option<(f64, f64)> {
    // The second field is the program's name, in which anything may be.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let ticks = rustix::param::clock_ticks_per_second() as f64;
    let mut seconds = || Some(fields.next()?.parse::<u64>().ok()? as f64 / ticks);
    Some((seconds()?, seconds()?))
}

/// Field 2 of `statm`, in bytes: proc_pid_statm(5).
fn resident(statm: &str) -> Option<u64> {
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

/// Time on a processor and time in a queue for one, of `schedstat`: sched-stats.rst of the kernel.
fn schedule(schedstat: &str) -> Option<(f64, f64)> {
    let mut fields = schedstat.split_whitespace();
    let mut seconds = || Some(fields.next()?.parse::<u64>().ok()? as f64 / NANO);
    Some((seconds()?, seconds()?))
}

async fn vcpus(qemu: &Qemu, process: &Path) -> Result<Vec<Vcpu>, Error> {
    let all = qemu.qmp.execute(QueryCpusFast, QMP_DEADLINE).await?;
    // Emulated vCPUs may take turns in one thread: whose time it is cannot be told, and it counts once.
    let mut seen = HashSet::new();
    let own = all.into_iter().filter(|cpu| seen.insert(cpu.thread_id));
    own.map(|cpu| {
        let file = process.join("task").join(cpu.thread_id.to_string()).join("schedstat");
        let (used, delayed) = read(&file, schedule)?;
        Ok(Vcpu { id: cpu.cpu_index, used, delayed })
    })
    .collect()
}

/// What was done to each disk.
pub(crate) async fn disks(qemu: &Qemu) -> Result<Vec<Disk>, Error> {
    let all = qemu.qmp.execute(QueryBlockstats { query_nodes: None }, QMP_DEADLINE).await?;
    let seconds = |ns: u64| ns as f64 / NANO;
    let of = |name: &str| {
        let device = format!("{name}-disk");
        let is = |part: &&str| *part == device;
        let found = all.iter().find(|stats| {
            stats.qdev.as_deref().is_some_and(|path| path.split('/').any(|part| is(&part)))
        });
        let it = &found?.stats;
        Some(Disk {
            name: name.to_owned(),
            reads: it.rd_operations,
            writes: it.wr_operations,
            flushes: it.flush_operations,
            read_bytes: it.rd_bytes,
            write_bytes: it.wr_bytes,
            read_time: seconds(it.rd_total_time_ns),
            write_time: seconds(it.wr_total_time_ns),
            flush_time: seconds(it.flush_total_time_ns),
        })
    };
    Ok(qemu.spec.disks.iter().filter_map(|disk| of(&disk.name)).collect())
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn what_the_kernel_writes_is_read_whatever_the_program_is_called() {
        let ticks = rustix::param::clock_ticks_per_second();
        let stat = format!(
            "7 (a) b) 1 (x) S 1 2 3 4 5 6 7 8 9 10 {} {} 0 0 20 0 5 0 99",
            3 * ticks,
            2 * ticks
        );
        assert_eq!(times(&stat), Some((3.0, 2.0)));
        assert_eq!(resident("9 2 1"), Some(2 * rustix::param::page_size() as u64));
        assert_eq!(schedule("1500000000 250000000 12\n"), Some((1.5, 0.25)));
        assert_eq!((times("7 (a"), resident("9"), schedule("1")), (None, None, None));
    }

    #[test]
    fn this_process_has_used_something() {
        let own = Path::new("/proc/self");
        let (user, system) = read(&own.join("stat"), times).unwrap();
        assert!(user >= 0.0 && system >= 0.0 && read(&own.join("statm"), resident).unwrap() > 0);
        assert!(read(Path::new("/proc/self/task/0/schedstat"), schedule).is_err());
    }
}
