//! What the tests run on: the usual scene, with a control plane on node `a` that says all that can be said, and a
//! local file on node `b`.

use std::net::IpAddr;

use anyhow::Result;
use mesh_proto::istio::{
    security::{
        self, Action, Authorization, Clause, Match, Rule, Scope, ServiceAccountMatch, StringMatch,
        string_match::MatchType,
    },
    workload::{
        Address, ApplicationTunnel, GatewayAddress, IpFamilies, LoadBalancing, Locality,
        NamespacedHostname, NetworkAddress, NetworkMode, Port, PortList, Service, TunnelProtocol,
        WeightedWaypoint, Workload, WorkloadStatus, address::Type, application_tunnel,
        gateway_address::Destination, load_balancing, service::Visibility,
    },
};
use mesh_tests::{Scene, mesh::hostname};
use serde_json::json;

use crate::ads::{Ads, Said};

/// A service whose one endpoint is known by a name that this machine resolves.
pub(crate) const NAMED: [u8; 4] = [10, 96, 9, 1];
/// A service without an endpoint.
pub(crate) const EMPTY: [u8; 4] = [10, 96, 9, 2];
/// A workload in the mesh whose node answers nothing.
pub(crate) const LOST: [u8; 4] = [192, 0, 2, 1];

/// The release that it is told to be.
pub(crate) const RELEASE: &str = "1.99-contract";

/// The scene and the control plane of node `a`. By its IPv6 address, which nothing else uses, the pod `outsider` is a
/// workload `impostor` that takes tunnels.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) scene: Scene,
    pub(crate) ads: Ads,
}

impl World {
    /// Everything up. The settings are for both node proxies.
    pub(crate) fn start(settings: &[(&str, &str)]) -> Result<Self> {
        let mut scene = Scene::bare()?;
        // So that no label can be mistaken for another.
        for (pod, word) in [(&scene.client, "client"), (&scene.server, "server")] {
            let region = format!("{word}-region");
            if let Some(workload) = scene.mesh.workload_of(pod) {
                workload
                    .set("workloadName", json!(format!("{word}-deployment")))
                    .set("canonicalName", json!(format!("{word}-app")))
                    .set("canonicalRevision", json!(format!("{word}-v1")))
                    .set("clusterId", json!(format!("{word}-cluster")))
                    .set("locality", json!({ "region": region, "zone": format!("{word}-zone") }));
            }
        }
        scene.apply()?;
        let mut said = Said::of(&scene.mesh)?;
        widen(&mut said, scene.outsider.v6());
        let ads = Ads::start(scene.a.namespace(), said)?;
        let uri = ads.uri();
        let mut remote = vec![
            ("LOCAL_XDS_PATH", ""),
            ("XDS_ADDRESS", uri.as_str()),
            ("XDS_HEADER_x-contract", "kept"),
            ("ISTIO_META_CONTRACT", "metadata"),
            ("ISTIO_META_ISTIO_VERSION", RELEASE),
            ("AUTH_TOKEN", "a-secret-token"),
        ];
        remote.extend(settings);
        scene.a.start_proxy(&remote)?;
        scene.b.start_proxy(settings)?;
        scene.a.enrol(&scene.client, "client")?;
        scene.b.enrol(&scene.server, "server")?;
        Ok(Self { scene, ads })
    }
}

/// Adds one of everything that the messages can say.
fn widen(said: &mut Said, impostor: IpAddr) {
    let workload = |workload: Workload| {
        let name = workload.uid.clone();
        (name, Address { r#type: Some(Type::Workload(workload)) })
    };
    let service = |service: Service| {
        let name = format!("{}/{}", service.namespace, service.hostname);
        (name, Address { r#type: Some(Type::Service(service)) })
    };
    said.addresses.extend([
        service(wide_service()),
        service(bare_service("named", NAMED)),
        service(bare_service("empty", EMPTY)),
        workload(wide_workload()),
        workload(named_workload()),
        workload(enrolled("lost", LOST.into())),
        workload(enrolled("impostor", impostor)),
    ]);
    said.policies.extend([
        ("lab/wide".to_owned(), wide_policy()),
        ("istio-system/everywhere".to_owned(), global_policy()),
    ]);
}

fn gateway() -> GatewayAddress {
    let hostname = NamespacedHostname { namespace: "lab".to_owned(), hostname: hostname("wide") };
    GatewayAddress { destination: Some(Destination::Hostname(hostname)), hbone_mtls_port: 15008 }
}

fn gateway_at() -> GatewayAddress {
    let address = NetworkAddress {
        network: "far".to_owned(),
        address: vec![10, 96, 9, 9].into(),
        length: None,
    };
    GatewayAddress { destination: Some(Destination::Address(address)), hbone_mtls_port: 15009 }
}

fn port(service: u32, target: u32) -> Port {
    Port { service_port: service, target_port: target, ..Port::default() }
}

fn wide_service() -> Service {
    use load_balancing::{HealthPolicy, Mode, Scope};
    let address = |address: Vec<u8>, length| NetworkAddress {
        network: String::new(),
        address: address.into(),
        length,
    };
    Service {
        name: "wide".to_owned(),
        namespace: "lab".to_owned(),
        hostname: hostname("wide"),
        addresses: vec![address(vec![10, 96, 9, 9], None), address(vec![10, 97, 0, 0], Some(16))],
        ports: vec![port(80, 8080)],
        subject_alt_names: vec!["spiffe://cluster.local/ns/lab/sa/wide".to_owned()],
        waypoint: Some(gateway()),
        load_balancing: Some(LoadBalancing {
            routing_preference: vec![Scope::Network.into(), Scope::Region.into()],
            mode: Mode::Failover.into(),
            health_policy: HealthPolicy::AllowAll.into(),
        }),
        ip_families: IpFamilies::Ipv4Only.into(),
        canonical: true,
        weighted_waypoints: vec![WeightedWaypoint { destination: Some(gateway()), weight: 7 }],
        visibility: Visibility::Namespace.into(),
        ..Service::default()
    }
}

fn bare_service(name: &str, vip: [u8; 4]) -> Service {
    let address =
        NetworkAddress { network: String::new(), address: vip.to_vec().into(), length: None };
    Service {
        name: name.to_owned(),
        namespace: "lab".to_owned(),
        hostname: hostname(name),
        addresses: vec![address],
        ports: vec![port(80, 8080)],
        ..Service::default()
    }
}

fn wide_workload() -> Workload {
    let text = str::to_owned;
    let known = (format!("lab/{}", hostname("wide")), PortList { ports: vec![port(80, 8081)] });
    let unknown = (format!("lab/{}", hostname("later")), PortList { ports: vec![port(81, 8082)] });
    Workload {
        name: text("wide-1"),
        namespace: text("lab"),
        addresses: vec![vec![10, 9, 9, 9].into()],
        network: text("far"),
        tunnel_protocol: TunnelProtocol::Hbone.into(),
        trust_domain: text("far.example"),
        service_account: text("wide"),
        waypoint: Some(gateway()),
        node: text("elsewhere"),
        canonical_name: text("wide"),
        canonical_revision: text("v2"),
        workload_type: mesh_proto::istio::workload::WorkloadType::Pod.into(),
        workload_name: text("wide"),
        native_tunnel: true,
        authorization_policies: vec![text("lab/wide")],
        status: WorkloadStatus::Unhealthy.into(),
        cluster_id: text("far"),
        network_gateway: Some(gateway_at()),
        uid: text("far//Pod/lab/wide-1"),
        services: [known, unknown].into(),
        application_tunnel: Some(ApplicationTunnel {
            protocol: application_tunnel::Protocol::Proxy.into(),
            port: 15088,
        }),
        locality: Some(Locality { region: text("r"), zone: text("z"), subzone: text("s") }),
        network_mode: NetworkMode::HostNetwork.into(),
        capacity: Some(3),
        ..Workload::default()
    }
}

fn named_workload() -> Workload {
    let text = str::to_owned;
    let ports = PortList { ports: vec![port(80, 8080)] };
    Workload {
        name: text("named"),
        namespace: text("lab"),
        trust_domain: text("cluster.local"),
        uid: text("Kubernetes/networking.istio.io/WorkloadEntry/lab/named"),
        hostname: text("localhost"),
        services: [(format!("lab/{}", hostname("named")), ports)].into(),
        ..Workload::default()
    }
}

/// As if there were a node proxy for it.
fn enrolled(name: &str, ip: IpAddr) -> Workload {
    let address = match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    Workload {
        name: name.to_owned(),
        namespace: "lab".to_owned(),
        addresses: vec![address.into()],
        tunnel_protocol: TunnelProtocol::Hbone.into(),
        trust_domain: "cluster.local".to_owned(),
        service_account: name.to_owned(),
        uid: format!("Kubernetes//Pod/lab/{name}"),
        ..Workload::default()
    }
}

fn wide_policy() -> Authorization {
    let string = |of| StringMatch { match_type: Some(of) };
    let texts = || {
        vec![
            string(MatchType::Exact("x".to_owned())),
            string(MatchType::Prefix("x/".to_owned())),
            string(MatchType::Suffix("/x".to_owned())),
            string(MatchType::Presence(())),
        ]
    };
    let blocks = || vec![security::Address { address: vec![10, 0, 0, 0], length: 8 }];
    let accounts = || {
        let (namespace, service_account) = ("lab".to_owned(), "x".to_owned());
        vec![ServiceAccountMatch { namespace, service_account }]
    };
    let one = Match {
        namespaces: texts(),
        not_namespaces: texts(),
        principals: texts(),
        not_principals: texts(),
        source_ips: blocks(),
        not_source_ips: blocks(),
        destination_ips: blocks(),
        not_destination_ips: blocks(),
        destination_ports: vec![80],
        not_destination_ports: vec![81],
        service_accounts: accounts(),
        not_service_accounts: accounts(),
        ..Match::default()
    };
    Authorization {
        name: "wide".to_owned(),
        namespace: "lab".to_owned(),
        scope: Scope::WorkloadSelector.into(),
        action: Action::Deny.into(),
        rules: vec![Rule { clauses: vec![Clause { matches: vec![one] }] }],
        dry_run: true,
        ..Authorization::default()
    }
}

fn global_policy() -> Authorization {
    Authorization {
        name: "everywhere".to_owned(),
        namespace: "istio-system".to_owned(),
        scope: Scope::Global.into(),
        action: Action::Deny.into(),
        ..Authorization::default()
    }
}
