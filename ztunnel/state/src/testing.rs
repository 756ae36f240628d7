//! Small meshes for the tests of this crate.

use crate::{Update, Writer};
use mesh_core::{
    Cidr, Health, IpFamilies, Locality, Membership, NetworkId, NetworkMode, PolicyName, PortMap,
    Service, ServiceKey, Template, Text, TunnelProtocol, Vip, Visibility, Workload, WorkloadKind,
};
use mesh_policy::{
    Action, Policy, Predicate,
    wire::{Authorization, Scope},
};
use std::{net::IpAddr, sync::Arc};

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn key(text: &str) -> ServiceKey {
    let (namespace, hostname) = text.split_once('/').unwrap();
    ServiceKey { namespace: namespace.parse().unwrap(), hostname: hostname.parse().unwrap() }
}

/// A healthy pod of namespace `ns` and node `n1`, called like the end of its uid.
pub(crate) fn workload(uid: &str, ips: &[&str]) -> Workload {
    let name = uid.rsplit('/').next().unwrap();
    Workload {
        uid: uid.parse().unwrap(),
        name: name.parse().unwrap(),
        node: "n1".parse().unwrap(),
        hostname: None,
        ips: ips.iter().map(|text| ip(text)).collect(),
        capacity: 1,
        health: Health::Healthy,
        template: Arc::new(Template {
            identity: format!("spiffe://cluster.local/ns/ns/sa/{name}").parse().unwrap(),
            network: NetworkId::default(),
            protocol: TunnelProtocol::Hbone,
            network_mode: NetworkMode::Standard,
            kind: WorkloadKind::Pod,
            native_tunnel: false,
            workload_name: Text::default(),
            canonical_name: Text::default(),
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
            services: Box::default(),
        }),
    }
}

/// The same, with its template changed.
pub(crate) fn with(mut workload: Workload, change: impl FnOnce(&mut Template)) -> Workload {
    change(Arc::make_mut(&mut workload.template));
    workload
}

/// The same, as an endpoint of the service, with these ports of its own.
pub(crate) fn serving(workload: Workload, service: &str, ports: &[(u16, u16)]) -> Workload {
    with(workload, |template| {
        let member = Membership { service: key(service), ports: map(ports) };
        template.services = template.services.iter().cloned().chain([member]).collect();
    })
}

fn map<T: FromIterator<PortMap>>(ports: &[(u16, u16)]) -> T {
    ports.iter().map(|&(service, target)| PortMap { service, target }).collect()
}

/// A service with port 80 that leads to 8080. A VIP may be a block.
pub(crate) fn service(name: &str, vips: &[&str]) -> Service {
    let vip = |text: &&str| {
        let (ip, length) = text.split_once('/').map_or((*text, None), |(ip, n)| (ip, Some(n)));
        let ip: IpAddr = ip.parse().unwrap();
        let block = length.map_or(Cidr::host(ip), |n| Cidr::new(ip, n.parse().unwrap()).unwrap());
        Vip { network: NetworkId::default(), block }
    };
    Service {
        key: key(name),
        name: Text::default(),
        vips: vips.iter().map(vip).collect(),
        ports: map(&[(80, 8080)]),
        subject_alt_names: vec![],
        waypoint: None,
        weighted_waypoints: vec![],
        load_balancing: None,
        ip_families: IpFamilies::Automatic,
        canonical: false,
        visibility: Visibility::Public,
    }
}

/// A policy that denies everything, in the namespace that its name begins with.
pub(crate) fn policy(name: PolicyName, scope: Scope) -> Update {
    let namespace = name.as_str().split_once('/').unwrap().0.parse().unwrap();
    let when = Predicate::All(vec![]);
    let policy = Policy { name, action: Action::Deny, dry_run: false, when };
    Update::Policy(Arc::new(Authorization { namespace, scope, policy: Arc::new(policy) }))
}

/// A writer on node `n1`.
pub(crate) fn writer() -> Writer {
    Writer::new("n1".parse().unwrap())
}

impl From<Workload> for Update {
    fn from(workload: Workload) -> Self {
        Self::Workload(Arc::new(workload))
    }
}

impl From<Service> for Update {
    fn from(service: Service) -> Self {
        Self::Service(Arc::new(service))
    }
}
