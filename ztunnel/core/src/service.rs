//! A service, as the control plane describes it.

use crate::{Cidr, Gateway, Hostname, Namespace, NetworkId, SpiffeId, Text, WeightedGateway};
use std::fmt;

/// The key of a service. Prints as `namespace/hostname`.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ServiceKey {
    /// The namespace of the service.
    pub namespace: Namespace,
    /// Its fully qualified name.
    pub hostname: Hostname,
}

/// A service.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Service {
    /// The primary key.
    pub key: ServiceKey,
    /// Its short name, for telemetry.
    pub name: Text,
    /// Its virtual addresses; none where it is headless.
    pub vips: Vec<Vip>,
    /// Its ports and the target ports that its endpoints use unless they say otherwise.
    pub ports: Vec<PortMap>,
    /// Identities that its endpoints may present besides their own.
    pub subject_alt_names: Vec<SpiffeId>,
    /// The waypoint in front of it.
    pub waypoint: Option<Gateway>,
    /// Waypoints by weight; where there are any they replace `waypoint`.
    pub weighted_waypoints: Vec<WeightedGateway>,
    /// How an endpoint is chosen; where absent, at random among all.
    pub load_balancing: Option<LoadBalancing>,
    /// The address families that it serves.
    pub ip_families: IpFamilies,
    /// Whether it is the one to prefer among those of its hostname.
    pub canonical: bool,
    /// Who may use it.
    pub visibility: Visibility,
}

/// A virtual address, or a block of them.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Vip {
    /// The network that it is valid in.
    pub network: NetworkId,
    /// The block; a single address has all its bits.
    pub block: Cidr,
}

/// A port of a service and where it leads. Prints as nothing: use the fields.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct PortMap {
    /// The port of the service.
    pub service: u16,
    /// The port of the endpoint; 0 where the service leaves it to each endpoint.
    pub target: u16,
}

/// How endpoints are ranked and filtered.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct LoadBalancing {
    /// What must match, in this order of weight.
    pub preferences: Vec<Scope>,
    /// What the preferences mean.
    pub mode: Mode,
    /// Which endpoints are candidates.
    pub health: HealthPolicy,
}

/// What source and endpoint may have in common.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Scope {
    /// The same region.
    Region,
    /// The same zone.
    Zone,
    /// The same subzone.
    Subzone,
    /// The same node.
    Node,
    /// The same cluster.
    Cluster,
    /// The same network.
    Network,
}

/// What the preferences of a service mean.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum Mode {
    /// Nothing: any endpoint.
    #[default]
    Standard,
    /// Only endpoints that match all.
    Strict,
    /// Those that match most.
    Failover,
    /// No endpoint is chosen: connections go where they were going.
    Passthrough,
}

/// Which endpoints are candidates.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum HealthPolicy {
    /// The healthy ones.
    #[default]
    OnlyHealthy,
    /// All.
    AllowAll,
}

/// The address families of a service.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum IpFamilies {
    /// Not said: both.
    #[default]
    Automatic,
    /// IPv4 alone.
    V4,
    /// IPv6 alone.
    V6,
    /// Both.
    Dual,
}

/// Who may use a service.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum Visibility {
    /// Everybody.
    #[default]
    Public,
    /// Clients of its own namespace.
    Namespace,
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.hostname)
    }
}

impl Service {
    /// The target port that the service itself gives for one of its ports: `None` where it does not
    /// declare the port, `Some(0)` where it leaves the target to each endpoint.
    #[must_use]
    pub fn target_port(&self, port: u16) -> Option<u16> {
        self.ports.iter().find(|map| map.service == port).map(|map| map.target)
    }

    /// Whether a client of this namespace may use the service.
    #[must_use]
    pub fn is_visible_to(&self, client: &Namespace) -> bool {
        match self.visibility {
            Visibility::Public => true,
            Visibility::Namespace => self.key.namespace == *client,
        }
    }
}
