//! What a move would take, before it begins: measured at the guest, reckoned with the link. Pure but
//! for [`measure`].

pub mod measure;

use crate::migration::policy::Policy;
use crate::migration::progress::{Outlook, series};
use crate::migration::source::FIXED;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// A guest as it was measured for about a second.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes of memory that the guest dirties, per second.
    pub memory_dirty_rate: u64,
    /// Its disks.
    pub disks: Vec<MeasuredDisk>,
}

/// A disk as it was measured.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct MeasuredDisk {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// Bytes of it that are no holes.
    pub data: u64,
    /// Bytes that the guest writes, per second.
    pub dirty_rate: u64,
    /// Bytes per second at which samples of it were read.
    pub read_rates: Vec<f64>,
    /// All hosts can use it: it is only copied when it goes to other storage.
    pub shared: bool,
    /// Nobody writes it: it is at the target too.
    pub read_only: bool,
}

/// The way to the target.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Way {
    /// Round-trip time in milliseconds.
    pub rtt_ms: f64,
    /// Bytes per second, of several spans.
    pub rates: Vec<f64>,
}

/// A figure, and between which it will most likely be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Band {
    /// If all goes as well as the best that was measured.
    pub low: f64,
    /// As the middle of what was measured.
    pub likely: f64,
    /// As the worst.
    pub high: f64,
}

/// What a move would take.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Forecast {
    /// Bytes of disk to be copied.
    pub disk: u64,
    /// Bytes of memory to be sent.
    pub memory: u64,
    /// Bytes per second that will arrive.
    pub rate: Band,
    /// What limits that: `link`, `source-read` or `policy`.
    pub limit: String,
    /// From the first byte to the guest's run at the target. None: the guest cannot be caught.
    pub seconds: Option<Band>,
    /// How long the guest stands still, milliseconds.
    pub downtime_ms: Option<Band>,
    /// What speaks against it.
    pub doubts: Vec<String>,
}

/// The least, the middle and the most of some figures.
fn spread(figures: impl IntoIterator<Item = f64>) -> Option<[f64; 3]> {
    let mut all: Vec<f64> = figures.into_iter().filter(|f| f.is_finite() && *f > 0.0).collect();
    all.sort_by(f64::total_cmp);
    Some([*all.first()?, all[all.len() / 2], *all.last()?])
}

/// Reckons what a move would take. `all`: shared disks are copied too.
pub fn forecast(guest: &Measured, way: &Way, policy: &Policy, all: bool) -> Forecast {
    let copied: Vec<_> =
        guest.disks.iter().filter(|disk| !disk.read_only && (all || !disk.shared)).collect();
    let disk: u64 = copied.iter().map(|disk| disk.data).sum();
    let written: u64 = copied.iter().map(|disk| disk.dirty_rate).sum();
    let mut forecast = Forecast { disk, memory: guest.memory, ..Forecast::default() };
    let Some(link) = spread(way.rates.iter().copied()) else {
        forecast.doubts.push("the link could not be measured".into());
        return forecast;
    };
    let read = spread(copied.iter().flat_map(|disk| disk.read_rates.iter().copied()));
    let most = policy.bandwidth.map_or(f64::INFINITY, |most| most as f64);
    let limits = [("link", link[1]), ("source-read", read.map_or(f64::INFINITY, |r| r[1]))];
    let limits = limits.into_iter().chain([("policy", most)]);
    let least = limits.min_by(|a, b| a.1.total_cmp(&b.1));
    forecast.limit = least.map_or("link", |(name, _)| name).into();
    // From the worst to the best.
    let outlook = [0, 1, 2].map(|n| {
        let memory_rate = link[n].min(most);
        Outlook {
            disk_left: disk,
            disk_rate: read.map_or(memory_rate, |read| read[n].min(memory_rate)),
            disk_dirty_rate: written as f64,
            memory_left: guest.memory,
            memory_rate,
            memory_dirty_rate: guest.memory_dirty_rate as f64,
            buffered: 0,
            rtt: Duration::from_secs_f64((way.rtt_ms / 1e3).clamp(0.0, 60.0)),
            fixed: FIXED,
        }
    });
    forecast.rate = band(outlook.map(|o| o.disk_rate)).unwrap_or_default();
    forecast.seconds = band_of(outlook.map(|o| o.eta()));
    let overhead = outlook[1].overhead().as_secs_f64() * 1e3;
    let pause = [policy.rounds.max_downtime_ms, policy.rounds.downtime_ms, 0];
    let pauses = [0, 1, 2].map(|n| overhead + pause[n] as f64);
    forecast.downtime_ms = forecast.seconds.and_then(|_| band(pauses));
    let caught = |what: &str, dirty: u64, rate: f64| {
        series(1, rate, dirty as f64).is_none().then(|| {
            let mib = |bytes: f64| (bytes / f64::from(1 << 20)).round();
            format!(
                "the guest dirties its {what} at {} MiB/s, and {} MiB/s would arrive: it would not be caught",
                mib(dirty as f64),
                mib(rate)
            )
        })
    };
    let disks = caught("disks", written, outlook[1].disk_rate).filter(|_| disk > 0);
    forecast.doubts.extend(disks);
    forecast.doubts.extend(caught("memory", guest.memory_dirty_rate, outlook[1].memory_rate));
    forecast
}

/// Of figures for the worst, the middle and the best.
fn band(figures: [f64; 3]) -> Option<Band> {
    let [low, likely, high] = spread(figures)?;
    Some(Band { low, likely, high })
}

/// The same, where the worst may be unknown: then it is the middle.
fn band_of([worst, middle, best]: [Option<f64>; 3]) -> Option<Band> {
    let middle = middle?;
    band([worst.unwrap_or(middle), middle, best.unwrap_or(middle)])
}

#[cfg(test)]
mod test {
    use super::*;
    use proptest::prelude::*;

    fn guest(data: u64, written: u64, memory: u64, dirtied: u64, shared: bool) -> Measured {
        let disk = MeasuredDisk {
            name: "root".into(),
            size: data,
            data,
            dirty_rate: written,
            read_rates: vec![4e8, 5e8, 6e8],
            shared,
            read_only: false,
        };
        Measured { memory, memory_dirty_rate: dirtied, disks: vec![disk] }
    }

    proptest! {
        #[test]
        fn bands_are_in_order_and_more_to_move_takes_no_less(
            data in 0u64..1 << 40, memory in 1u64..1 << 36, rates in prop::collection::vec(1e5..1e10f64, 1..9),
            rtt_ms in 0.0..500.0f64, limit in prop::option::of(1u64 << 16..1 << 33),
        ) {
            let way = Way { rtt_ms, rates };
            let policy = Policy { bandwidth: limit, ..Policy::default() };
            let of = |data| forecast(&guest(data, 0, memory, 0, false), &way, &policy, false);
            let one = of(data);
            let seconds = one.seconds.expect("an idle guest is always caught");
            for band in [seconds, one.downtime_ms.unwrap(), one.rate] {
                prop_assert!(band.low <= band.likely && band.likely <= band.high);
            }
            prop_assert!(of(data + (1 << 30)).seconds.unwrap().likely >= seconds.likely);
            // Nothing arrives faster than the policy lets it.
            let least = limit.map_or(0.0, |limit| (data + memory) as f64 / limit as f64);
            prop_assert!(seconds.low >= least * 0.999);
            prop_assert!(one.doubts.is_empty());
        }
    }

    #[test]
    fn a_guest_that_cannot_be_caught_is_doubted_by_what_it_dirties_and_shared_disks_are_not_copied()
    {
        let way = Way { rtt_ms: 1.0, rates: vec![1e8; 3] };
        let of = |guest, all| forecast(&guest, &way, &Policy::default(), all);
        let written = of(guest(1 << 30, 200_000_000, 1 << 28, 0, false), false);
        assert!(written.seconds.is_none() && written.doubts[0].contains("disks"), "{written:?}");
        let dirtied = of(guest(1 << 30, 0, 1 << 28, 200_000_000, false), false);
        assert!(dirtied.seconds.is_none() && dirtied.doubts[0].contains("memory"), "{dirtied:?}");
        assert_eq!(of(guest(1 << 30, 0, 1, 0, true), false).disk, 0);
        assert_eq!(of(guest(1 << 30, 0, 1, 0, true), true).disk, 1 << 30);
        assert!(
            !forecast(&Measured::default(), &Way::default(), &Policy::default(), false)
                .doubts
                .is_empty()
        );
    }
}
