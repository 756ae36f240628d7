//! Each row of the contract: to whom a tunnel came, what it asks for, and what it gets.

use super::*;
use crate::resources::{self, Sources};
use mesh_runtime::admin::Dump;
use mesh_state::{Handle, Writer};

const MESH: &str = r#"
workloads:
- {uid: app, name: app, namespace: ns, workloadIps: [10.0.0.1, "fd00::1"], protocol: HBONE, services: {ns/app.x: {80: 8080, 81: 15008}, ns/twin.x: {90: 8080}, ns/open.x: {80: 0}, hid/hid.x: {80: 8081}}}
- {uid: wp, name: wp, namespace: ns, workloadIps: [10.0.0.2], protocol: HBONE, services: {ns/wp.x: {15008: 15008}}}
- {uid: guarded, name: guarded, namespace: ns, workloadIps: [10.0.0.3], protocol: HBONE, waypoint: {destination: ns/wp.x, hboneMtlsPort: 15008}}
- {uid: byip, name: byip, namespace: ns, workloadIps: [10.0.0.4], protocol: HBONE, waypoint: {destination: /10.0.0.2, hboneMtlsPort: 15008}}
- {uid: free, name: free, namespace: ns, workloadIps: [10.0.0.5], protocol: HBONE}
- {uid: proxied, name: proxied, namespace: ns, workloadIps: [10.0.0.6], protocol: HBONE, applicationTunnel: {protocol: PROXY, port: 15088}, services: {ns/app.x: {80: 8080}, ns/bare.x: {80: 8080}, ns/far.x: {80: 8080}}}
- {uid: bare, name: bare, namespace: ns, workloadIps: [10.0.0.7], protocol: HBONE, applicationTunnel: {protocol: NONE, port: 15088}}
services:
- {name: app, namespace: ns, hostname: app.x, vips: ["/fd01::1", /10.1.0.1], ports: {80: 8080, 81: 81, 82: 8082}}
- {name: twin, namespace: ns, hostname: twin.x, vips: [/10.1.0.2], ports: {90: 8080}}
- {name: open, namespace: ns, hostname: open.x, vips: [/10.1.0.3], ports: {80: 0}}
- {name: wp, namespace: ns, hostname: wp.x, vips: [/10.1.0.4], ports: {15008: 15008}}
- {name: behind, namespace: other, hostname: behind.x, vips: [/10.1.0.5], ports: {80: 80}, visibility: Namespace, waypoint: {destination: ns/wp.x, hboneMtlsPort: 15008}}
- {name: hid, namespace: hid, hostname: hid.x, vips: [/10.1.0.6], ports: {80: 8081}, visibility: Namespace}
- {name: bare, namespace: ns, hostname: bare.x, vips: [], ports: {80: 8080}}
- {name: far, namespace: ns, hostname: far.x, vips: ["far/10.1.0.7"], ports: {80: 8080}}
"#;

fn mesh() -> Handle {
    let writer = Writer::new("n1".parse().unwrap());
    let state = writer.handle();
    resources::inline(MESH, Sources::new(writer, &Dump::new())).unwrap();
    state
}

fn authority(text: &str) -> Authority {
    text.parse::<SocketAddr>().map_or_else(
        |_not_an_address| {
            let (host, port) = text.rsplit_once(':').unwrap();
            Authority::Host(host.parse().unwrap(), port.parse().unwrap())
        },
        Authority::Addr,
    )
}

/// Prints the target as `address service announce`, a refusal as its status and text.
fn asked(state: &Handle, local: &str, to: &str, meant: Option<&str>) -> String {
    let uid = local.parse().unwrap();
    state.read(|view| {
        let workload = view.workload(&uid).unwrap();
        let v6 = to.starts_with("[fd00");
        let ip = workload.ips.iter().find(|ip| ip.is_ipv6() == v6).unwrap();
        let ask = Ask {
            local: &workload,
            address: SocketAddr::new(*ip, 15008),
            authority: &authority(to),
            meant,
            network: &NetworkId::default(),
            localhost_tunnel: true,
        };
        match resolve(view, ask) {
            Ok(Target { address, service, announce }) => {
                let service = service.map(|s| format!(" {}", s.key.hostname)).unwrap_or_default();
                let announce = announce.map(|to| format!(" for {to}")).unwrap_or_default();
                format!("{address}{service}{announce}")
            }
            Err(refusal) => format!("{} {refusal}", refusal.status()),
        }
    })
}

#[test]
fn resolves() {
    let state = mesh();
    for (name, local, to, expect) in [
        ("own address", "app", "10.0.0.1:7", "10.0.0.1:7"),
        ("own address, v6", "app", "[fd00::1]:7", "[fd00::1]:7"),
        ("mapped address", "app", "[::ffff:10.0.0.1]:7", "10.0.0.1:7"),
        ("a service's port", "app", "10.0.0.1:8080", "10.0.0.1:8080 app.x"),
        ("its other address", "app", "[fd00::2]:7", "400 ip mismatch: fd00::1 != fd00::2"),
        ("another's address", "app", "10.0.0.5:7", "400 ip mismatch: 10.0.0.1 != 10.0.0.5"),
        ("a VIP without waypoint", "app", "10.1.0.2:90", "400 ip mismatch: 10.0.0.1 != 10.1.0.2"),
        ("ourselves", "app", "10.0.0.1:15008", "503 attempted recursive call to ourselves"),
        ("ourselves, plain", "app", "10.0.0.1:15006", "503 attempted recursive call to ourselves"),
        ("ourselves by name", "app", "app.x:81", "503 attempted recursive call to ourselves"),
        ("by name", "app", "app.x:80", "10.0.0.1:8080 app.x"),
        ("by name, the service's port", "app", "app.x:82", "10.0.0.1:8082 app.x"),
        (
            "by name, unknown port",
            "app",
            "app.x:99",
            "503 requested service app.x:99 found, but cannot resolve port",
        ),
        (
            "by name, port left to nobody",
            "app",
            "open.x:80",
            "503 requested service open.x:80 found, but cannot resolve port",
        ),
        ("unknown name", "app", "no.x:80", "503 no service or workload for hostname: no.x:80"),
        ("hidden name", "app", "hid.x:80", "503 no service or workload for hostname: hid.x:80"),
        ("a workload behind us", "wp", "10.0.0.3:80", "10.0.0.2:80"),
        ("a workload behind us, by address", "wp", "10.0.0.4:80", "10.0.0.2:80"),
        ("a service behind us, though hidden", "wp", "10.1.0.5:80", "10.0.0.2:80"),
        ("a workload not behind us", "wp", "10.0.0.5:80", "400 ip mismatch: 10.0.0.2 != 10.0.0.5"),
        ("behind another", "free", "10.0.0.3:80", "400 ip mismatch: 10.0.0.5 != 10.0.0.3"),
        ("a tunnelling application", "proxied", "10.9.9.9:80", "127.0.0.1:15088 for 10.9.9.9:80"),
        ("the same by name", "proxied", "app.x:80", "127.0.0.1:15088 app.x for 10.1.0.1:80"),
        (
            "with another network's VIP",
            "proxied",
            "far.x:80",
            "127.0.0.1:15088 far.x for 10.1.0.7:80",
        ),
        (
            "without a VIP",
            "proxied",
            "bare.x:80",
            "503 requested service bare.x:80 has no address to announce",
        ),
        ("a tunnel without PROXY", "bare", "10.9.9.9:80", "10.0.0.7:15088"),
    ] {
        assert_eq!(asked(&state, local, to, None), expect, "{name}");
    }
}

/// Two services lead to the port: the one that the client names, else always the same one.
#[test]
fn the_service_that_was_meant() {
    let state = mesh();
    let meant = |host| asked(&state, "app", "10.0.0.1:8080", host);
    assert_eq!(meant(Some("twin.x")), "10.0.0.1:8080 twin.x");
    assert_eq!(meant(Some("elsewhere.x")), "10.0.0.1:8080 app.x");
    assert_eq!(meant(None), "10.0.0.1:8080 app.x");
}
