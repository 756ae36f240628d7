//! The families of the node proxy, and the handles of the connections that use them now.

use crate::telemetry::{Counters, Ends, Reporter, Source, name_labels};
use mesh_core::{Hostname, Service, SpiffeId, Workload};
use mesh_runtime::metrics::{Counter, Family, Gauge, Labels, Registry};
use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Label sets that are remembered, at most. A node rarely has more pairs of talking workloads at a
/// time; beyond that they are only resolved again.
const REMEMBERED: usize = 4096;

/// The families.
pub(crate) struct Metrics {
    opened: Family<Counter>,
    closed: Family<Counter>,
    failed: Family<Counter>,
    received: Family<Counter>,
    sent: Family<Counter>,
    sockets_source: Gauge,
    sockets_destination: Gauge,
    live: AtomicUsize,
    refused: Family<Counter>,
    policy_denials: Family<Counter>,
    handshakes: Family<Counter>,
    on_demand_dns: Family<Counter>,
    /// Proxies of pods: running, waiting for another try, running in vain, started and stopped so far.
    pub(crate) pods: Pods,
    known: Arc<Mutex<HashMap<Pair, Known>>>,
}

/// The gauges and counters of the pods.
pub(crate) struct Pods {
    pub(crate) active: Gauge,
    pub(crate) pending: Gauge,
    pub(crate) uncaptured: Gauge,
    pub(crate) started: Counter,
    pub(crate) stopped: Counter,
}

/// What tells two pairs of ends apart without reading them: the entry holds on to what it points to,
/// so that no address is used twice.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
struct Pair {
    reporter: Reporter,
    source: usize,
    identity: Option<SpiffeId>,
    destination: usize,
    service: usize,
    mutual_tls: bool,
}

struct Known {
    counters: Arc<Counters>,
    /// Whether a connection asked for it since the last scrape.
    used: bool,
    _source: Option<Arc<Workload>>,
    _destination: Option<Arc<Workload>>,
    _service: Option<Arc<Service>>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

fn place<T>(value: Option<&Arc<T>>) -> usize {
    value.map_or(0, |value| Arc::as_ptr(value).addr())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets go of pairs that no connection has, or has had since the last scrape: what they hold on to, workloads that may
/// be gone, and series, which the registry drops once they are idle and nobody's.
fn forget(known: &mut HashMap<Pair, Known>) {
    known.retain(|_, entry| {
        std::mem::replace(&mut entry.used, false) || Arc::strong_count(&entry.counters) > 1
    });
    if known.capacity() > 4 * known.len() {
        known.shrink_to(2 * known.len());
    }
}

impl Metrics {
    /// Registers the families.
    pub(crate) fn new(registry: &Registry, version: &str) -> Self {
        let counter = |name, help| registry.counter(name, help);
        let gauge = |name, help| registry.gauge(name, help);
        let build = Labels::new([("component", "ztunnel"), ("tag", version)]);
        gauge("istio_build", "Istio component build info.").with(&build).set(1.0);
        let sockets =
            gauge("istio_tcp_sockets_open", "The number of proxied TCP sockets open now.");
        let reporter = |reporter: Reporter| Labels::new([("reporter", reporter.as_str())]);
        let known = Arc::<Mutex<HashMap<Pair, Known>>>::default();
        let remembered = Arc::clone(&known);
        registry.on_scrape(move |_| forget(&mut lock(&remembered)));
        Self {
            opened: counter("istio_tcp_connections_opened", "TCP connections opened."),
            closed: counter("istio_tcp_connections_closed", "TCP connections closed."),
            failed: counter("istio_tcp_connections_failed", "TCP connections that failed."),
            received: counter("istio_tcp_received_bytes", "Bytes received as requests."),
            sent: counter("istio_tcp_sent_bytes", "Bytes sent as responses."),
            sockets_source: sockets.with(&reporter(Reporter::Source)),
            sockets_destination: sockets.with(&reporter(Reporter::Destination)),
            live: AtomicUsize::new(0),
            refused: counter(
                "istio_tcp_connections_refused",
                "Connections refused before they were counted as opened.",
            ),
            policy_denials: counter(
                "istio_policy_unavailable_denials",
                "Connections denied because a policy that applies has not arrived or was rejected.",
            ),
            handshakes: counter(
                "istio_tls_handshakes",
                "TLS handshakes of tunnels, by how they ended (ours).",
            ),
            on_demand_dns: counter(
                "istio_on_demand_dns",
                "Connections to a workload that is known by its name alone.",
            ),
            pods: Pods {
                active: gauge("workload_manager_active_proxy_count", "Pods served now.").single(),
                pending: gauge(
                    "workload_manager_pending_proxy_count",
                    "Pods that could not be served and are tried again.",
                )
                .single(),
                uncaptured: gauge(
                    "workload_manager_uncaptured_proxy_count",
                    "Pods that are served and whose connections do not come to us, as far as can be seen (ours).",
                )
                .single(),
                started: counter("workload_manager_proxies_started", "Pods taken on.").single(),
                stopped: counter("workload_manager_proxies_stopped", "Pods let go.").single(),
            },
            known,
        }
    }

    /// The counters of the connections between these ends; remembered, so that the labels are made
    /// once for each pair.
    pub(crate) fn counters(&self, ends: &Ends) -> Arc<Counters> {
        let source = match &ends.source {
            Source::Workload(workload) => Some(workload),
            Source::Told(_) => return Arc::new(self.resolve(ends)),
            Source::Unknown => None,
        };
        let pair = Pair {
            reporter: ends.reporter,
            source: place(source),
            identity: ends.source_identity().cloned(),
            destination: place(ends.destination.as_ref()),
            service: place(ends.service.as_ref()),
            mutual_tls: ends.mutual_tls,
        };
        if let Some(known) = self.known().get_mut(&pair) {
            known.used = true;
            return Arc::clone(&known.counters);
        }
        let counters = Arc::new(self.resolve(ends));
        let entry = Known {
            counters: Arc::clone(&counters),
            used: true,
            _source: source.cloned(),
            _destination: ends.destination.clone(),
            _service: ends.service.clone(),
        };
        let mut known = self.known();
        if known.len() >= REMEMBERED {
            known.clear();
        }
        known.insert(pair, entry);
        counters
    }

    fn known(&self) -> MutexGuard<'_, HashMap<Pair, Known>> {
        lock(&self.known)
    }

    fn resolve(&self, ends: &Ends) -> Counters {
        let labels = ends.labels("-");
        Counters {
            opened: self.opened.with(&labels),
            closed: self.closed.with(&labels),
            received: self.received.with(&labels),
            sent: self.sent.with(&labels),
        }
    }

    /// Counts a connection as over, with this response flag.
    pub(crate) fn closed(&self, ends: &Ends, counters: &Counters, flag: &str) {
        if flag == "-" {
            counters.closed.increment(1);
        } else {
            let labels = ends.labels(flag);
            self.closed.with(&labels).increment(1);
            self.failed.with(&labels).increment(1);
        }
    }

    /// Counts a socket pair in.
    pub(crate) fn socket_in(&self, reporter: Reporter) {
        self.live.fetch_add(1, Ordering::Relaxed);
        self.sockets(reporter).increment(1.0);
    }

    /// Counts a socket pair out.
    pub(crate) fn socket_out(&self, reporter: Reporter) {
        self.live.fetch_sub(1, Ordering::Relaxed);
        self.sockets(reporter).decrement(1.0);
    }

    const fn sockets(&self, reporter: Reporter) -> &Gauge {
        match reporter {
            Reporter::Source => &self.sockets_source,
            Reporter::Destination => &self.sockets_destination,
        }
    }

    /// How many connections live.
    pub(crate) fn live(&self) -> usize {
        self.live.load(Ordering::Relaxed)
    }

    /// Counts a connection that was refused before it was counted.
    pub(crate) fn refused(&self, reporter: Reporter, reason: &str) {
        let labels = Labels::new([("reporter", reporter.as_str()), ("reason", reason)]);
        self.refused.with(&labels).increment(1);
    }

    /// Counts a TLS handshake of a tunnel that ended like this.
    pub(crate) fn handshake(&self, reporter: Reporter, result: &'static str) {
        let labels = Labels::new([("reporter", reporter.as_str()), ("result", result)]);
        self.handshakes.with(&labels).increment(1);
    }

    /// Counts a connection that was denied for want of a policy.
    pub(crate) fn policy_unavailable(&self, policy: &str, reason: &'static str) {
        let labels = Labels::new([("policy", policy), ("reason", reason)]);
        self.policy_denials.with(&labels).increment(1);
    }

    /// Counts a connection from this workload for which a name had to be resolved.
    pub(crate) fn on_demand_dns(&self, source: &Workload, host: &Hostname) {
        self.on_demand_dns.with(&name_labels(source, host)).increment(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::{self, Sources};
    use mesh_runtime::admin::Dump;
    use mesh_state::Writer;
    use std::time::Duration;

    const MESH: &str =
        "workloads: [{uid: c//Pod/ns/a, name: a, namespace: ns, workloadIps: [10.0.0.1]}]";

    #[tokio::test(start_paused = true)]
    async fn who_talks_no_more_is_forgotten() {
        let hour = Duration::from_secs(60 * 60);
        let registry = Registry::dropping_after(hour);
        let metrics = Metrics::new(&registry, "test");
        let writer = Writer::new(mesh_core::Text::default());
        let state = writer.handle();
        resources::inline(MESH, Sources::new(writer, &Dump::new())).unwrap();
        let uid = "c//Pod/ns/a".parse().unwrap();
        let workload = state.read(|view| view.workload(&uid)).unwrap();
        drop(state);
        let ends = |source| Ends {
            reporter: Reporter::Source,
            source,
            identity: crate::telemetry::Identity::None,
            destination: None,
            service: None,
            mutual_tls: false,
        };
        let ours = Arc::strong_count(&workload);
        let counters = metrics.counters(&ends(Source::Workload(Arc::clone(&workload))));
        counters.opened.increment(1);
        let is_shown = || registry.render().contains("istio_tcp_connections_opened_total{");
        for _ in 0..3 {
            tokio::time::advance(hour).await;
            assert!(is_shown(), "a connection has it");
        }
        drop(counters);
        assert!(is_shown());
        assert_eq!(Arc::strong_count(&workload), ours, "nothing of it is held on to");
        tokio::time::advance(hour).await;
        assert!(!is_shown(), "for an hour nobody has had it");
        // What was asked for since the last scrape is likely to be asked for again.
        drop(metrics.counters(&ends(Source::Unknown)));
        let _text = registry.render();
        assert_eq!(metrics.known().len(), 1);
        let _text = registry.render();
        assert_eq!(metrics.known().len(), 0);
    }
}
