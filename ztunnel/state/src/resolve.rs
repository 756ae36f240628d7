//! From an address or a gateway reference to the endpoint that serves it. Pure: chance comes in as a
//! seed.

use crate::{View, services::Group};
use mesh_core::{
    Destination, Gateway, Health, HealthPolicy, IpFamilies, Mode, NetworkAddress, NetworkId, Scope,
    Service, Workload,
};
use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

/// Whether a service has to declare the port that is asked for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Resolution {
    /// It has.
    Standard,
    /// It need not, where the endpoint terminates tunnels itself.
    Waypoint,
}

/// An endpoint that was chosen.
#[derive(Clone, Debug)]
pub struct Upstream {
    /// The endpoint.
    pub workload: Arc<Workload>,
    /// Its port.
    pub port: u16,
    /// The service that it was chosen for.
    pub service: Option<Arc<Service>>,
}

/// What stands behind an address.
#[derive(Clone, Debug)]
pub enum Found {
    /// An endpoint.
    Upstream(Upstream),
    /// A service whose connections go where they were going.
    Passthrough(Arc<Service>),
    /// A service without a usable endpoint.
    NoEndpoint(Arc<Service>),
    /// Nobody that we know.
    Nobody,
}

/// A look-up on behalf of a client.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    /// Who asks.
    pub source: &'a Workload,
    /// Chance. The same seed chooses alike.
    pub seed: u64,
    /// The rule for undeclared ports.
    pub resolution: Resolution,
}

/// Spreads a seed, so that choices made with one seed do not hang together.
#[must_use]
pub fn spread(seed: u64, salt: u64) -> u64 {
    // SplitMix64.
    let mut z = seed.wrapping_add(salt.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// One of the items by weight; `None` where all weights are 0.
pub fn weighted<T>(items: &[(T, u32)], seed: u64) -> Option<&T> {
    let total: u64 = items.iter().map(|(_, weight)| u64::from(*weight)).sum();
    let mut left = below(spread(seed, 0), total);
    items.iter().find_map(|(item, weight)| {
        let weight = u64::from(*weight);
        if left < weight {
            return Some(item);
        }
        left -= weight;
        None
    })
}

impl View {
    /// Who serves this address, for this client: a service's endpoint first, then a workload.
    #[must_use]
    pub fn upstream(&self, network: &NetworkId, to: SocketAddr, query: Query<'_>) -> Found {
        let address = NetworkAddress { network: network.clone(), ip: to.ip() };
        if let Some(service) = self.service_at(&address, &query.source.identity.namespace) {
            return self.upstream_of(service, to.port(), query);
        }
        match self.workload_at(&address) {
            Some(workload) => {
                Found::Upstream(Upstream { workload, port: to.port(), service: None })
            }
            None => Found::Nobody,
        }
    }

    /// An endpoint of this service for this port of it.
    #[must_use]
    pub fn upstream_of(&self, service: Arc<Service>, port: u16, query: Query<'_>) -> Found {
        let mode = service.load_balancing.as_ref().map_or(Mode::Standard, |lb| lb.mode);
        if mode == Mode::Passthrough {
            return Found::Passthrough(service);
        }
        let target = |workload: &Workload| target_port(&service, workload, port, query.resolution);
        let usable = |workload: &Workload| {
            is_candidate(&service, workload, query.source) && target(workload).is_some()
        };
        let Some(group) = self.services.group(&service.key) else {
            return Found::NoEndpoint(service);
        };
        let drawn = if mode == Mode::Standard { draw(group, query.seed, usable) } else { None };
        let chosen = drawn.or_else(|| {
            let candidates = group.endpoints().iter().filter(|workload| usable(workload));
            weighted(&best(&service, query.source, candidates), query.seed).copied()
        });
        match chosen {
            Some(workload) => {
                let port = target(workload).unwrap_or(port);
                let workload = Arc::clone(workload);
                Found::Upstream(Upstream { workload, port, service: Some(service) })
            }
            None => Found::NoEndpoint(service),
        }
    }

    /// The endpoint behind a reference to a waypoint or to a network gateway.
    #[must_use]
    pub fn gateway(&self, gateway: &Gateway, query: Query<'_>) -> Option<Upstream> {
        let port = gateway.hbone_port;
        let found = match &gateway.destination {
            Destination::Address(NetworkAddress { network, ip }) => {
                self.upstream(network, SocketAddr::new(*ip, port), query)
            }
            Destination::Hostname(namespace, host) => {
                let key =
                    mesh_core::ServiceKey { namespace: namespace.clone(), hostname: host.clone() };
                match self.service(&key) {
                    Some(service) => self.upstream_of(service, port, query),
                    None => {
                        let workload = self.workload_of_host(namespace, host)?;
                        return Some(Upstream { workload, port, service: None });
                    }
                }
            }
        };
        match found {
            Found::Upstream(upstream) => Some(upstream),
            Found::Passthrough(_) | Found::NoEndpoint(_) | Found::Nobody => None,
        }
    }

    /// Whether the reference leads to this very workload: to it, or to a service that it serves.
    #[must_use]
    pub fn gateway_is(&self, gateway: &Gateway, is_it: impl Fn(&Workload) -> bool) -> bool {
        let of_service =
            |service: &Service| self.endpoints(&service.key).iter().any(|workload| is_it(workload));
        match &gateway.destination {
            Destination::Address(address) => {
                self.workload_at(address).is_some_and(|workload| is_it(&workload))
                    || self.services.exact(address).any(|service| of_service(service))
            }
            Destination::Hostname(namespace, host) => {
                let key =
                    mesh_core::ServiceKey { namespace: namespace.clone(), hostname: host.clone() };
                match self.service(&key) {
                    Some(service) => of_service(&service),
                    None => self.workload_of_host(namespace, host).is_some_and(|w| is_it(&w)),
                }
            }
        }
    }
}

/// The endpoint's own port for the service's, else the service's target; where neither is said, an
/// application that takes tunnels on a port of its own gets the port that was asked for.
fn target_port(
    service: &Service,
    workload: &Workload,
    port: u16,
    resolution: Resolution,
) -> Option<u16> {
    let declared = service.target_port(port);
    let tunnel = workload.application_tunnel;
    let may = match resolution {
        Resolution::Standard => declared.is_some(),
        Resolution::Waypoint => declared.is_some() || tunnel.is_some(),
    };
    if !may {
        return None;
    }
    let own = workload.membership(&service.key).and_then(|member| member.target_port(port));
    let open = match resolution {
        Resolution::Standard => None,
        Resolution::Waypoint => tunnel.and_then(|tunnel| tunnel.port).map(|_| port),
    };
    own.or(declared.filter(|target| *target != 0)).or(open)
}

/// Fewer endpoints are weighed all.
const MANY: usize = 32;
/// Where so many draws hit nobody, most endpoints cannot be used, and all are weighed.
const DRAWS: u64 = 32;

/// Draws endpoints until one can be used and is heavy enough: as likely as its weight, and without looking
/// at all of them.
fn draw(group: &Group, seed: u64, usable: impl Fn(&Workload) -> bool) -> Option<&Arc<Workload>> {
    let endpoints = group.endpoints();
    if endpoints.len() < MANY {
        return None;
    }
    (0..DRAWS).find_map(|turn| {
        let chance = spread(seed, turn);
        let endpoint =
            endpoints.get(usize::try_from(below(chance, endpoints.len() as u64)).ok()?)?;
        let heavy = below(spread(chance, 1), group.heaviest().into()) < endpoint.capacity.into();
        (heavy && usable(endpoint)).then_some(endpoint)
    })
}

/// Maps a random number onto `0..end` without the bias of a remainder.
fn below(chance: u64, end: u64) -> u64 {
    u64::try_from((u128::from(chance) * u128::from(end)) >> 64).unwrap_or_default()
}

fn is_candidate(service: &Service, workload: &Workload, source: &Workload) -> bool {
    let all = service.load_balancing.as_ref().is_some_and(|lb| lb.health == HealthPolicy::AllowAll);
    let healthy = all || workload.health == Health::Healthy;
    let reachable = !workload.ips.is_empty()
        || workload.hostname.is_some()
        || (workload.network != source.network && workload.network_gateway.is_some());
    healthy && reachable
}

/// Those that rank highest, with their weights.
fn best<'a>(
    service: &Service,
    source: &Workload,
    candidates: impl Iterator<Item = &'a Arc<Workload>>,
) -> Vec<(&'a Arc<Workload>, u32)> {
    let weigh = |workload: &'a Arc<Workload>| (workload, workload.capacity);
    let Some(lb) = &service.load_balancing else { return candidates.map(weigh).collect() };
    let strict = match lb.mode {
        Mode::Standard | Mode::Passthrough => return candidates.map(weigh).collect(),
        Mode::Strict => true,
        Mode::Failover => false,
    };
    let mut top = 0;
    let mut kept = Vec::new();
    for workload in candidates {
        let (rank, complete) = rank(&lb.preferences, source, workload);
        if strict && !complete || rank < top {
            continue;
        }
        if rank > top {
            top = rank;
            kept.clear();
        }
        kept.push(weigh(workload));
    }
    kept
}

/// How many preferences match before the first that does not, and whether all do. Where the first is the
/// network, a mismatch there is passed over and a match outranks everything else: so locality still
/// ranks within each network.
fn rank(preferences: &[Scope], source: &Workload, workload: &Workload) -> (usize, bool) {
    let mut rank = 0;
    for (at, scope) in preferences.iter().enumerate() {
        let network_first = at == 0 && *scope == Scope::Network;
        match (matches(*scope, source, workload), network_first) {
            (true, true) => rank += preferences.len(),
            (true, false) => rank += 1,
            (false, true) => {}
            (false, false) => return (rank, false),
        }
    }
    let complete = preferences.iter().all(|scope| matches(*scope, source, workload));
    (rank, complete)
}

fn matches(scope: Scope, source: &Workload, workload: &Workload) -> bool {
    let (ours, theirs) = (&source.locality, &workload.locality);
    match scope {
        Scope::Region => ours.region == theirs.region,
        Scope::Zone => ours.zone == theirs.zone,
        Scope::Subzone => ours.subzone == theirs.subzone,
        Scope::Node => source.node == workload.node,
        Scope::Cluster => source.cluster == workload.cluster,
        Scope::Network => source.network == workload.network,
    }
}

/// Which address of the chosen workload to connect to: the one that was asked for, else one of its
/// families, the asked-for family first.
#[must_use]
pub fn choose_ip(workload: &Workload, service: Option<&Service>, asked: IpAddr) -> Option<IpAddr> {
    if workload.ips.contains(&asked) {
        return Some(asked);
    }
    let allowed = |ip: &&IpAddr| match service.map(|service| service.ip_families) {
        Some(IpFamilies::V4) => ip.is_ipv4(),
        Some(IpFamilies::V6) => ip.is_ipv6(),
        Some(IpFamilies::Automatic | IpFamilies::Dual) | None => true,
    };
    let same = workload.ips.iter().filter(allowed).find(|ip| ip.is_ipv4() == asked.is_ipv4());
    same.or_else(|| workload.ips.iter().find(allowed)).copied()
}

#[cfg(test)]
mod tests;
