//! Limits on a disk's writes: a throttle group as QEMU has it, a leaky bucket
//! for bytes and one for writes. The caller brings the time.

use super::error::Error;
use serde_json::{Map, Value};
use std::time::{Duration, Instant};

/// Each limit has a burst and the burst's length beside it.
const KINDS: [&str; 6] =
    ["bps-total", "bps-read", "bps-write", "iops-total", "iops-read", "iops-write"];
/// QEMU's largest limit.
const MOST: u64 = 1_000_000_000_000_000;

/// A throttle group.
#[derive(Debug)]
pub struct Group {
    /// Its object's id.
    pub id: String,
    /// All limits by name, as `qom-get` shows them.
    limits: Map<String, Value>,
    bytes: Bucket,
    writes: Bucket,
}

impl Group {
    /// A group with these `limits`; what is not given is no limit.
    ///
    /// # Errors
    /// As [`Group::set`].
    pub fn new(id: &str, limits: Option<&Value>) -> Result<Self, Error> {
        let mut all = Map::new();
        for kind in KINDS {
            all.insert(kind.to_owned(), 0.into());
            all.insert(format!("{kind}-max"), 0.into());
            all.insert(format!("{kind}-max-length"), 1.into());
        }
        all.insert("iops-size".into(), 0.into());
        let (bytes, writes) = (Bucket::default(), Bucket::default());
        let mut group = Self { id: id.to_owned(), limits: all, bytes, writes };
        if let Some(limits) = limits {
            group.set(limits)?;
        }
        Ok(group)
    }

    /// All limits.
    pub fn limits(&self) -> Value {
        self.limits.clone().into()
    }

    /// Changes the limits that are given.
    ///
    /// # Errors
    /// As QEMU; then nothing has changed.
    pub fn set(&mut self, limits: &Value) -> Result<(), Error> {
        let Value::Object(given) = limits else {
            let text = "Invalid parameter type for 'limits', expected: object";
            return Err(Error::generic(text));
        };
        let mut all = self.limits.clone();
        for (name, value) in given {
            if !all.contains_key(name) {
                return Err(Error::generic(format!("Parameter 'limits.{name}' is unexpected")));
            }
            match value.as_i64() {
                Some(limit) if (0..=MOST as i64).contains(&limit) => {}
                Some(_) => {
                    let text = format!("bps/iops/max values must be within [0, {MOST}]");
                    return Err(Error::generic(text));
                }
                None => {
                    let text = format!("Parameter 'limits.{name}' expects int64");
                    return Err(Error::generic(text));
                }
            }
            all.insert(name.clone(), value.clone());
        }
        for unit in ["bps", "iops"] {
            let limit = |kind: &str| all[&format!("{unit}-{kind}")].as_u64().unwrap_or(0);
            if limit("total") > 0 && limit("read") + limit("write") > 0 {
                return Err(Error::generic(
                    "bps/iops/max total values and read/write values cannot be used at the same time",
                ));
            }
        }
        self.limits = all;
        self.bytes = self.bucket("bps");
        self.writes = self.bucket("iops");
        Ok(())
    }

    fn bucket(&self, unit: &str) -> Bucket {
        let limit = |kind: &str| self.limits[&format!("{unit}-{kind}")].as_u64().unwrap_or(0);
        // Never both: that was refused.
        let rate = limit("total") + limit("write");
        let burst = limit("total-max") + limit("write-max");
        // Without a burst QEMU lets through what the rate allows in a tenth of a second.
        let room = if burst > 0 { burst as f64 } else { rate as f64 / 10.0 };
        Bucket { rate: rate as f64, room, level: 0.0, at: None }
    }

    /// When a write may begin: at `now` or later.
    pub fn earliest(&mut self, now: Instant) -> Instant {
        now + self.bytes.wait(now).max(self.writes.wait(now))
    }

    /// Counts writes that were done.
    pub fn spend(&mut self, bytes: u64, writes: u64) {
        self.bytes.level += bytes as f64;
        self.writes.level += writes as f64;
    }
}

/// Leaks at `rate`; whoever comes while it is fuller than `room` waits.
#[derive(Debug, Default)]
struct Bucket {
    rate: f64,
    room: f64,
    level: f64,
    at: Option<Instant>,
}

impl Bucket {
    fn wait(&mut self, now: Instant) -> Duration {
        let passed = self.at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        self.at = Some(now);
        if self.rate == 0.0 {
            self.level = 0.0;
            return Duration::ZERO;
        }
        self.level = (self.level - self.rate * passed.as_secs_f64()).max(0.0);
        Duration::from_secs_f64((self.level - self.room).max(0.0) / self.rate)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use serde_json::json;

    #[test]
    fn over_time_the_rate_is_kept_and_zero_is_no_limit() {
        let mut group = Group::new("g", Some(&json!({"bps-write": 1_000_000}))).unwrap();
        let begin = Instant::now();
        let mut now = begin;
        for _ in 0..1000 {
            now = group.earliest(now);
            group.spend(4096, 1);
        }
        let seconds = (now - begin).as_secs_f64();
        assert!((3.9..4.1).contains(&seconds), "4 MB at 1 MB/s, a tenth at once: {seconds} s");
        group.set(&json!({"bps-write": 0, "iops-write": 10})).unwrap();
        assert_eq!(group.earliest(now), now);
        group.spend(1 << 30, 2);
        let later = group.earliest(now) - now;
        assert!((0.09..0.11).contains(&later.as_secs_f64()), "one write over: {later:?}");
    }

    #[test]
    fn a_refused_change_changes_nothing() {
        let mut group = Group::new("g", None).unwrap();
        let before = group.limits();
        for bad in [
            json!(7),
            json!({"bps-write": -5}),
            json!({"x": 1}),
            json!({"bps-write": 5, "bps-total": 6}),
        ] {
            group.set(&bad).unwrap_err();
        }
        assert_eq!(group.limits(), before);
    }
}
