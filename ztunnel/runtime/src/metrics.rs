//! The registry of metrics and its `OpenMetrics` text.
//!
//! A module registers its families once and keeps them; a connection asks a [`Family`] for its series once and
//! keeps the handle, whose use is one atomic addition. There is no global recorder.

mod labels;
mod process;
mod series;
mod text;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub use ::metrics::{Counter, Gauge, Histogram};
use tokio::time::Instant;

pub use self::labels::{Builder, Labels};
pub use self::process::{register_process, register_workers};
pub use self::series::Family;
use self::series::{Make, Series, counter, gauge, histogram};
pub use self::text::Samples;
use self::text::{Kind, Meta};

/// How long a series nobody holds may stay unchanged before a scrape drops it.
const IDLE: Duration = Duration::from_secs(60 * 60);

/// The content type where the client takes `OpenMetrics`.
const OPEN_METRICS: &str = "application/openmetrics-text;charset=utf-8;version=1.0.0";
/// The content type elsewhere. The text is the same.
const PLAIN: &str = "text/plain; charset=utf-8";

/// The families of the process. Clones are one registry.
#[derive(Clone)]
pub struct Registry(Arc<Inner>);

struct Inner {
    idle: Duration,
    families: Mutex<Vec<Series>>,
    computed: Mutex<Vec<Computed>>,
}

type Computed = Box<dyn FnMut(&mut Samples) + Send>;

impl Registry {
    /// An empty registry, which drops series that nobody holds after an hour without a change.
    #[must_use]
    pub fn new() -> Self {
        Self::dropping_after(IDLE)
    }

    /// An empty registry. Counters and histograms that have labels, and that nobody holds, are dropped by the
    /// first scrape that finds them unchanged for so long. Gauges stay.
    #[must_use]
    pub fn dropping_after(idle: Duration) -> Self {
        Self(Arc::new(Inner { idle, families: Mutex::default(), computed: Mutex::default() }))
    }

    /// Registers a counter, or finds it again. The name may end in `_total` or not; the text has it where it
    /// belongs.
    #[must_use]
    pub fn counter(&self, name: &'static str, help: &'static str) -> Family<Counter> {
        self.register(Meta::new(name, help, Kind::Counter), counter, &[])
    }

    /// Registers a counter with a unit, in which its name must end.
    #[must_use]
    pub fn counter_of(
        &self,
        name: &'static str,
        unit: &'static str,
        help: &'static str,
    ) -> Family<Counter> {
        self.register(Meta::new(name, help, Kind::Counter).in_unit(unit), counter, &[])
    }

    /// Registers a gauge, or finds it again.
    #[must_use]
    pub fn gauge(&self, name: &'static str, help: &'static str) -> Family<Gauge> {
        self.register(Meta::new(name, help, Kind::Gauge), gauge, &[])
    }

    /// Registers a histogram with a unit, in which its name must end, and the upper bounds of its buckets, in
    /// ascending order; the bucket without a bound is added.
    #[must_use]
    pub fn histogram(
        &self,
        name: &'static str,
        unit: &'static str,
        help: &'static str,
        bounds: &[f64],
    ) -> Family<Histogram> {
        self.register(Meta::new(name, help, Kind::Histogram).in_unit(unit), histogram, bounds)
    }

    /// Calls a closure at each scrape for values that are not kept as series.
    pub fn on_scrape(&self, compute: impl FnMut(&mut Samples) + Send + 'static) {
        lock(&self.0.computed).push(Box::new(compute));
    }

    fn register<T: Clone>(&self, meta: Meta, make: Make<T>, bounds: &[f64]) -> Family<T>
    where
        Family<T>: Into<Series> + for<'a> TryFrom<&'a Series>,
    {
        let mut families = lock(&self.0.families);
        if let Some(known) = families.iter().find(|family| family.name() == meta.name) {
            if let Ok(family) = Family::try_from(known) {
                return family;
            }
            tracing::error!(
                name = meta.name,
                "a metric is registered as two kinds: the second is lost"
            );
            return Family::new(meta, make, bounds);
        }
        let family = Family::new(meta, make, bounds);
        families.push(family.clone().into());
        family
    }

    /// The text of all families that have samples: process, tokio, istio, workload manager, others.
    #[must_use]
    pub fn render(&self) -> String {
        let now = Instant::now();
        let mut samples = Samples::default();
        // Copied: a computed value may register a family.
        let families = lock(&self.0.families).clone();
        for family in families {
            family.scrape(now, self.0.idle, &mut samples);
        }
        for compute in lock(&self.0.computed).iter_mut() {
            compute(&mut samples);
        }
        samples.finish()
    }

    /// The content type of [`render`](Self::render)'s text for a client with this `accept` header.
    #[must_use]
    pub fn content_type(accept: Option<&str>) -> &'static str {
        let open = accept.is_some_and(|accept| accept.contains("application/openmetrics-text"));
        if open { OPEN_METRICS } else { PLAIN }
    }
}

impl Default for Registry {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry").field("families", &lock(&self.0.families).len()).finish()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
