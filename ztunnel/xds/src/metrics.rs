//! What is counted of the conversation with the control plane.

use std::sync::{Arc, Mutex, PoisonError};

use mesh_runtime::metrics::{Counter, Family, Labels, Registry};
use tokio::time::Instant;

use crate::session::Kind;

/// Why a stream ended, as the metric names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reason {
    ConnectionError,
    Error,
    Reconnect,
    Complete,
}

impl Reason {
    const fn label(self) -> &'static str {
        match self {
            Self::ConnectionError => "ConnectionError",
            Self::Error => "Error",
            Self::Reconnect => "Reconnect",
            Self::Complete => "Complete",
        }
    }
}

/// Handles, resolved once.
#[derive(Debug)]
pub(crate) struct Metrics {
    terminations: Family<Counter>,
    messages: Family<Counter>,
    bytes: Family<Counter>,
    rejected: Family<Counter>,
    last: Arc<Mutex<Option<Instant>>>,
}

impl Metrics {
    pub(crate) fn new(registry: &Registry) -> Self {
        let last: Arc<Mutex<Option<Instant>>> = Arc::default();
        let seen = Arc::clone(&last);
        registry.on_scrape(move |samples| {
            let last = *seen.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(last) = last {
                let help = "Seconds since the control plane last sent something";
                let age = last.elapsed().as_secs_f64();
                samples.gauge("istio_xds_last_message_age_seconds", help, &Labels::empty(), age);
            }
        });
        Self {
            terminations: registry.counter(
                "istio_xds_connection_terminations",
                "The total number of completed connections to the control plane (unstable)",
            ),
            messages: registry
                .counter("istio_xds_message", "Total number of messages received (unstable)"),
            bytes: registry.counter_of(
                "istio_xds_message_bytes",
                "bytes",
                "Total number of bytes received (unstable)",
            ),
            rejected: registry.counter(
                "istio_xds_rejected_resources",
                "Resources that were refused, each named in the log and to the control plane",
            ),
            last,
        }
    }

    pub(crate) fn terminated(&self, reason: Reason) {
        self.terminations.with(&Labels::new([("reason", reason.label())])).increment(1);
    }

    /// A response of a type came, with so many bytes of resources. A type that we do not know counts as one.
    pub(crate) fn received(&self, url: &str, bytes: usize) {
        let url = Kind::from_url(url).map_or("unknown", Kind::url);
        let labels = Labels::new([("url", url)]);
        self.messages.with(&labels).increment(1);
        self.bytes.with(&labels).increment(u64::try_from(bytes).unwrap_or(u64::MAX));
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    pub(crate) fn rejected(&self, url: &str, count: usize) {
        let url = Kind::from_url(url).map_or("unknown", Kind::url);
        let count = u64::try_from(count).unwrap_or(u64::MAX);
        self.rejected.with(&Labels::new([("url", url)])).increment(count);
    }
}
