//! A workload, as the control plane describes it.

use crate::{
    Gateway, Hostname, NetworkId, PolicyName, PortMap, ServiceKey, SpiffeId, Text, WorkloadUid,
};
use std::{net::IpAddr, sync::Arc};

/// A workload. There may be half a million of them: what is rare is boxed, what repeats is shared.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Workload {
    /// The primary key.
    pub uid: WorkloadUid,
    /// The pod's name, or the entry's.
    pub name: Text,
    /// Who it is: its namespace and service account are in here.
    pub identity: SpiffeId,
    /// The network of its addresses.
    pub network: NetworkId,
    /// Its addresses; none where it is known by name or behind a gateway only.
    pub ips: Box<[IpAddr]>,
    /// How it can be reached.
    pub protocol: TunnelProtocol,
    /// Whether its addresses are its own.
    pub network_mode: NetworkMode,
    /// Whether the control plane holds it to be healthy.
    pub health: Health,
    /// What made it, for telemetry.
    pub kind: WorkloadKind,
    /// Whether it terminates tunnels itself, with no node proxy in front.
    pub native_tunnel: bool,
    /// Its weight among the endpoints of a service; 0 is never chosen.
    pub capacity: u32,
    /// What made it by name (the Deployment), for telemetry.
    pub workload_name: Text,
    /// The canonical service, for telemetry.
    pub canonical_name: Text,
    /// The canonical revision, for telemetry.
    pub canonical_revision: Text,
    /// The cluster that it is in.
    pub cluster: Text,
    /// The node that it is on.
    pub node: Text,
    /// Where it is.
    pub locality: Arc<Locality>,
    /// A name to resolve where it has no addresses; else the pod's hostname.
    pub hostname: Option<Hostname>,
    /// The waypoint in front of it.
    pub waypoint: Option<Box<Gateway>>,
    /// The gateway that leads to its network.
    pub network_gateway: Option<Box<Gateway>>,
    /// How an application that speaks a tunnel protocol itself is handed connections.
    pub application_tunnel: Option<ApplicationTunnel>,
    /// The policies that select it.
    pub policies: Box<[PolicyName]>,
    /// The services that it is an endpoint of.
    pub services: Box<[Membership]>,
}

/// A service that a workload is an endpoint of.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Membership {
    /// The service.
    pub service: ServiceKey,
    /// Where this workload serves the ports of the service, as far as it says so itself.
    pub ports: Box<[PortMap]>,
}

/// Where a workload is; parts may be empty.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Locality {
    /// The region.
    pub region: Text,
    /// The zone in it.
    pub zone: Text,
    /// The subzone in that.
    pub subzone: Text,
}

/// How a workload can be reached.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum TunnelProtocol {
    /// By plain TCP.
    #[default]
    None,
    /// Through HBONE.
    Hbone,
}

/// Whether the addresses of a workload are its own.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum NetworkMode {
    /// They are.
    #[default]
    Standard,
    /// They are its node's, so that it cannot be found by address.
    HostNetwork,
}

/// Whether the control plane holds a workload to be healthy.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum Health {
    /// It does.
    #[default]
    Healthy,
    /// It does not: not ready, or terminating.
    Unhealthy,
}

/// What made a workload. Istio's words, in lower case, are in the baggage and the dump.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum WorkloadKind {
    /// A Deployment.
    #[default]
    Deployment,
    /// A `CronJob`.
    CronJob,
    /// A pod by itself.
    Pod,
    /// A Job.
    Job,
}

/// How an application that terminates tunnels in the pod is handed connections.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct ApplicationTunnel {
    /// Whether a PROXY protocol header (v2) goes first.
    pub proxy_protocol: bool,
    /// The port to connect to; `None` is the port that was asked for.
    pub port: Option<u16>,
}

impl WorkloadKind {
    /// Istio's word for it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Deployment => "deployment",
            Self::CronJob => "cronjob",
            Self::Pod => "pod",
            Self::Job => "job",
        }
    }
}

impl Workload {
    /// Whether it is an endpoint of the service, and on which ports by its own word.
    #[must_use]
    pub fn membership(&self, service: &ServiceKey) -> Option<&Membership> {
        self.services.iter().find(|member| member.service == *service)
    }
}

impl Membership {
    /// The target port of this endpoint for a port of the service, where it says one itself.
    #[must_use]
    pub fn target_port(&self, port: u16) -> Option<u16> {
        self.ports.iter().find(|map| map.service == port && map.target != 0).map(|map| map.target)
    }
}
