//! The `OpenMetrics` text (<https://github.com/prometheus/OpenMetrics>), as Prometheus and promtool read it.

use std::fmt::Write as _;

use super::labels::{Labels, escape};

/// What is said once of a family.
#[derive(Clone, Copy, Debug)]
pub(super) struct Meta {
    /// Without `_total`.
    pub(super) name: &'static str,
    help: &'static str,
    kind: Kind,
    unit: &'static str,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// Samples on their way into the text.
#[derive(Debug, Default)]
pub struct Samples {
    families: Vec<(Meta, String)>,
    current: usize,
}

impl Meta {
    pub(super) fn new(name: &'static str, help: &'static str, kind: Kind) -> Self {
        let name = match kind {
            Kind::Counter => name.strip_suffix("_total").unwrap_or(name),
            Kind::Gauge | Kind::Histogram => name,
        };
        Self { name, help, kind, unit: "" }
    }

    pub(super) fn in_unit(mut self, unit: &'static str) -> Self {
        debug_assert!(self.name.ends_with(unit), "{} must end in its unit, {unit}", self.name);
        self.unit = unit;
        self
    }

    /// The order of the groups. Ours, which upstream does not have, come last.
    fn rank(&self) -> u8 {
        let prefixes = ["process_", "tokio_", "istio_", "workload_manager_"];
        let known = prefixes.iter().position(|prefix| self.name.starts_with(prefix));
        known.and_then(|rank| u8::try_from(rank).ok()).unwrap_or(u8::MAX)
    }

    fn write(&self, text: &mut String) {
        let Self { name, help, kind, unit } = *self;
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        text.push_str("# HELP ");
        text.push_str(name);
        text.push(' ');
        escape(text, help);
        // The first two groups have no full stop upstream.
        if self.rank() > 1 && !help.ends_with('.') {
            text.push('.');
        }
        line(text, format_args!("\n# TYPE {name} {kind}\n"));
        if !unit.is_empty() {
            line(text, format_args!("# UNIT {name} {unit}\n"));
        }
    }
}

impl Samples {
    /// Adds one sample of a counter. `name` may end in `_total` or not.
    pub fn counter(&mut self, name: &'static str, help: &'static str, labels: &Labels, value: f64) {
        self.begin(Meta::new(name, help, Kind::Counter));
        self.number("_total", labels, value);
    }

    /// Adds one sample of a gauge.
    pub fn gauge(&mut self, name: &'static str, help: &'static str, labels: &Labels, value: f64) {
        self.begin(Meta::new(name, help, Kind::Gauge));
        self.number("", labels, value);
    }

    /// Makes a family the one that samples go to.
    pub(super) fn begin(&mut self, meta: Meta) {
        let known = self.families.iter().rposition(|(other, _)| other.name == meta.name);
        self.current = known.unwrap_or_else(|| {
            self.families.push((meta, String::new()));
            self.families.len() - 1
        });
    }

    pub(super) fn whole(&mut self, suffix: &str, labels: &Labels, value: u64) {
        let (name, text) = self.open(suffix, labels);
        line(text, format_args!("{name} {value}\n"));
    }

    pub(super) fn number(&mut self, suffix: &str, labels: &Labels, value: f64) {
        let (name, text) = self.open(suffix, labels);
        line(text, format_args!("{name} "));
        number(text, value);
        text.push('\n');
    }

    /// Sum, count, and cumulative buckets whose first label is their bound.
    pub(super) fn histogram(&mut self, labels: &Labels, sum: f64, buckets: &[(f64, u64)]) {
        let (prefix, text) = self.open("_sum", labels);
        line(text, format_args!("{prefix} {sum:?}\n"));
        let count = buckets.last().map_or(0, |(_, count)| *count);
        self.whole("_count", labels, count);
        let Some((meta, text)) = self.families.get_mut(self.current) else { return };
        let comma = if labels.as_str().is_empty() { "" } else { "," };
        for (bound, count) in buckets {
            line(text, format_args!("{}_bucket{{le=\"", meta.name));
            if bound.is_infinite() {
                text.push_str("+Inf");
            } else {
                // With a fraction always: `1.0`.
                line(text, format_args!("{bound:?}"));
            }
            line(text, format_args!("\"{comma}{}}} {count}\n", labels.as_str()));
        }
    }

    /// The name and labels of a sample, and where to write it.
    fn open(&mut self, suffix: &str, labels: &Labels) -> (String, &mut String) {
        if self.families.is_empty() {
            // Unreachable by our callers, who begin first; a sample without a family must not be a panic.
            self.begin(Meta::new("unknown", "A sample without a family", Kind::Gauge));
        }
        let (meta, text) =
            self.families.get_mut(self.current).expect("begin() sets it to a family that exists");
        let name = if labels.as_str().is_empty() {
            format!("{}{suffix}", meta.name)
        } else {
            format!("{}{suffix}{{{}}}", meta.name, labels.as_str())
        };
        (name, text)
    }

    pub(super) fn finish(mut self) -> String {
        self.families.sort_by_key(|(meta, _)| meta.rank());
        let size: usize = self.families.iter().map(|(_, samples)| samples.len() + 256).sum();
        let mut text = String::with_capacity(size);
        for (meta, samples) in self.families.iter().filter(|(_, samples)| !samples.is_empty()) {
            meta.write(&mut text);
            text.push_str(samples);
        }
        text.push_str("# EOF\n");
        text
    }
}

/// Whole numbers without a fraction.
fn number(text: &mut String, value: f64) {
    if value.is_infinite() {
        text.push_str(if value > 0.0 { "+Inf" } else { "-Inf" });
    } else {
        // Rust prints `1` for 1.0, and `NaN`; both are what the format wants.
        line(text, format_args!("{value}"));
    }
}

fn line(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    text.write_fmt(arguments).expect("writing to a String cannot fail");
}
