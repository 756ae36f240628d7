//! From `istio.workload` to the vocabulary of the mesh.

use mesh_core::{
    ApplicationTunnel, Cidr, Destination, Gateway, Health, HealthPolicy, Hostname, Interner,
    IpFamilies, LoadBalancing, Locality, Membership, Mode, Namespace, NetworkAddress, NetworkId,
    NetworkMode, PolicyName, PortMap, Scope, Service, ServiceAccount, ServiceKey, SpiffeId,
    Template, Text, TrustDomain, TunnelProtocol, Vip, Visibility, WeightedGateway, Workload,
    WorkloadKind, WorkloadUid,
};
use mesh_proto::istio::workload as proto;
use std::{collections::HashSet, error::Error, fmt, hash::Hash, net::IpAddr, sync::Arc};

pub use mesh_policy::wire::{Message as Authorization, scope_of_unreadable};
pub use proto::{Address, address::Type as AddressType};

/// A resource that cannot be used: which field, and what is wrong with it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct InvalidResource {
    field: &'static str,
    problem: &'static str,
}

impl fmt::Display for InvalidResource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.problem)
    }
}

impl Error for InvalidResource {}

type Read<T> = Result<T, InvalidResource>;

const fn invalid(field: &'static str, problem: &'static str) -> InvalidResource {
    InvalidResource { field, problem }
}

/// Shares what repeats: names by their text, localities and templates whole.
#[derive(Debug, Default)]
pub(crate) struct Names {
    pub(crate) texts: Interner,
    localities: Shared<Locality>,
    templates: Shared<Template>,
}

/// One copy of each value in use. Forgets, as it grows, the values that nobody else holds.
#[derive(Debug)]
struct Shared<T> {
    values: HashSet<Arc<T>>,
    sweep_at: usize,
}

impl<T> Default for Shared<T> {
    fn default() -> Self {
        Self { values: HashSet::new(), sweep_at: 0 }
    }
}

impl<T: Eq + Hash> Shared<T> {
    fn share(&mut self, value: T) -> Arc<T> {
        if let Some(known) = self.values.get(&value) {
            return Arc::clone(known);
        }
        if self.values.len() >= self.sweep_at {
            self.values.retain(|known| Arc::strong_count(known) > 1);
            // Twice what is left, so that the cost of a sweep is paid by what came since.
            self.sweep_at = self.values.len().saturating_mul(2).max(64);
        }
        let new = Arc::new(value);
        self.values.insert(Arc::clone(&new));
        new
    }
}

impl Names {
    fn text(&mut self, text: &str) -> Text {
        Text::interned(text, &mut self.texts).unwrap_or_default()
    }

    fn locality(&mut self, locality: Option<&proto::Locality>) -> Arc<Locality> {
        let empty = proto::Locality::default();
        let proto::Locality { region, zone, subzone } = locality.unwrap_or(&empty);
        let locality = Locality {
            region: self.text(region),
            zone: self.text(zone),
            subzone: self.text(subzone),
        };
        self.localities.share(locality)
    }
}

fn ip(field: &'static str, bytes: &[u8]) -> Read<IpAddr> {
    let ip: IpAddr = match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).map(IpAddr::from),
        _ => return Err(invalid(field, "an address has 4 or 16 bytes")),
    }
    .map_err(|_length| invalid(field, "an address has 4 or 16 bytes"))?;
    Ok(ip.to_canonical())
}

fn network_address(
    field: &'static str,
    message: &proto::NetworkAddress,
    names: &mut Names,
) -> Read<NetworkAddress> {
    let network = NetworkId::interned(&message.network, &mut names.texts)
        .map_err(|_invalid| invalid(field, "not a network"))?;
    Ok(NetworkAddress { network, ip: ip(field, &message.address)? })
}

fn hostname(field: &'static str, text: &str, names: &mut Names) -> Read<Hostname> {
    Hostname::interned(text, &mut names.texts).map_err(|_invalid| invalid(field, "not a hostname"))
}

fn namespace(field: &'static str, text: &str, names: &mut Names) -> Read<Namespace> {
    Namespace::interned(text, &mut names.texts)
        .map_err(|_invalid| invalid(field, "not a namespace"))
}

fn gateway(
    field: &'static str,
    message: &proto::GatewayAddress,
    names: &mut Names,
) -> Read<Gateway> {
    use proto::gateway_address::Destination as D;
    let destination = match &message.destination {
        Some(D::Address(address)) => Destination::Address(network_address(field, address, names)?),
        Some(D::Hostname(host)) => Destination::Hostname(
            namespace(field, &host.namespace, names)?,
            hostname(field, &host.hostname, names)?,
        ),
        None => return Err(invalid(field, "a gateway needs a destination")),
    };
    let hbone_port = port(field, message.hbone_mtls_port)?;
    Ok(Gateway { destination, hbone_port })
}

fn port(field: &'static str, port: u32) -> Read<u16> {
    u16::try_from(port).map_err(|_large| invalid(field, "a port is at most 65535"))
}

fn ports(field: &'static str, list: &[proto::Port]) -> Read<Vec<PortMap>> {
    list.iter()
        .map(|map| {
            Ok(PortMap {
                service: port(field, map.service_port)?,
                target: port(field, map.target_port)?,
            })
        })
        .collect()
}

/// Reads a workload.
///
/// # Errors
///
/// Returns the field that cannot be used.
pub(crate) fn workload(message: &proto::Workload, names: &mut Names) -> Read<Workload> {
    let health = match proto::WorkloadStatus::try_from(message.status) {
        Ok(proto::WorkloadStatus::Healthy) => Health::Healthy,
        Ok(proto::WorkloadStatus::Unhealthy) => Health::Unhealthy,
        Err(_unknown) => return Err(invalid("status", "unknown value")),
    };
    let template = template(message, names)?;
    Ok(Workload {
        // Each is its own: nothing to share.
        uid: message.uid.parse::<WorkloadUid>().map_err(|_invalid| invalid("uid", "empty"))?,
        name: message.name.parse::<Text>().unwrap_or_default(),
        node: names.text(&message.node),
        hostname: match message.hostname.as_str() {
            "" => None,
            host => Some(hostname("hostname", host, names)?),
        },
        ips: message.addresses.iter().map(|a| ip("addresses", a)).collect::<Read<_>>()?,
        capacity: message.capacity.unwrap_or(1),
        health,
        template: names.templates.share(template),
    })
}

fn or<'a>(text: &'a str, default: &'a str) -> &'a str {
    if text.is_empty() { default } else { text }
}

fn identity(message: &proto::Workload, names: &mut Names) -> Read<SpiffeId> {
    let trust_domain =
        TrustDomain::interned(or(&message.trust_domain, "cluster.local"), &mut names.texts)
            .map_err(|_invalid| invalid("trust_domain", "not a trust domain"))?;
    let service_account =
        ServiceAccount::interned(or(&message.service_account, "default"), &mut names.texts)
            .map_err(|_invalid| invalid("service_account", "not a service account"))?;
    let namespace = namespace("namespace", &message.namespace, names)?;
    Ok(SpiffeId { trust_domain, namespace, service_account })
}

/// What the workload has in common with its replicas.
fn template(message: &proto::Workload, names: &mut Names) -> Read<Template> {
    let protocol = match proto::TunnelProtocol::try_from(message.tunnel_protocol) {
        Ok(proto::TunnelProtocol::None) => TunnelProtocol::None,
        Ok(proto::TunnelProtocol::Hbone) => TunnelProtocol::Hbone,
        Ok(proto::TunnelProtocol::LegacyIstioMtls) | Err(_) => {
            return Err(invalid("tunnel_protocol", "neither NONE nor HBONE"));
        }
    };
    let network_mode = match proto::NetworkMode::try_from(message.network_mode) {
        Ok(proto::NetworkMode::Standard) => NetworkMode::Standard,
        Ok(proto::NetworkMode::HostNetwork) => NetworkMode::HostNetwork,
        Err(_unknown) => return Err(invalid("network_mode", "unknown value")),
    };
    let kind = match proto::WorkloadType::try_from(message.workload_type) {
        Ok(proto::WorkloadType::Cronjob) => WorkloadKind::CronJob,
        Ok(proto::WorkloadType::Pod) => WorkloadKind::Pod,
        Ok(proto::WorkloadType::Job) => WorkloadKind::Job,
        Ok(proto::WorkloadType::Deployment) | Err(_) => WorkloadKind::Deployment,
    };
    let optional = |message: &Option<proto::GatewayAddress>, field, names: &mut Names| {
        message.as_ref().map(|g| gateway(field, g, names).map(Box::new)).transpose()
    };
    let policy = |name: &String, names: &mut Names| {
        PolicyName::interned(name, &mut names.texts)
            .map_err(|_invalid| invalid("authorization_policies", "not namespace/name"))
    };
    Ok(Template {
        identity: identity(message, names)?,
        network: NetworkId::interned(&message.network, &mut names.texts)
            .map_err(|_invalid| invalid("network", "not a network"))?,
        protocol,
        network_mode,
        kind,
        native_tunnel: message.native_tunnel,
        workload_name: names.text(&message.workload_name),
        canonical_name: names.text(&message.canonical_name),
        canonical_revision: names.text(&message.canonical_revision),
        cluster: names.text(or(&message.cluster_id, "Kubernetes")),
        locality: names.locality(message.locality.as_ref()),
        waypoint: optional(&message.waypoint, "waypoint", names)?,
        network_gateway: optional(&message.network_gateway, "network_gateway", names)?,
        application_tunnel: application_tunnel(message.application_tunnel.as_ref())?,
        policies: message
            .authorization_policies
            .iter()
            .map(|name| policy(name, names))
            .collect::<Read<_>>()?,
        services: memberships(message, names)?,
    })
}

fn application_tunnel(
    message: Option<&proto::ApplicationTunnel>,
) -> Read<Option<ApplicationTunnel>> {
    use proto::application_tunnel::Protocol;
    let Some(message) = message else { return Ok(None) };
    let proxy_protocol = match Protocol::try_from(message.protocol) {
        Ok(Protocol::None) => false,
        Ok(Protocol::Proxy) => true,
        Err(_unknown) => return Err(invalid("application_tunnel.protocol", "unknown value")),
    };
    let port = port("application_tunnel.port", message.port)?;
    Ok(Some(ApplicationTunnel { proxy_protocol, port: (port != 0).then_some(port) }))
}

fn memberships(message: &proto::Workload, names: &mut Names) -> Read<Box<[Membership]>> {
    let mut members = message
        .services
        .iter()
        .map(|(key, list)| {
            Ok(Membership {
                service: service_key("services", key, names)?,
                ports: ports("services", &list.ports)?.into(),
            })
        })
        .collect::<Read<Vec<_>>>()?;
    // A map has no order of its own, and an update that changes nothing must be equal.
    members.sort_unstable_by(|a, b| a.service.cmp(&b.service));
    Ok(members.into())
}

fn service_key(field: &'static str, text: &str, names: &mut Names) -> Read<ServiceKey> {
    let (namespace_text, host) =
        text.split_once('/').ok_or(invalid(field, "a key is namespace/hostname"))?;
    Ok(ServiceKey {
        namespace: namespace(field, namespace_text, names)?,
        hostname: hostname(field, host, names)?,
    })
}

/// Reads a service.
///
/// # Errors
///
/// Returns the field that cannot be used.
pub(crate) fn service(message: &proto::Service, names: &mut Names) -> Read<Service> {
    let key = ServiceKey {
        namespace: namespace("namespace", &message.namespace, names)?,
        hostname: hostname("hostname", &message.hostname, names)?,
    };
    let ip_families = match proto::IpFamilies::try_from(message.ip_families) {
        Ok(proto::IpFamilies::Automatic) => IpFamilies::Automatic,
        Ok(proto::IpFamilies::Ipv4Only) => IpFamilies::V4,
        Ok(proto::IpFamilies::Ipv6Only) => IpFamilies::V6,
        Ok(proto::IpFamilies::Dual) => IpFamilies::Dual,
        Err(_unknown) => return Err(invalid("ip_families", "unknown value")),
    };
    let visibility = match proto::service::Visibility::try_from(message.visibility) {
        Ok(proto::service::Visibility::Namespace) => Visibility::Namespace,
        Ok(proto::service::Visibility::Public) | Err(_) => Visibility::Public,
    };
    let waypoint = message.waypoint.as_ref().map(|g| gateway("waypoint", g, names)).transpose()?;
    let weighted = |message: &proto::WeightedWaypoint, names: &mut Names| {
        let field = "weighted_waypoints";
        let destination = message.destination.as_ref();
        let destination = destination.ok_or(invalid(field, "a waypoint needs a destination"))?;
        Ok(WeightedGateway { gateway: gateway(field, destination, names)?, weight: message.weight })
    };
    Ok(Service {
        key,
        name: names.text(&message.name),
        vips: message.addresses.iter().map(|a| vip(a, names)).collect::<Read<_>>()?,
        ports: ports("ports", &message.ports)?,
        // What does not parse could match no certificate.
        subject_alt_names: message
            .subject_alt_names
            .iter()
            .filter_map(|s| s.parse().ok())
            .collect(),
        waypoint,
        weighted_waypoints: message
            .weighted_waypoints
            .iter()
            .map(|w| weighted(w, names))
            .collect::<Read<_>>()?,
        load_balancing: message.load_balancing.as_ref().map(load_balancing).transpose()?,
        ip_families,
        canonical: message.canonical,
        visibility,
    })
}

fn vip(message: &proto::NetworkAddress, names: &mut Names) -> Read<Vip> {
    let NetworkAddress { network, ip } = network_address("addresses", message, names)?;
    let block = match message.length {
        None => Cidr::host(ip),
        Some(length) => u8::try_from(length)
            .ok()
            .and_then(|length| Cidr::new(ip, length).ok())
            .ok_or(invalid("addresses", "the prefix is longer than the address"))?,
    };
    Ok(Vip { network, block })
}

fn load_balancing(message: &proto::LoadBalancing) -> Read<LoadBalancing> {
    use proto::load_balancing::{HealthPolicy as H, Mode as M, Scope as S};
    let scope = |value: &i32| match S::try_from(*value) {
        Ok(S::Region) => Ok(Scope::Region),
        Ok(S::Zone) => Ok(Scope::Zone),
        Ok(S::Subzone) => Ok(Scope::Subzone),
        Ok(S::Node) => Ok(Scope::Node),
        Ok(S::Cluster) => Ok(Scope::Cluster),
        Ok(S::Network) => Ok(Scope::Network),
        Ok(S::UnspecifiedScope) | Err(_) => {
            Err(invalid("load_balancing.routing_preference", "unknown value"))
        }
    };
    Ok(LoadBalancing {
        preferences: message.routing_preference.iter().map(scope).collect::<Read<_>>()?,
        mode: match M::try_from(message.mode) {
            Ok(M::UnspecifiedMode) => Mode::Standard,
            Ok(M::Strict) => Mode::Strict,
            Ok(M::Failover) => Mode::Failover,
            Ok(M::Passthrough) => Mode::Passthrough,
            Err(_unknown) => return Err(invalid("load_balancing.mode", "unknown value")),
        },
        health: match H::try_from(message.health_policy) {
            Ok(H::OnlyHealthy) => HealthPolicy::OnlyHealthy,
            Ok(H::AllowAll) => HealthPolicy::AllowAll,
            Err(_unknown) => return Err(invalid("load_balancing.health_policy", "unknown value")),
        },
    })
}

#[cfg(test)]
mod tests;
