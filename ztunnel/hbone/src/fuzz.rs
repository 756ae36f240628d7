//! Invariants of the parsers of what peers send. Plain functions: the tests drive them.

use crate::{Authority, Baggage, Forwarded, TraceParent, engine};

/// What parses as an authority prints as one that parses to the same.
///
/// # Panics
///
/// Panics where that does not hold.
pub fn authority(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(parsed) = text.parse::<Authority>() {
        let printed = parsed.to_string();
        assert_eq!(printed.parse(), Ok(parsed), "{printed}");
    }
}

/// What parses as baggage prints as baggage that parses to the same.
///
/// # Panics
///
/// Panics where that does not hold.
pub fn baggage(bytes: &[u8]) {
    if let Some(parsed) = Baggage::parse([bytes]) {
        let printed = parsed.to_string();
        let again = Baggage::parse([printed.as_bytes()]);
        let named = parsed.workload_name.is_some();
        let same = again.as_ref().is_some_and(|again| {
            Baggage { kind: again.kind, ..parsed.clone() } == *again
                && (!named || again.kind == parsed.kind)
        });
        assert!(same, "{printed}");
    }
}

/// What parses as forwarded prints as what parses to the same host.
///
/// # Panics
///
/// Panics where that does not hold.
pub fn forwarded(bytes: &[u8]) {
    let parsed = Forwarded::parse(bytes);
    let printed = parsed.to_string();
    assert_eq!(Forwarded::parse(printed.as_bytes()).host, parsed.host, "{printed}");
}

/// What parses as a trace prints as it came.
///
/// # Panics
///
/// Panics where that does not hold.
pub fn trace_parent(bytes: &[u8]) {
    if let Some(parsed) = TraceParent::parse(bytes) {
        assert_eq!(parsed.to_string().as_bytes(), bytes);
    }
}

/// Frames of a client, whatever they are, end in an error or in none, and leave the windows within bounds.
///
/// # Panics
///
/// Panics where that does not hold.
pub fn frames(bytes: &[u8]) {
    engine::fuzz(bytes);
}

/// A block of headers, whatever it is, is read or not.
pub fn headers(bytes: &[u8]) {
    engine::fuzz_headers(bytes);
}
