use super::*;
use crate::testing::{key, service, serving, with, workload, writer};
use mesh_core::{ApplicationTunnel, Destination, WeightedGateway};

fn gateway_of(name: &str) -> Gateway {
    let mesh_core::ServiceKey { namespace, hostname } = key(name);
    Gateway { destination: Destination::Hostname(namespace, hostname), hbone_port: 15008 }
}

/// As Istio's own proxy prints it, and istioctl reads it.
#[test]
fn a_workload() {
    let pod = serving(workload("Kubernetes//Pod/ns/a", &["10.1.0.2"]), "ns/web.ns", &[(80, 8080)]);
    let pod = with(pod, |t| {
        t.workload_name = "web".parse().unwrap();
        t.cluster = "Kubernetes".parse().unwrap();
        t.policies = ["ns/p".parse().unwrap()].into();
        t.waypoint = Some(Box::new(gateway_of("ns/wp.ns")));
        t.application_tunnel = Some(ApplicationTunnel { proxy_protocol: true, port: Some(15088) });
    });
    let mut writer = writer();
    writer.apply([pod.into()]);
    assert_eq!(
        workloads(&writer.handle()),
        json!([{
            "applicationTunnel": {"port": 15088, "protocol": "PROXY"},
            "authorizationPolicies": ["ns/p"], "capacity": 1, "clusterId": "Kubernetes", "name": "a",
            "namespace": "ns", "networkMode": "Standard", "node": "n1", "protocol": "HBONE",
            "serviceAccount": "a", "services": ["ns/web.ns"], "status": "Healthy",
            "trustDomain": "cluster.local", "uid": "Kubernetes//Pod/ns/a",
            "waypoint": {"destination": "ns/wp.ns", "hboneMtlsPort": 15008},
            "workloadIps": ["10.1.0.2"], "workloadName": "web", "workloadType": "pod",
        }])
    );
    assert_eq!(
        staged_services(&writer.handle()),
        json!({"ns/web.ns": {"Kubernetes//Pod/ns/a": {
            "port": {"80": 8080}, "status": "Healthy", "workloadUid": "Kubernetes//Pod/ns/a",
        }}})
    );
}

#[test]
fn a_service() {
    let mut writer = writer();
    let weighted = WeightedGateway { gateway: gateway_of("ns/wp.ns"), weight: 7 };
    let service = Service {
        load_balancing: Some(LoadBalancing {
            preferences: vec![Scope::Network, Scope::Region, Scope::Zone],
            mode: Mode::Failover,
            health: HealthPolicy::AllowAll,
        }),
        ip_families: IpFamilies::V4,
        canonical: true,
        visibility: Visibility::Namespace,
        weighted_waypoints: vec![weighted],
        waypoint: Some(gateway_of("ns/wp.ns")),
        ..service("ns/web.ns", &["10.96.0.1", "10.97.0.0/16"])
    };
    writer.apply([service.into(), serving(workload("w", &[]), "ns/web.ns", &[(80, 9090)]).into()]);
    let waypoint = json!({"destination": "ns/wp.ns", "hboneMtlsPort": 15008});
    assert_eq!(
        services(&writer.handle()),
        json!([{
            "canonical": true,
            "cidrVips": [{"cidr": "10.97.0.0/16", "network": ""}],
            "endpoints": {"w": {"port": {"80": 9090}, "status": "Healthy", "workloadUid": "w"}},
            "hostname": "web.ns", "ipFamilies": "IPv4",
            "loadBalancer": {
                "healthPolicy": "AllowAll", "mode": "Failover",
                "routingPreferences": ["Network", "Region", "Zone"],
            },
            "namespace": "ns", "ports": {"80": 8080}, "subjectAltNames": [], "vips": ["/10.96.0.1"],
            "visibility": "Namespace", "waypoint": waypoint,
            "weightedWaypoints": [{"destination": waypoint, "weight": 7}],
        }])
    );
    assert_eq!(staged_services(&writer.handle()), Value::Null);
}

#[test]
fn in_order() {
    let mut writer = writer();
    writer.apply((0..50).rev().map(|i| workload(&format!("w{i:02}"), &[]).into()));
    writer.apply((0..50).rev().map(|i| service(&format!("ns/h{i:02}"), &[]).into()));
    let by = |all: Value, key: &str| -> Vec<String> {
        all.as_array().unwrap().iter().map(|v| v[key].as_str().unwrap().to_owned()).collect()
    };
    let uids = by(workloads(&writer.handle()), "uid");
    assert!(uids.len() == 50 && uids.is_sorted(), "{uids:?}");
    let hosts = by(services(&writer.handle()), "hostname");
    assert!(hosts.len() == 50 && hosts.is_sorted(), "{hosts:?}");
}
