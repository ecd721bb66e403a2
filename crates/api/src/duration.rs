//! Durations, as Go writes them: `168h0m0s`, `1.5h`, `300ms`.

use std::time::Duration;

/// Units by their length; longer names first, since `m` begins `ms`.
const UNITS: [(&str, f64); 7] = [
    ("ns", 1e-9),
    ("us", 1e-6),
    ("µs", 1e-6),
    ("ms", 1e-3),
    ("s", 1.0),
    ("m", 60.0),
    ("h", 3600.0),
];

/// Reads one that is not negative.
pub fn parse(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    let mut sum = Duration::ZERO;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..end].parse().ok()?;
        rest = &rest[end..];
        let (unit, seconds) = UNITS.iter().find(|(unit, _)| rest.starts_with(unit))?;
        rest = &rest[unit.len()..];
        sum = sum.checked_add(Duration::try_from_secs_f64(number * seconds).ok()?)?;
    }
    // Go counts nanoseconds in 63 bits; what is longer is none there, either.
    (sum.as_nanos() <= i64::MAX as u128).then_some(sum)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn durations_are_read_as_go_writes_them() {
        let seconds = |text| parse(text).map(|found| found.as_secs_f64());
        assert_eq!(seconds("168h0m0s"), Some(604_800.0));
        assert_eq!(seconds("1h30m"), Some(5400.0));
        assert_eq!(seconds("1.5h"), Some(5400.0));
        assert_eq!(seconds("300ms"), Some(0.3));
        assert_eq!(seconds("0"), Some(0.0));
        for wrong in ["", "1", "h", "-1h", "1d", "1h ", "1..5h", ".", "99999999999h"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
