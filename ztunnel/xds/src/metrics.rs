//! What is counted of the conversation with the control plane.

use std::collections::HashMap;
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
    refused: Family<Counter>,
    last: Arc<Mutex<Last>>,
}

/// When each type was last sent.
type Last = HashMap<Kind, Instant>;

impl Metrics {
    pub(crate) fn new(registry: &Registry) -> Self {
        let last: Arc<Mutex<Last>> = Arc::default();
        let seen = Arc::clone(&last);
        registry.on_scrape(move |samples| {
            let last = seen.lock().unwrap_or_else(PoisonError::into_inner).clone();
            for kind in Kind::ALL {
                let Some(at) = last.get(&kind) else { continue };
                let help =
                    "Seconds since the control plane last sent something of this type (ours).";
                let age = at.elapsed().as_secs_f64();
                let labels = Labels::new([("url", kind.url())]);
                samples.gauge("istio_xds_last_message_age_seconds", help, &labels, age);
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
                "Resources that were refused, each named in the log and to the control plane (ours).",
            ),
            refused: registry.counter(
                "istio_xds_nacks",
                "Responses that were refused in part: a resource of them could not be used (ours).",
            ),
            last,
        }
    }

    pub(crate) fn terminated(&self, reason: Reason) {
        self.terminations.with(&Labels::new([("reason", reason.label())])).increment(1);
    }

    /// A response of a type came, with so many bytes of resources. A type that we do not know counts as one.
    pub(crate) fn received(&self, url: &str, bytes: usize) {
        let kind = Kind::from_url(url);
        let labels = Labels::new([("url", kind.map_or("unknown", Kind::url))]);
        self.messages.with(&labels).increment(1);
        self.bytes.with(&labels).increment(u64::try_from(bytes).unwrap_or(u64::MAX));
        if let Some(kind) = kind {
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            last.insert(kind, Instant::now());
        }
    }

    /// A response of a type was refused, for so many of its resources.
    pub(crate) fn refused(&self, url: &str, resources: usize) {
        let url = Kind::from_url(url).map_or("unknown", Kind::url);
        let labels = Labels::new([("url", url)]);
        let resources = u64::try_from(resources).unwrap_or(u64::MAX);
        self.rejected.with(&labels).increment(resources);
        self.refused.with(&labels).increment(1);
    }
}
