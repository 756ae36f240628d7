//! Families of series, and the atomics behind their handles.

use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ::metrics::{Counter, Gauge, GaugeFn, Histogram, HistogramFn};
use hashbrown::HashMap;
use tokio::time::Instant;

use super::labels::Labels;
use super::lock;
use super::text::{Meta, Samples};

/// Tables a family is divided into, so that workers opening connections seldom meet at one lock.
const SHARDS: usize = 16;

/// The series of one metric, as handles of one kind: [`Counter`], [`Gauge`] or [`Histogram`].
pub struct Family<T>(Arc<Table<T>>);

struct Table<T> {
    meta: Meta,
    make: Make<T>,
    bounds: Box<[f64]>,
    shards: [Mutex<Shard<T>>; SHARDS],
}

/// Makes a handle and the value behind it.
pub(super) type Make<T> = fn(bounds: &[f64]) -> (T, Arc<dyn Cell>);

type Shard<T> = HashMap<Labels, Slot<T>, BuildHasherDefault<Prehashed>>;

struct Slot<T> {
    handle: T,
    cell: Arc<dyn Cell>,
    /// What the last scrape that saw a change saw, and when.
    seen: u64,
    since: Instant,
}

/// References to a value that are the family's own.
const OWN: usize = 2;

/// The value of one series.
pub(super) trait Cell: Send + Sync {
    /// Something that differs after each change; None if the series must stay.
    fn activity(&self) -> Option<u64>;
    fn write(&self, labels: &Labels, samples: &mut Samples);
}

impl<T: Clone> Family<T> {
    pub(super) fn new(meta: Meta, make: Make<T>, bounds: &[f64]) -> Self {
        Self(Arc::new(Table { meta, make, bounds: bounds.into(), shards: Default::default() }))
    }

    /// The series with these labels, made when it is new. Keep the handle: this takes a lock.
    #[must_use]
    pub fn with(&self, labels: &Labels) -> T {
        let mut shard = lock(self.0.shard(labels));
        if let Some(slot) = shard.get(labels) {
            return slot.handle.clone();
        }
        let (handle, cell) = (self.0.make)(&self.0.bounds);
        let slot = Slot { handle: handle.clone(), cell, seen: 0, since: Instant::now() };
        shard.insert(labels.clone(), slot);
        handle
    }

    /// The series without labels.
    #[must_use]
    pub fn single(&self) -> T {
        self.with(&Labels::empty())
    }

    fn scrape(&self, now: Instant, idle: Duration, samples: &mut Samples) {
        let mut live = Vec::new();
        for shard in &self.0.shards {
            lock(shard).retain(|labels, slot| {
                let keep = slot.is_wanted(labels, now, idle);
                if keep {
                    live.push((labels.clone(), Arc::clone(&slot.cell)));
                }
                keep
            });
        }
        live.sort_unstable_by(|(a, _), (b, _)| a.as_str().cmp(b.as_str()));
        samples.begin(self.0.meta);
        for (labels, cell) in live {
            cell.write(&labels, samples);
        }
    }
}

impl<T> Table<T> {
    fn shard(&self, labels: &Labels) -> &Mutex<Shard<T>> {
        // The table inside takes the other bits.
        let index = usize::try_from(labels.hash_value() >> 32).unwrap_or_default() % SHARDS;
        self.shards.get(index).expect("the index is below SHARDS")
    }
}

impl<T> Slot<T> {
    fn is_wanted(&mut self, labels: &Labels, now: Instant, idle: Duration) -> bool {
        let Some(activity) = self.cell.activity() else { return true };
        // Nobody else can take a handle meanwhile: that needs the lock that our caller holds.
        if activity != self.seen
            || Arc::strong_count(&self.cell) > OWN
            || labels.as_str().is_empty()
        {
            if activity != self.seen {
                (self.seen, self.since) = (activity, now);
            }
            return true;
        }
        now.duration_since(self.since) < idle
    }
}

pub(super) fn counter(_: &[f64]) -> (Counter, Arc<dyn Cell>) {
    let cell = Arc::new(AtomicU64::new(0));
    (Counter::from_arc(Arc::clone(&cell)), cell)
}

pub(super) fn gauge(_: &[f64]) -> (Gauge, Arc<dyn Cell>) {
    let cell = Arc::new(GaugeCell::default());
    (Gauge::from_arc(Arc::clone(&cell)), cell)
}

pub(super) fn histogram(bounds: &[f64]) -> (Histogram, Arc<dyn Cell>) {
    let bounds = bounds.iter().copied().chain([f64::INFINITY]);
    let buckets = bounds.map(|bound| (bound, AtomicU64::new(0))).collect();
    let cell = Arc::new(HistogramCell { buckets, sum: AtomicU64::new(0) });
    (Histogram::from_arc(Arc::clone(&cell)), cell)
}

impl Cell for AtomicU64 {
    fn activity(&self) -> Option<u64> {
        Some(self.load(Ordering::Relaxed))
    }

    fn write(&self, labels: &Labels, samples: &mut Samples) {
        samples.whole("_total", labels, self.load(Ordering::Relaxed));
    }
}

/// A float in an atomic word.
#[derive(Default)]
struct GaugeCell(AtomicU64);

impl GaugeFn for GaugeCell {
    fn increment(&self, value: f64) {
        add(&self.0, value);
    }

    fn decrement(&self, value: f64) {
        add(&self.0, -value);
    }

    fn set(&self, value: f64) {
        self.0.store(value.to_bits(), Ordering::Relaxed);
    }
}

impl Cell for GaugeCell {
    fn activity(&self) -> Option<u64> {
        None
    }

    fn write(&self, labels: &Labels, samples: &mut Samples) {
        samples.number("", labels, f64::from_bits(self.0.load(Ordering::Relaxed)));
    }
}

/// Buckets by upper bound, not cumulative; the last has none.
struct HistogramCell {
    buckets: Box<[(f64, AtomicU64)]>,
    sum: AtomicU64,
}

impl HistogramFn for HistogramCell {
    fn record(&self, value: f64) {
        if let Some((_, bucket)) = self.buckets.iter().find(|(bound, _)| value <= *bound) {
            bucket.fetch_add(1, Ordering::Relaxed);
            add(&self.sum, value);
        }
    }
}

impl Cell for HistogramCell {
    fn activity(&self) -> Option<u64> {
        Some(self.buckets.iter().map(|(_, count)| count.load(Ordering::Relaxed)).sum())
    }

    fn write(&self, labels: &Labels, samples: &mut Samples) {
        let sum = f64::from_bits(self.sum.load(Ordering::Relaxed));
        let mut total = 0;
        let buckets: Vec<(f64, u64)> = self
            .buckets
            .iter()
            .map(|(bound, count)| {
                total += count.load(Ordering::Relaxed);
                (*bound, total)
            })
            .collect();
        samples.histogram(labels, sum, &buckets);
    }
}

fn add(float: &AtomicU64, value: f64) {
    let added = |bits| Some((f64::from_bits(bits) + value).to_bits());
    // The closure never gives up.
    let _ = float.fetch_update(Ordering::Relaxed, Ordering::Relaxed, added);
}

/// A family of any kind.
#[derive(Clone)]
pub(super) enum Series {
    Counter(Family<Counter>),
    Gauge(Family<Gauge>),
    Histogram(Family<Histogram>),
}

impl Series {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Counter(family) => family.0.meta.name,
            Self::Gauge(family) => family.0.meta.name,
            Self::Histogram(family) => family.0.meta.name,
        }
    }

    pub(super) fn scrape(&self, now: Instant, idle: Duration, samples: &mut Samples) {
        match self {
            Self::Counter(family) => family.scrape(now, idle, samples),
            Self::Gauge(family) => family.scrape(now, idle, samples),
            Self::Histogram(family) => family.scrape(now, idle, samples),
        }
    }
}

macro_rules! convert {
    ($kind:ident) => {
        impl From<Family<$kind>> for Series {
            fn from(family: Family<$kind>) -> Self {
                Self::$kind(family)
            }
        }

        impl TryFrom<&Series> for Family<$kind> {
            type Error = ();

            fn try_from(series: &Series) -> Result<Self, ()> {
                if let Series::$kind(family) = series { Ok(family.clone()) } else { Err(()) }
            }
        }
    };
}

convert!(Counter);
convert!(Gauge);
convert!(Histogram);

impl<T> Clone for Family<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> fmt::Debug for Family<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Family").field(&self.0.meta.name).finish()
    }
}

/// Gives back the hash that [`Labels`] carry.
#[derive(Default)]
struct Prehashed(u64);

impl Hasher for Prehashed {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        // Labels only ever write one number.
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}
