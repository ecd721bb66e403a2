//! Kubernetes' quantities, as sizes.

/// A quantity in whole bytes, rounded up: `512Mi`, `2G`, `1.5Gi`, `1e9`. None for what is none.
pub fn bytes(text: &str) -> Option<i128> {
    const SUFFIXES: [(&str, i128); 13] = [
        ("Ki", 1 << 10),
        ("Mi", 1 << 20),
        ("Gi", 1 << 30),
        ("Ti", 1 << 40),
        ("Pi", 1 << 50),
        ("Ei", 1 << 60),
        ("k", 1_000),
        ("M", 1_000_000),
        ("G", 1_000_000_000),
        ("T", 1_000_000_000_000),
        ("P", 1_000_000_000_000_000),
        ("E", 1_000_000_000_000_000_000),
        ("", 1),
    ];
    if let Some(milli) = text.strip_suffix('m') {
        return Some(
            milli.parse::<i128>().ok()?.div_euclid(1000) + i128::from(!milli.ends_with("000")),
        );
    }
    let (number, unit) =
        SUFFIXES.iter().find_map(|(suffix, unit)| Some((text.strip_suffix(suffix)?, *unit)))?;
    if let Some((digits, exponent)) = number.split_once(['e', 'E']) {
        let power = 10_i128.checked_pow(exponent.parse().ok()?)?;
        return bytes(digits)?.checked_mul(power);
    }
    let (sign, number) = match number.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, number.strip_prefix('+').unwrap_or(number)),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || !digits(fraction) || whole.len() + fraction.len() == 0 {
        return None;
    }
    // 18 digits are more than any size needs.
    let (whole, fraction) = (&whole[..whole.len()], &fraction[..fraction.len().min(18)]);
    let mut size =
        if whole.is_empty() { 0 } else { whole.parse::<i128>().ok()? }.checked_mul(unit)?;
    if !fraction.is_empty() {
        let scale = 10_i128.pow(u32::try_from(fraction.len()).ok()?);
        let part = fraction.parse::<i128>().ok()?.checked_mul(unit)?;
        size += (part + scale - 1) / scale;
    }
    Some(sign * size)
}

#[cfg(test)]
mod test {
    #[test]
    fn sizes_are_what_kubernetes_takes_them_for() {
        for (text, size) in [
            ("512Mi", Some(512 << 20)),
            ("1.5Gi", Some(3 << 29)),
            ("2G", Some(2_000_000_000)),
            ("1e3", Some(1000)),
            ("100", Some(100)),
            ("1500m", Some(2)),
            ("-1", Some(-1)),
            ("0.1", Some(1)),
            ("", None),
            ("Mi", None),
            ("1Xi", None),
            ("1 Gi", None),
            ("99999999999999999999999999999999999999Ei", None),
        ] {
            assert_eq!(super::bytes(text), size, "{text}");
        }
    }
}
