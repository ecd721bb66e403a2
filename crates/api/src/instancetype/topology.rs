//! How processors are arranged.

use crate::vmi::Topology;
use serde_json::Value;

/// Sockets to cores, where a preference spreads processors and does not say how; as KubeVirt's.
const RATIO: u64 = 2;
/// Of each core, where there is more than one.
const THREADS: u32 = 2;

/// How so many processors are arranged; or what is wrong, and the field of a VM with which.
pub fn topology(vcpus: u64, preference: &Value) -> Result<Topology, (&'static str, String)> {
    let cpu = &preference["cpu"];
    let count = u32::try_from(vcpus).ok().filter(|count| *count > 0);
    let Some(count) = count else {
        return Err((
            "spec.instancetype",
            format!("cpu.guest: {vcpus} is no number of processors"),
        ));
    };
    let one = Topology { sockets: 1, cores: 1, threads: 1 };
    match cpu["preferredCPUTopology"].as_str().unwrap_or_default() {
        "" | "sockets" | "any" | "preferSockets" | "preferAny" => {
            Ok(Topology { sockets: count, ..one })
        }
        "cores" | "preferCores" => Ok(Topology { cores: count, ..one }),
        "threads" | "preferThreads" => Ok(Topology { threads: count, ..one }),
        "spread" | "preferSpread" if count == 1 => Ok(one),
        "spread" | "preferSpread" => {
            spread(count, preference).map_err(|why| ("spec.preference", why))
        }
        other => Err((
            "spec.preference",
            format!(
                "cpu.preferredCPUTopology: '{other}' is not known: say sockets, cores, threads, spread or any"
            ),
        )),
    }
}

fn spread(count: u32, preference: &Value) -> Result<Topology, String> {
    let options = &preference["cpu"]["spreadOptions"];
    let said = |value: &Value| value.as_u64().filter(|ratio| *ratio > 0);
    let ratio = said(&options["ratio"])
        .or(said(&preference["preferSpreadSocketToCoreRatio"]))
        .unwrap_or(RATIO);
    let ratio = u32::try_from(ratio).unwrap_or(u32::MAX);
    // None: as many as there are, of one socket.
    let (cores, threads) = match options["across"].as_str().unwrap_or("SocketsCores") {
        "SocketsCores" => (Some(ratio), 1),
        "SocketsCoresThreads" => (Some(ratio), THREADS),
        "CoresThreads" if ratio == THREADS => (None, THREADS),
        "CoresThreads" => {
            return Err("cpu.spreadOptions.ratio: must be 2 across CoresThreads".into());
        }
        other => {
            return Err(format!(
                "cpu.spreadOptions.across: '{other}' is not known: say SocketsCores, CoresThreads or \
                 SocketsCoresThreads"
            ));
        }
    };
    let unit = cores.unwrap_or(1).checked_mul(threads);
    let rest = unit.filter(|unit| count.is_multiple_of(*unit)).map(|unit| count / unit);
    let rest = rest.ok_or_else(|| {
        format!("cpu.spreadOptions: {count} processors cannot be spread by a ratio of {ratio}")
    })?;
    Ok(match cores {
        Some(cores) => Topology { sockets: rest, cores, threads },
        None => Topology { sockets: 1, cores: rest, threads },
    })
}
