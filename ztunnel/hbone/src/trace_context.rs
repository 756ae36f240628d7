//! The `traceparent` header: W3C Trace Context, version 00.

use std::fmt;

/// Where a request stands in a trace.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TraceParent {
    trace: u128,
    parent: u64,
    flags: u8,
}

/// The length of the header: RFC-like fixed widths, with three dashes.
const LEN: usize = 55;

impl TraceParent {
    /// The beginning of a trace that nobody samples.
    #[must_use]
    pub fn random() -> Self {
        // All zeroes is invalid in both.
        Self { trace: fastrand::u128(1..), parent: fastrand::u64(1..), flags: 0 }
    }

    /// Reads the header.
    #[must_use]
    pub fn parse(line: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(line).ok().filter(|text| text.len() == LEN)?;
        let mut parts = text.split('-');
        let mut hex = |width: usize| {
            let part = parts.next().filter(|part| part.len() == width)?;
            let lower = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
            part.bytes().all(lower).then_some(part)
        };
        let (version, trace, parent, flags) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
        let this = Self {
            trace: u128::from_str_radix(trace, 16).ok()?,
            parent: u64::from_str_radix(parent, 16).ok()?,
            flags: u8::from_str_radix(flags, 16).ok()?,
        };
        (version == "00" && this.trace != 0 && this.parent != 0).then_some(this)
    }
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { trace, parent, flags } = self;
        write!(f, "00-{trace:032x}-{parent:016x}-{flags:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads() {
        let good = "00-9bcb0223f264fb190b8d88e306a35aeb-bb7f1d003f35906a-00";
        assert_eq!(TraceParent::parse(good.as_bytes()).unwrap().to_string(), good);
        for bad in [
            "",
            "00-9bcb0223f264fb190b8d88e306a35aeb-bb7f1d003f35906a-0",
            "01-9bcb0223f264fb190b8d88e306a35aeb-bb7f1d003f35906a-00",
            "00-00000000000000000000000000000000-bb7f1d003f35906a-00",
            "00-9bcb0223f264fb190b8d88e306a35aeb-0000000000000000-00",
            "00-9BCB0223f264fb190b8d88e306a35aeb-bb7f1d003f35906a-00",
            "00-+bcb0223f264fb190b8d88e306a35aeb-bb7f1d003f35906a-00",
        ] {
            assert_eq!(TraceParent::parse(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn what_is_made_parses() {
        for _ in 0..1000 {
            let made = TraceParent::random();
            assert_eq!(TraceParent::parse(made.to_string().as_bytes()), Some(made));
        }
    }
}
