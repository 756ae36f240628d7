//! Istio's families of DNS.

use crate::message::Transport;
use mesh_core::Workload;
use mesh_runtime::metrics::{Counter, Family, Histogram, Labels, Registry};
use std::{fmt, time::Duration};

const BOUNDS: [f64; 6] = [0.0005, 0.001, 0.01, 0.1, 1.0, 5.0];

/// The families, for all pods.
pub struct Metrics {
    requests: Family<Counter>,
    upstream_requests: Family<Counter>,
    upstream_failures: Family<Counter>,
    upstream_duration: Family<Histogram>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

/// The type of a query and how it came, who asks, and its version.
pub(crate) fn labels(kind: &str, transport: Transport, client: &Workload) -> Labels {
    let known =
        |text: &'_ str| if text.is_empty() { "unknown".to_owned() } else { text.to_owned() };
    Labels::new([
        ("request_query_type", kind),
        ("request_protocol", transport.as_str()),
        ("source_canonical_service", &known(client.canonical_name.as_str())),
        ("source_canonical_revision", &known(client.canonical_revision.as_str())),
    ])
}

impl Metrics {
    /// Registers them.
    #[must_use]
    pub fn new(registry: &Registry) -> Self {
        Self {
            requests: registry.counter("istio_dns_requests", "DNS requests."),
            upstream_requests: registry
                .counter("istio_dns_upstream_requests", "DNS requests that were forwarded."),
            upstream_failures: registry.counter(
                "istio_dns_upstream_failures",
                "DNS requests whose forwarding failed or brought nothing.",
            ),
            upstream_duration: registry.histogram(
                "istio_dns_upstream_request_duration_seconds",
                "seconds",
                "How long forwarded DNS requests took.",
                &BOUNDS,
            ),
        }
    }

    pub(crate) fn asked(&self, labels: &Labels) {
        self.requests.with(labels).increment(1);
    }

    /// A forwarded one is over. Istio counts as failed whatever brings no records, names that are not there
    /// included.
    pub(crate) fn forwarded(&self, labels: &Labels, took: Duration, brought: bool) {
        self.upstream_requests.with(labels).increment(1);
        self.upstream_duration.with(labels).record(took.as_secs_f64());
        if !brought {
            self.upstream_failures.with(labels).increment(1);
        }
    }
}
