//! A small mesh for the tests of this crate.

use crate::{Resolver, Settings};
use mesh_core::{
    Cidr, Health, HealthPolicy, IpFamilies, LoadBalancing, Locality, Membership, Mode, NetworkId,
    NetworkMode, Service, ServiceKey, Template, Text, TunnelProtocol, Vip, Visibility, Workload,
    WorkloadKind,
};
use mesh_runtime::metrics::Registry;
use mesh_state::{Handle, Update, Writer};
use std::sync::Arc;

pub(crate) fn settings() -> Settings {
    Settings { domain: "mesh.test".to_owned(), ipv6: true, search: None, servers: Vec::new() }
}

pub(crate) fn key(text: &str) -> ServiceKey {
    let (namespace, hostname) = text.split_once('/').unwrap();
    ServiceKey { namespace: namespace.parse().unwrap(), hostname: hostname.parse().unwrap() }
}

/// A pod of namespace `ns1`, called like the end of its uid.
pub(crate) fn workload(uid: &str, ips: &[&str], services: &[&str]) -> Workload {
    let name = uid.rsplit('/').next().unwrap();
    let member = |text: &&str| Membership { service: key(text), ports: Box::default() };
    Workload {
        uid: uid.parse().unwrap(),
        name: name.parse().unwrap(),
        node: "n1".parse().unwrap(),
        hostname: None,
        ips: ips.iter().map(|text| text.parse().unwrap()).collect(),
        capacity: 1,
        health: Health::Healthy,
        template: Arc::new(Template {
            identity: format!("spiffe://cluster.local/ns/ns1/sa/{name}").parse().unwrap(),
            network: NetworkId::default(),
            protocol: TunnelProtocol::Hbone,
            network_mode: NetworkMode::Standard,
            kind: WorkloadKind::Pod,
            native_tunnel: false,
            workload_name: Text::default(),
            canonical_name: "client".parse().unwrap(),
            canonical_revision: Text::default(),
            cluster: Text::default(),
            locality: Arc::new(Locality {
                region: Text::default(),
                zone: Text::default(),
                subzone: Text::default(),
            }),
            waypoint: None,
            network_gateway: None,
            application_tunnel: None,
            policies: Box::default(),
            services: services.iter().map(member).collect(),
        }),
    }
}

/// A VIP may be a block, and may have a network before an `@`.
pub(crate) fn service(name: &str, vips: &[&str]) -> Service {
    let vip = |text: &&str| {
        let (network, text) = text.split_once('@').unwrap_or(("", text));
        let (ip, length) = text.split_once('/').map_or((text, None), |(ip, n)| (ip, Some(n)));
        let ip = ip.parse().unwrap();
        let block = length.map_or(Cidr::host(ip), |n| Cidr::new(ip, n.parse().unwrap()).unwrap());
        Vip { network: network.parse().unwrap(), block }
    };
    Service {
        key: key(name),
        name: Text::default(),
        vips: vips.iter().map(vip).collect(),
        ports: Vec::new(),
        subject_alt_names: vec![],
        waypoint: None,
        weighted_waypoints: vec![],
        load_balancing: None,
        ip_families: IpFamilies::Automatic,
        canonical: false,
        visibility: Visibility::Public,
    }
}

/// Publishes endpoints that are not ready.
pub(crate) fn unready() -> LoadBalancing {
    LoadBalancing { preferences: vec![], mode: Mode::Standard, health: HealthPolicy::AllowAll }
}

pub(crate) fn mesh(services: Vec<Service>, workloads: Vec<Workload>) -> Handle {
    let mut writer = Writer::new("n1".parse().unwrap());
    let handle = writer.handle();
    writer.apply(services.into_iter().map(|service| Update::Service(Arc::new(service))));
    writer.apply(workloads.into_iter().map(|workload| Update::Workload(Arc::new(workload))));
    handle
}

pub(crate) fn resolver(state: Handle, registry: &Registry) -> Resolver {
    Resolver::new(settings(), state, crate::Metrics::new(registry))
}

/// A query as stub resolvers send it.
pub(crate) fn ask(
    name: &str,
    kind: hickory_proto::rr::RecordType,
    payload: Option<u16>,
) -> Vec<u8> {
    use hickory_proto::{op, rr::Name};
    let mut message = op::Message::new(4711, op::MessageType::Query, op::OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(op::Query::query(Name::from_ascii(name).unwrap(), kind));
    if let Some(payload) = payload {
        let mut edns = op::Edns::new();
        edns.set_max_payload(payload).set_dnssec_ok(true);
        message.edns = Some(edns);
    }
    message.to_vec().unwrap()
}
