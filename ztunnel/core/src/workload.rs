//! A workload, as the control plane describes it.

use crate::{
    Gateway, Hostname, NetworkId, PolicyName, PortMap, ServiceKey, SpiffeId, Text, WorkloadUid,
};
use std::{
    net::IpAddr,
    ops::Deref,
    slice::{self, Iter},
    sync::Arc,
};

/// A workload. There may be half a million of them, so that only what tells it from its replicas is held
/// here. The rest is its [`Template`]'s; its fields read as if they were the workload's.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Workload {
    /// The primary key.
    pub uid: WorkloadUid,
    /// The pod's name, or the entry's.
    pub name: Text,
    /// The node that it is on.
    pub node: Text,
    /// A name to resolve where it has no addresses; else the pod's hostname.
    pub hostname: Option<Hostname>,
    /// Its addresses; none where it is known by name or behind a gateway only.
    pub ips: Ips,
    /// Its weight among the endpoints of a service; 0 is never chosen.
    pub capacity: u32,
    /// Whether the control plane holds it to be healthy.
    pub health: Health,
    /// What it has in common with its replicas.
    pub template: Arc<Template>,
}

/// What the replicas of a workload have in common: one copy serves them all.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Template {
    /// Who it is: its namespace and service account are in here.
    pub identity: SpiffeId,
    /// The network of its addresses.
    pub network: NetworkId,
    /// How it can be reached.
    pub protocol: TunnelProtocol,
    /// Whether its addresses are its own.
    pub network_mode: NetworkMode,
    /// What made it, for telemetry.
    pub kind: WorkloadKind,
    /// Whether it terminates tunnels itself, with no node proxy in front.
    pub native_tunnel: bool,
    /// What made it by name (the Deployment), for telemetry.
    pub workload_name: Text,
    /// The canonical service, for telemetry.
    pub canonical_name: Text,
    /// The canonical revision, for telemetry.
    pub canonical_revision: Text,
    /// The cluster that it is in.
    pub cluster: Text,
    /// Where it is.
    pub locality: Arc<Locality>,
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

impl Deref for Workload {
    type Target = Template;

    fn deref(&self) -> &Template {
        &self.template
    }
}

/// The addresses of a workload, as a slice. One takes no memory of its own.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Ips {
    /// The usual case.
    One(IpAddr),
    /// None or several.
    Many(Box<[IpAddr]>),
}

impl Deref for Ips {
    type Target = [IpAddr];

    fn deref(&self) -> &[IpAddr] {
        match self {
            Self::One(ip) => slice::from_ref(ip),
            Self::Many(ips) => ips,
        }
    }
}

impl FromIterator<IpAddr> for Ips {
    fn from_iter<I: IntoIterator<Item = IpAddr>>(ips: I) -> Self {
        let mut ips = ips.into_iter();
        match (ips.next(), ips.next()) {
            (None, _) => Self::Many(Box::default()),
            (Some(one), None) => Self::One(one),
            (Some(one), Some(two)) => Self::Many([one, two].into_iter().chain(ips).collect()),
        }
    }
}

impl<'a> IntoIterator for &'a Ips {
    type Item = &'a IpAddr;
    type IntoIter = Iter<'a, IpAddr>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// A service that a workload is an endpoint of.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What this costs is multiplied by the size of the mesh.
    #[test]
    fn a_workload_stays_small() {
        assert!(size_of::<Ips>() <= 24, "{}", size_of::<Ips>());
        assert!(size_of::<Workload>() <= 112, "{}", size_of::<Workload>());
    }

    #[test]
    fn addresses_are_a_slice() {
        let ip = |last| IpAddr::from([10, 0, 0, last]);
        for ips in [vec![], vec![ip(1)], vec![ip(1), ip(2)], vec![ip(1), ip(2), ip(3)]] {
            let packed: Ips = ips.iter().copied().collect();
            assert_eq!(*packed, *ips);
        }
        assert!(matches!([ip(1)].into_iter().collect(), Ips::One(_)));
    }
}
