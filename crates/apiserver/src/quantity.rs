//! Quantities such as `500m` and `1Gi`, exactly.
//!
//! Source: k8s.io/apimachinery's `resource.Quantity`: what is finer than a billionth is rounded up.

use serde_json::Value;
use std::cmp::Ordering;
use std::fmt;

/// Billionths, and how to write them.
#[derive(Debug, Clone, Copy)]
pub struct Quantity {
    nanos: i128,
    form: Form,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// `k`, `M`, `G`, and `m` below one.
    Decimal,
    /// `Ki`, `Mi`, `Gi`.
    Binary,
    /// `1e3`.
    Exponent,
}

const NANO: i128 = 1_000_000_000;
const BINARY: [(&str, u32); 6] =
    [("Ei", 60), ("Pi", 50), ("Ti", 40), ("Gi", 30), ("Mi", 20), ("Ki", 10)];
const DECIMAL: [(&str, i32); 10] = [
    ("E", 18),
    ("P", 15),
    ("T", 12),
    ("G", 9),
    ("M", 6),
    ("k", 3),
    ("", 0),
    ("m", -3),
    ("u", -6),
    ("n", -9),
];

impl Quantity {
    /// Nothing.
    pub const ZERO: Self = Self { nanos: 0, form: Form::Decimal };

    /// So many.
    pub fn whole(n: i64) -> Self {
        Self { nanos: i128::from(n) * NANO, form: Form::Decimal }
    }

    /// Of a text or a number.
    pub fn of(value: &Value) -> Option<Self> {
        match value {
            Value::String(text) => Self::parse(text),
            Value::Number(number) => Self::parse(&number.to_string()),
            _ => None,
        }
    }

    /// Of a text.
    pub fn parse(text: &str) -> Option<Self> {
        const LONGEST: usize = 64;
        if text.len() > LONGEST {
            return None;
        }
        let (negative, rest) = match text.as_bytes().first()? {
            b'-' => (true, &text[1..]),
            b'+' => (false, &text[1..]),
            _ => (false, text),
        };
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, suffix) = rest.split_at(end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
            return None;
        }
        let digits: i128 = format!("0{whole}{fraction}").parse().ok()?;
        let places = i32::try_from(fraction.len()).ok()?;
        let (nanos, form) = match BINARY.iter().find(|(name, _)| *name == suffix) {
            Some((_, bits)) => {
                let scaled = digits.checked_mul(NANO)?.checked_mul(1_i128 << bits)?;
                (divide_up(scaled, ten(places)?), Form::Binary)
            }
            None => {
                let (exponent, form) = decimal_exponent(suffix)?;
                let power = exponent + 9 - places;
                let nanos = match power >= 0 {
                    true => digits.checked_mul(ten(power)?)?,
                    false => divide_up(digits, ten(-power)?),
                };
                (nanos, form)
            }
        };
        Some(Self { nanos: if negative { -nanos } else { nanos }, form })
    }

    /// The sum; what is too large is the largest.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        let form = if self.nanos == 0 { other.form } else { self.form };
        Self { nanos: self.nanos.saturating_add(other.nanos), form }
    }

    /// The difference.
    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        self.plus(Self { nanos: -other.nanos, ..other })
    }

    /// The greater of two.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        if other > self { other } else { self }
    }

    /// Whole units, rounded up.
    pub fn units(self) -> i64 {
        i64::try_from(divide_up(self.nanos, NANO)).unwrap_or(i64::MAX)
    }

    /// Thousandths, rounded up.
    pub fn millis(self) -> i64 {
        i64::try_from(divide_up(self.nanos, NANO / 1000)).unwrap_or(i64::MAX)
    }

    /// Less than nothing.
    pub fn is_negative(self) -> bool {
        self.nanos < 0
    }
}

fn ten(power: i32) -> Option<i128> {
    10_i128.checked_pow(u32::try_from(power).ok()?)
}

fn divide_up(n: i128, by: i128) -> i128 {
    n.div_euclid(by) + i128::from(n.rem_euclid(by) != 0)
}

fn decimal_exponent(suffix: &str) -> Option<(i32, Form)> {
    if let Some((_, exponent)) = DECIMAL.iter().find(|(name, _)| *name == suffix) {
        return Some((*exponent, Form::Decimal));
    }
    let exponent: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
    (-30..=18).contains(&exponent).then_some((exponent, Form::Exponent))
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Self) -> bool {
        self.nanos == other.nanos
    }
}

impl Eq for Quantity {}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Quantity {
    fn cmp(&self, other: &Self) -> Ordering {
        self.nanos.cmp(&other.nanos)
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nanos == 0 {
            return f.write_str("0");
        }
        if self.form == Form::Binary && self.nanos % NANO == 0 {
            let units = self.nanos / NANO;
            // Below 1024 it is written without a suffix.
            if units.unsigned_abs() < 1024 {
                return write!(f, "{units}");
            }
            let fit = BINARY.iter().find(|(_, bits)| units % (1_i128 << bits) == 0);
            return match fit {
                Some((name, bits)) => write!(f, "{}{name}", units >> bits),
                None => write!(f, "{units}"),
            };
        }
        let (name, exponent, n) = DECIMAL
            .iter()
            .find_map(|(name, exponent)| {
                let unit = ten(exponent + 9)?;
                (self.nanos % unit == 0).then_some((*name, *exponent, self.nanos / unit))
            })
            .unwrap_or(("n", -9, self.nanos));
        match self.form {
            Form::Exponent if exponent != 0 => write!(f, "{n}e{exponent}"),
            _ => write!(f, "{n}{name}"),
        }
    }
}

/// How two quantities compare, if both are.
pub fn compare(one: &Value, other: &Value) -> Option<Ordering> {
    Some(Quantity::of(one)?.cmp(&Quantity::of(other)?))
}
