//! Measures a guest for a forecast.

use super::{Measured, MeasuredDisk};
use crate::qemu::Qemu;
use crate::spec::Disk as Spec;
use crate::usage;
use crate::vm::QMP_DEADLINE;
use mover::disk::{Disk, aligned};
use mover::extent::ExtentSet;
use qmp::commands::{CalcDirtyRate, DirtyRateStatus, QueryDirtyRate};
use std::time::{Duration, Instant};

/// How long a guest is watched: the shortest time over which QEMU counts dirty pages.
const SPAN: Duration = Duration::from_secs(1);
/// QEMU may still be counting for so long after that.
const LATE: Duration = Duration::from_secs(3);
/// Between two looks.
const POLL: Duration = Duration::from_millis(100);
/// Samples of a disk, and bytes of each.
const SAMPLES: u64 = 8;
const SAMPLE: u64 = 1 << 20;

/// Why a guest cannot be measured.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// QEMU does not say it.
    #[error("QEMU does not say how fast its guest dirties its memory")]
    Qmp(#[from] qmp::Error),
    /// Nor what it has written.
    #[error(transparent)]
    Usage(#[from] usage::Error),
    /// A disk cannot be read.
    #[error(transparent)]
    Disk(#[from] mover::disk::Error),
    /// A task of ours broke.
    #[error("disk {0} was not measured: the launcher's log tells why")]
    Broken(String),
    /// It was told to count, and did not come to an end.
    #[error("QEMU did not measure how fast its guest dirties its memory within {0:?}")]
    Late(Duration),
}

/// Watches a guest for about a second, and reads samples of its disks.
///
/// # Errors
/// [`Error`].
pub async fn of(qemu: &Qemu) -> Result<Measured, Error> {
    let before = usage::disks(qemu).await?;
    let began = Instant::now();
    let calc_time = i64::try_from(SPAN.as_secs()).unwrap_or(1);
    qemu.qmp.execute(CalcDirtyRate { calc_time }, QMP_DEADLINE).await?;
    let memory_dirty_rate = dirty_rate(qemu).await?;
    let (after, span) = (usage::disks(qemu).await?, began.elapsed().as_secs_f64());
    let mut disks = Vec::new();
    for spec in &qemu.spec.disks {
        let written = |all: &[usage::Disk]| {
            let found = all.iter().find(|disk| disk.name == spec.name);
            found.map_or(0, |disk| disk.write_bytes)
        };
        let written = written(&after).saturating_sub(written(&before));
        let owned = spec.clone();
        let read = tokio::task::spawn_blocking(move || sample(&owned)).await;
        let mut disk = read.map_err(|_| Error::Broken(spec.name.clone()))??;
        disk.dirty_rate = (written as f64 / span) as u64;
        disks.push(disk);
    }
    Ok(Measured { memory: qemu.spec.memory_mib << 20, memory_dirty_rate, disks })
}

async fn dirty_rate(qemu: &Qemu) -> Result<u64, Error> {
    let since = Instant::now();
    while since.elapsed() < SPAN + LATE {
        tokio::time::sleep(POLL).await;
        let found = qemu.qmp.execute(QueryDirtyRate, QMP_DEADLINE).await?;
        if found.status == DirtyRateStatus::Measured {
            let mib = u64::try_from(found.dirty_rate.unwrap_or(0)).unwrap_or(0);
            return Ok(mib << 20);
        }
    }
    Err(Error::Late(SPAN + LATE))
}

/// Reads pieces of a disk, evenly over what is no hole.
fn sample(spec: &Spec) -> Result<MeasuredDisk, mover::disk::Error> {
    let disk = Disk::source(&spec.path)?;
    let (data, _) = disk.classify(&ExtentSet::whole(disk.size()))?;
    let mut read_rates = Vec::new();
    let mut buffer = Vec::new();
    let step = data.bytes() / SAMPLES;
    let mut passed = 0;
    for extent in data.iter() {
        let end = passed + extent.len;
        while (read_rates.len() as u64) < SAMPLES {
            // Where the next sample begins, counted over data alone.
            let wanted = read_rates.len() as u64 * step;
            if wanted >= end {
                break;
            }
            let offset = extent.offset + (wanted - passed).min(extent.len);
            let offset = offset / mover::disk::SECTOR * mover::disk::SECTOR;
            let len = SAMPLE.min(extent.end() - offset);
            let began = Instant::now();
            disk.read(offset, aligned(&mut buffer, len as usize))?;
            read_rates.push(len as f64 / began.elapsed().as_secs_f64().max(1e-6));
        }
        passed = end;
    }
    Ok(MeasuredDisk {
        name: spec.name.clone(),
        size: disk.size(),
        data: data.bytes(),
        dirty_rate: 0,
        read_rates,
        shared: spec.shared,
        read_only: spec.read_only,
    })
}
