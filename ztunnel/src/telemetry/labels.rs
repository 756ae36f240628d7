//! Istio's labels of a connection, in Istio's order.

use crate::policy_watch::Peer;
use mesh_core::{Hostname, Service, SpiffeId, Workload};
use mesh_hbone::Baggage;
use mesh_runtime::metrics::{Builder, Counter, Labels};
use std::sync::Arc;

/// Which side of a connection reports it.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(crate) enum Reporter {
    /// The client's proxy.
    Source,
    /// The server's.
    Destination,
}

impl Reporter {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// Who a connection comes from, as far as it is known.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    /// The control plane knows it.
    Workload(Arc<Workload>),
    /// It said so itself, in the baggage of its CONNECT.
    Told(Box<Baggage>),
    /// Nobody said.
    Unknown,
}

/// The verified identity of a client.
#[derive(Clone, Debug)]
pub(crate) enum Identity {
    /// There is none.
    None,
    /// The workload's own: it is one of ours.
    Own,
    /// What the certificate of its tunnel says.
    Peer(Arc<Peer>),
}

/// The two ends of a connection.
#[derive(Clone, Debug)]
pub(crate) struct Ends {
    /// Which side we are.
    pub(crate) reporter: Reporter,
    /// The client.
    pub(crate) source: Source,
    /// Its verified identity; only where the connection is in a tunnel.
    pub(crate) identity: Identity,
    /// The server, or the waypoint.
    pub(crate) destination: Option<Arc<Workload>>,
    /// The service that was addressed.
    pub(crate) service: Option<Arc<Service>>,
    /// Whether the connection is in a tunnel.
    pub(crate) mutual_tls: bool,
}

/// The counters of the connections between two ends.
#[derive(Clone, Debug)]
pub(crate) struct Counters {
    pub(crate) opened: Counter,
    /// Of those that ended well.
    pub(crate) closed: Counter,
    /// Bytes from the client.
    pub(crate) received: Counter,
    /// Bytes to the client.
    pub(crate) sent: Counter,
}

const UNKNOWN: &str = "unknown";

fn or_unknown(text: &str) -> &str {
    if text.is_empty() { UNKNOWN } else { text }
}

/// One end, in the words of telemetry.
struct Party<'a> {
    workload: &'a str,
    namespace: &'a str,
    service: &'a str,
    revision: &'a str,
    app: &'a str,
    cluster: &'a str,
    region: &'a str,
    zone: &'a str,
    is_known: bool,
}

impl<'a> Party<'a> {
    const UNKNOWN: Self = Self {
        workload: UNKNOWN,
        namespace: UNKNOWN,
        service: UNKNOWN,
        revision: UNKNOWN,
        app: UNKNOWN,
        cluster: UNKNOWN,
        region: UNKNOWN,
        zone: UNKNOWN,
        is_known: false,
    };

    fn of_workload(workload: &'a Workload) -> Self {
        let service = or_unknown(workload.canonical_name.as_str());
        Self {
            workload: or_unknown(workload.workload_name.as_str()),
            namespace: workload.identity.namespace.as_str(),
            service,
            revision: or_unknown(workload.canonical_revision.as_str()),
            app: service,
            cluster: or_unknown(workload.cluster.as_str()),
            region: or_unknown(workload.locality.region.as_str()),
            zone: or_unknown(workload.locality.zone.as_str()),
            is_known: true,
        }
    }

    fn of_baggage(baggage: &'a Baggage) -> Self {
        let text = |value: &'a Option<String>| value.as_deref().map_or(UNKNOWN, or_unknown);
        Self {
            workload: text(&baggage.workload_name),
            namespace: text(&baggage.namespace),
            service: text(&baggage.service_name),
            revision: text(&baggage.revision),
            app: text(&baggage.workload_name),
            cluster: text(&baggage.cluster),
            region: text(&baggage.region),
            zone: text(&baggage.zone),
            is_known: true,
        }
    }

    fn push_source(&self, labels: &mut Builder, principal: Option<&str>) {
        labels
            .push("source_workload", self.workload)
            .push("source_canonical_service", self.service)
            .push("source_canonical_revision", self.revision)
            .push("source_workload_namespace", self.namespace)
            .push("source_principal", principal.unwrap_or(UNKNOWN))
            .push("source_app", self.app)
            .push("source_version", self.revision)
            .push("source_cluster", self.cluster);
    }
}

/// The labels of what a workload's connection needs the address of this name for.
pub(crate) fn name_labels(source: &Workload, host: &Hostname) -> Labels {
    let mut labels = Labels::builder(512);
    let principal = source.identity.to_string();
    Party::of_workload(source).push_source(&mut labels, Some(&principal));
    labels.push("hostname", host.as_str());
    labels.build()
}

impl Ends {
    /// The verified identity of the client.
    pub(crate) fn source_identity(&self) -> Option<&SpiffeId> {
        match (&self.identity, &self.source) {
            (Identity::Peer(peer), _) => Some(&peer.identity),
            (Identity::Own, Source::Workload(workload)) => Some(&workload.identity),
            (Identity::None, _) | (Identity::Own, Source::Told(_) | Source::Unknown) => None,
        }
    }

    /// The labels of the `istio_tcp_*` families, with this response flag.
    pub(crate) fn labels(&self, flag: &str) -> Labels {
        let source = match &self.source {
            Source::Workload(workload) => Party::of_workload(workload),
            Source::Told(baggage) => Party::of_baggage(baggage),
            Source::Unknown => Party::UNKNOWN,
        };
        let destination = self.destination.as_deref().map_or(Party::UNKNOWN, Party::of_workload);
        let principal = self.source_identity().map(ToString::to_string);
        let mut labels = Labels::builder(1024);
        labels.push("reporter", self.reporter.as_str());
        source.push_source(&mut labels, principal.as_deref());
        self.push_destination(&mut labels, &destination);
        let security = if self.mutual_tls { "mutual_tls" } else { UNKNOWN };
        labels
            .push("request_protocol", "tcp")
            .push("response_flags", flag)
            .push("connection_security_policy", security);
        if source.is_known || destination.is_known {
            labels
                .push("source_region", source.region)
                .push("source_zone", source.zone)
                .push("destination_region", destination.region)
                .push("destination_zone", destination.zone);
        }
        labels.build()
    }

    fn push_destination(&self, labels: &mut Builder, destination: &Party<'_>) {
        let service = self.service.as_deref();
        let principal = self.destination.as_ref().map(|workload| workload.identity.to_string());
        labels
            .push("destination_service", service.map_or(UNKNOWN, |s| s.key.hostname.as_str()))
            .push(
                "destination_service_namespace",
                service.map_or(UNKNOWN, |s| s.key.namespace.as_str()),
            )
            .push(
                "destination_service_name",
                service.map_or(UNKNOWN, |s| or_unknown(s.name.as_str())),
            )
            .push("destination_workload", destination.workload)
            .push("destination_canonical_service", destination.service)
            .push("destination_canonical_revision", destination.revision)
            .push("destination_workload_namespace", destination.namespace)
            .push("destination_principal", principal.as_deref().unwrap_or(UNKNOWN))
            .push("destination_app", destination.app)
            .push("destination_version", destination.revision)
            .push("destination_cluster", destination.cluster);
    }
}
