//! The state in the shape of Istio's `/config_dump`, as istioctl reads it.

use crate::{Handle, View, services::Group};
use mesh_core::{
    Gateway, Health, HealthPolicy, IpFamilies, LoadBalancing, Membership, Mode, NetworkMode,
    PortMap, Scope, Service, TunnelProtocol, Visibility, Workload,
};
use mesh_policy::wire;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Leaves out what is empty.
fn put(map: &mut Map<String, Value>, key: &str, text: &str) {
    if !text.is_empty() {
        map.insert(key.to_owned(), text.into());
    }
}

fn ports(list: &[PortMap]) -> Value {
    list.iter()
        .map(|map| (map.service.to_string(), Value::from(map.target)))
        .collect::<Map<_, _>>()
        .into()
}

fn gateway(gateway: &Gateway) -> Value {
    json!({
        "destination": gateway.destination.to_string(),
        "hboneMtlsPort": gateway.hbone_port,
    })
}

fn health(health: Health) -> &'static str {
    match health {
        Health::Healthy => "Healthy",
        Health::Unhealthy => "Unhealthy",
    }
}

/// All, a part of the index at a time, so that the writer never waits for long.
fn gather<T>(state: &Handle, of_part: impl Fn(&View, usize) -> Option<Vec<T>>) -> Vec<T> {
    let part = |part| state.read(|view| of_part(view, part));
    (0..).map_while(part).flatten().collect()
}

/// The workloads, by uid.
#[must_use]
pub fn workloads(state: &Handle) -> Value {
    let part =
        |view: &View, part| view.workloads.of_part(part).map(|these| these.cloned().collect());
    let mut all: Vec<Arc<Workload>> = gather(state, part);
    all.sort_unstable_by(|a, b| a.uid.cmp(&b.uid));
    all.iter().map(|w| workload(w)).collect()
}

fn workload(w: &Workload) -> Value {
    let mut map = Map::new();
    let mut text = |key, text: &str| put(&mut map, key, text);
    text("uid", w.uid.as_str());
    text("name", w.name.as_str());
    text("namespace", w.identity.namespace.as_str());
    text("trustDomain", w.identity.trust_domain.as_str());
    text("serviceAccount", w.identity.service_account.as_str());
    text("network", w.network.as_str());
    text("workloadName", w.workload_name.as_str());
    text("workloadType", w.kind.as_str());
    text("canonicalName", w.canonical_name.as_str());
    text("canonicalRevision", w.canonical_revision.as_str());
    text("hostname", w.hostname.as_ref().map_or("", |host| host.as_str()));
    text("node", w.node.as_str());
    text("clusterId", w.cluster.as_str());
    text("status", health(w.health));
    text(
        "protocol",
        match w.protocol {
            TunnelProtocol::Hbone => "HBONE",
            TunnelProtocol::None => "TCP",
        },
    );
    text(
        "networkMode",
        match w.network_mode {
            NetworkMode::Standard => "Standard",
            NetworkMode::HostNetwork => "HostNetwork",
        },
    );
    let ips: Vec<String> = w.ips.iter().map(ToString::to_string).collect();
    map.insert("workloadIps".to_owned(), ips.into());
    map.insert("capacity".to_owned(), w.capacity.into());
    if w.native_tunnel {
        map.insert("nativeTunnel".to_owned(), true.into());
    }
    if let Some(waypoint) = &w.waypoint {
        map.insert("waypoint".to_owned(), gateway(waypoint));
    }
    if let Some(network) = &w.network_gateway {
        map.insert("networkGateway".to_owned(), gateway(network));
    }
    if let Some(tunnel) = w.application_tunnel {
        let protocol = if tunnel.proxy_protocol { "PROXY" } else { "NONE" };
        map.insert(
            "applicationTunnel".to_owned(),
            json!({ "protocol": protocol, "port": tunnel.port }),
        );
    }
    if !w.policies.is_empty() {
        let names: Vec<_> = w.policies.iter().map(|name| name.as_str()).collect();
        map.insert("authorizationPolicies".to_owned(), names.into());
    }
    if !w.services.is_empty() {
        let names: Vec<_> = w.services.iter().map(|m: &Membership| m.service.to_string()).collect();
        map.insert("services".to_owned(), names.into());
    }
    let mut place = Map::new();
    put(&mut place, "region", w.locality.region.as_str());
    put(&mut place, "zone", w.locality.zone.as_str());
    put(&mut place, "subzone", w.locality.subzone.as_str());
    if !place.is_empty() {
        map.insert("locality".to_owned(), place.into());
    }
    map.into()
}

/// The services, by hostname.
#[must_use]
pub fn services(state: &Handle) -> Value {
    let one = |group: &Group| Some((Arc::clone(group.service()?), group.endpoints().to_vec()));
    let mut all: Vec<(Arc<Service>, Vec<Arc<Workload>>)> = gather(state, |view, part| {
        view.services.of_part(part).map(|groups| groups.filter_map(one).collect())
    });
    all.sort_unstable_by(|(a, _), (b, _)| {
        (&a.key.hostname, &a.key.namespace).cmp(&(&b.key.hostname, &b.key.namespace))
    });
    all.iter().map(|(s, endpoints)| service(s, endpoints)).collect()
}

fn service(s: &Service, endpoints: &[Arc<Workload>]) -> Value {
    let mut map = Map::new();
    put(&mut map, "name", s.name.as_str());
    put(&mut map, "namespace", s.key.namespace.as_str());
    put(&mut map, "hostname", s.key.hostname.as_str());
    let (exact, blocks): (Vec<_>, Vec<_>) =
        s.vips.iter().partition(|vip| vip.block.single().is_some());
    let vips: Vec<_> = exact.iter().map(|v| format!("{}/{}", v.network, v.block.ip())).collect();
    map.insert("vips".to_owned(), vips.into());
    if !blocks.is_empty() {
        let blocks = blocks
            .iter()
            .map(|v| json!({ "network": v.network.as_str(), "cidr": v.block.to_string() }));
        map.insert("cidrVips".to_owned(), blocks.collect());
    }
    map.insert("ports".to_owned(), ports(&s.ports));
    let endpoints: Map<_, _> = endpoints
        .iter()
        .map(|w| {
            let own = w.membership(&s.key).map_or_else(
                || ports(&[]),
                |member| {
                    let resolved: Vec<_> = s
                        .ports
                        .iter()
                        .map(|map| PortMap {
                            service: map.service,
                            target: member.target_port(map.service).unwrap_or(map.target),
                        })
                        .collect();
                    ports(&resolved)
                },
            );
            let uid = w.uid.to_string();
            (uid.clone(), json!({ "workloadUid": uid, "port": own, "status": health(w.health) }))
        })
        .collect();
    map.insert("endpoints".to_owned(), endpoints.into());
    let names: Vec<_> = s.subject_alt_names.iter().map(ToString::to_string).collect();
    map.insert("subjectAltNames".to_owned(), names.into());
    if let Some(waypoint) = &s.waypoint {
        map.insert("waypoint".to_owned(), gateway(waypoint));
    }
    if !s.weighted_waypoints.is_empty() {
        let weighted = s
            .weighted_waypoints
            .iter()
            .map(|w| json!({ "destination": gateway(&w.gateway), "weight": w.weight }));
        map.insert("weightedWaypoints".to_owned(), weighted.collect());
    }
    if let Some(lb) = &s.load_balancing {
        map.insert("loadBalancer".to_owned(), load_balancer(lb));
    }
    put(
        &mut map,
        "ipFamilies",
        match s.ip_families {
            IpFamilies::Automatic => "",
            IpFamilies::V4 => "IPv4",
            IpFamilies::V6 => "IPv6",
            IpFamilies::Dual => "Dual",
        },
    );
    map.insert("canonical".to_owned(), s.canonical.into());
    put(
        &mut map,
        "visibility",
        match s.visibility {
            Visibility::Public => "Public",
            Visibility::Namespace => "Namespace",
        },
    );
    map.into()
}

fn load_balancer(lb: &LoadBalancing) -> Value {
    let scope = |scope: &Scope| match scope {
        Scope::Region => "Region",
        Scope::Zone => "Zone",
        Scope::Subzone => "Subzone",
        Scope::Node => "Node",
        Scope::Cluster => "Cluster",
        Scope::Network => "Network",
    };
    json!({
        "routingPreferences": lb.preferences.iter().map(scope).collect::<Vec<_>>(),
        "mode": match lb.mode {
            Mode::Standard => "Standard",
            Mode::Strict => "Strict",
            Mode::Failover => "Failover",
            Mode::Passthrough => "Passthrough",
        },
        "healthPolicy": match lb.health {
            HealthPolicy::OnlyHealthy => "OnlyHealthy",
            HealthPolicy::AllowAll => "AllowAll",
        },
    })
}

/// The policies, by name.
#[must_use]
pub fn policies(state: &Handle) -> Value {
    let all: Vec<Arc<wire::Authorization>> =
        state.read(|view| view.policies.values().cloned().collect());
    all.iter().map(|policy| policy.dump()).collect()
}

/// The endpoints of services that have not come.
#[must_use]
pub fn staged_services(state: &Handle) -> Value {
    let one = |group: &Group| {
        let endpoints = || group.endpoints().to_vec();
        group.service().is_none().then(|| (group.key().to_string(), endpoints()))
    };
    let staged = gather(state, |view, part| {
        view.services.of_part(part).map(|groups| groups.filter_map(one).collect())
    });
    let of = |(key, endpoints): (String, Vec<Arc<Workload>>)| {
        let endpoints: Map<_, _> = endpoints
            .iter()
            .map(|w| {
                let own = w.services.iter().find(|member| member.service.to_string() == key);
                let own = ports(own.map(|member| &*member.ports).unwrap_or_default());
                let uid = w.uid.to_string();
                let value = json!({ "workloadUid": uid, "port": own, "status": health(w.health) });
                (uid, value)
            })
            .collect();
        (key, Value::Object(endpoints))
    };
    let staged: Map<_, _> = staged.into_iter().map(of).collect();
    if staged.is_empty() { Value::Null } else { staged.into() }
}

#[cfg(test)]
mod tests;
