//! The text of settings as values. Each parser's error says what to write instead.

use std::time::Duration;

/// A number of things, or a share of what there is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Amount {
    /// So many; 0 means all.
    Count(u64),
    /// So many in a hundred.
    Percent(f64),
}

impl Amount {
    /// How many of a total: all for a count of 0; a share is rounded up and at least 1.
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "rounded, positive, saturating"
    )]
    #[expect(clippy::cast_precision_loss, reason = "totals are numbers of cores")]
    pub fn of(self, total: u64) -> u64 {
        match self {
            Self::Count(0) => total,
            Self::Count(count) => count,
            Self::Percent(percent) => ((total as f64 * percent / 100.0).ceil() as u64).max(1),
        }
    }
}

pub(super) const DURATION: &str =
    "a duration such as 500ms, 30s, 3m, 1d or 3m+31 (a bare number is seconds)";

/// Reads a duration: `500ms`, `3m`, `1d`, sums like `3m+31` or `1h30m`, bare numbers as seconds. None if it is
/// anything else, or too long to hold.
#[must_use]
pub fn parse_duration(text: &str) -> Option<Duration> {
    let mut total = Duration::ZERO;
    for term in text.split('+') {
        let mut rest = term.trim();
        if rest.is_empty() {
            return None;
        }
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
            let (number, after) = rest.split_at_checked(digits)?;
            let letters = after.find(|c: char| !c.is_alphabetic()).unwrap_or(after.len());
            let (unit, after) = after.split_at_checked(letters)?;
            total = total.checked_add(scale(number, unit)?)?;
            rest = after.trim_start();
        }
    }
    Some(total)
}

fn scale(number: &str, unit: &str) -> Option<Duration> {
    let nanos: u64 = match unit {
        "ns" => 1,
        "us" | "µs" => 1_000,
        "ms" => 1_000_000,
        "s" | "" => 1_000_000_000,
        "m" => 60_000_000_000,
        "h" => 3_600_000_000_000,
        "d" => 86_400_000_000_000,
        "w" => 604_800_000_000_000,
        _ => return None,
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(nanos).map(Duration::from_nanos);
    }
    // A fraction, such as 1.5h. The first character must be a digit: no signs, no `inf`.
    let fraction: f64 =
        number.parse().ok().filter(|_| number.starts_with(|c: char| c.is_ascii_digit()))?;
    Duration::try_from_secs_f64(fraction * Duration::from_nanos(nanos).as_secs_f64()).ok()
}

pub(super) const BYTES: &str = "a number of bytes such as 65536, 64Ki or 4Mi";

/// A whole number with an optional suffix: k, M, G of 1000, Ki, Mi, Gi of 1024.
pub(super) fn parse_bytes(text: &str) -> Option<u64> {
    let suffixes = [
        ("Ki", 1_u64 << 10),
        ("Mi", 1 << 20),
        ("Gi", 1 << 30),
        ("k", 1_000),
        ("M", 1_000_000),
        ("G", 1_000_000_000),
    ];
    let text = text.trim();
    for (suffix, unit) in suffixes {
        if let Some(number) = text.strip_suffix(suffix) {
            return parse_count(number.trim_end())?.checked_mul(unit);
        }
    }
    parse_count(text)
}

/// A whole number, digits only.
pub(super) fn parse_count(text: &str) -> Option<u64> {
    // `parse` would take a plus sign.
    text.trim().parse().ok().filter(|_| text.trim().bytes().all(|byte| byte.is_ascii_digit()))
}

pub(super) const CPU: &str = "a Kubernetes CPU quantity such as 2, 1.5 or 1500m";

/// A Kubernetes CPU quantity in whole cores, rounded up
/// (<https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/>).
pub(super) fn parse_cpu(text: &str) -> Option<u64> {
    let text = text.trim();
    let suffixes = [("n", -9), ("u", -6), ("m", -3), ("k", 3), ("M", 6), ("G", 9)];
    let (number, mut exponent) = suffixes
        .iter()
        .find_map(|(suffix, exponent)| text.strip_suffix(suffix).map(|number| (number, *exponent)))
        .unwrap_or((text, 0));
    let (number, scientific) = number.split_once(['e', 'E']).map_or((number, ""), |(n, e)| (n, e));
    if !scientific.is_empty() {
        exponent = scientific.parse().ok().filter(|e: &i32| exponent == 0 && e.abs() <= 18)?;
    } else if number.len() < text.len() && exponent == 0 {
        return None;
    }
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = format!("{whole}{fraction}");
    // Exact in whole numbers: 1.0 must not become 2 cores by a rounding error.
    let value = parse_count(&digits).map(u128::from)?;
    exponent -= i32::try_from(fraction.len()).ok()?;
    let scale = 10_u128.checked_pow(exponent.unsigned_abs())?;
    let cores = if exponent < 0 { value.div_ceil(scale) } else { value.checked_mul(scale)? };
    u64::try_from(cores).ok()
}

pub(super) const AMOUNT: &str = "a number (0 = all) or a percentage such as 50%";

pub(super) fn parse_amount(text: &str) -> Option<Amount> {
    let text = text.trim();
    let Some(percent) = text.strip_suffix('%') else { return parse_count(text).map(Amount::Count) };
    let percent: f64 = percent.trim().parse().ok()?;
    (percent > 0.0 && percent.is_finite()).then_some(Amount::Percent(percent))
}
