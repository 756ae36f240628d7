use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mesh_proto::istio::security::{Authorization, string_match::MatchType};
use mesh_proto::istio::workload::{
    Address, NetworkMode, Service, TunnelProtocol, Workload, WorkloadStatus, WorkloadType,
    address::Type, application_tunnel, gateway_address::Destination, load_balancing,
};
use mesh_runtime::tasks::Tasks;
use tempfile::TempDir;

use super::{LoadError, Loaded, Report, Source, load, watch};
use crate::{Handler, Rejected, Update};

/// Holds what it was given, and counts how often it was given something.
#[derive(Debug, Default)]
struct Mesh {
    addresses: BTreeMap<String, Type>,
    policies: BTreeMap<String, Authorization>,
    handed: usize,
    order: Vec<String>,
    refuse: Option<&'static str>,
}

impl Mesh {
    fn put<T>(
        &mut self,
        updates: Vec<Update<T>>,
        mut store: impl FnMut(&mut Self, String, Option<T>),
    ) -> Result<(), Vec<Rejected>> {
        let mut rejected = Vec::new();
        for update in updates {
            self.handed += 1;
            self.order.push(update.name().to_owned());
            if self.refuse == Some(update.name()) {
                rejected.push(Rejected { name: update.name().to_owned(), reason: "no".to_owned() });
                continue;
            }
            match update {
                Update::Upsert { name, resource } => store(self, name, Some(resource)),
                Update::Unreadable { .. } => {}
                Update::Remove { name } => store(self, name, None),
            }
        }
        if rejected.is_empty() { Ok(()) } else { Err(rejected) }
    }

    fn workload(&self, name: &str) -> &Workload {
        match self.addresses.get(name) {
            Some(Type::Workload(workload)) => workload,
            other => panic!("{name} is {other:?}"),
        }
    }

    fn service(&self, name: &str) -> &Service {
        match self.addresses.get(name) {
            Some(Type::Service(service)) => service,
            other => panic!("{name} is {other:?}"),
        }
    }
}

impl Handler<Address> for Mesh {
    fn handle(&mut self, updates: Vec<Update<Address>>) -> Result<(), Vec<Rejected>> {
        self.put(updates, |mesh, name, resource| {
            match resource.and_then(|address| address.r#type) {
                Some(address) => mesh.addresses.insert(name, address),
                None => mesh.addresses.remove(&name),
            };
        })
    }
}

impl Handler<Authorization> for Mesh {
    fn handle(&mut self, updates: Vec<Update<Authorization>>) -> Result<(), Vec<Rejected>> {
        self.put(updates, |mesh, name, resource| {
            match resource {
                Some(policy) => mesh.policies.insert(name, policy),
                None => mesh.policies.remove(&name),
            };
        })
    }
}

fn read(text: &str) -> Result<Mesh, LoadError> {
    let mut mesh = Mesh::default();
    load(&Source::Inline(text.to_owned()), &mut mesh)?;
    Ok(mesh)
}

/// The one line that an operator sees for a fault.
fn fault(text: &str) -> String {
    match read(text) {
        Err(LoadError::Invalid { source, .. }) => source.to_string(),
        other => panic!("expected a fault in {text:?}, got {other:?}"),
    }
}

const WHOLE: &str = r#"
# every field there is
workloads:
- uid: cluster1//v1/Pod/default/local
  name: local
  namespace: default
  trustDomain: td
  serviceAccount: sa
  workloadIps: ["127.0.0.1", "::1"]
  protocol: HBONE
  networkMode: HostNetwork
  node: local
  network: ""
  workloadName: w
  workloadType: job
  canonicalName: c
  canonicalRevision: v1
  clusterId: Kubernetes
  locality: {region: r, zone: z, subzone: s}
  capacity: 0
  status: Unhealthy
  hostname: h
  nativeTunnel: true
  authorizationPolicies: ["ns/name"]
  waypoint: {destination: "net/10.0.0.9", hboneMtlsPort: 15009}
  networkGateway: {destination: "istio-gateways/gw.example.com"}
  applicationTunnel: {protocol: PROXY, port: 15088}
  services:
    "default/example.com":
      80: 8080
      443: 0
- {name: bare, namespace: default, workloadIps: [10.0.0.2], waypoint: ~, capacity: ~,
   services: {}, protocol: null}
policies:
- action: Deny
  rules:
  - - - principals: [{Exact: a}, {Prefix: b}, {Suffix: c}, {Presence: []}, {Presence: }, !Exact d]
        notNamespaces: [{Exact: "80"}]
        sourceIps: [10.0.0.0/8, "fd00::/8", 10.1.1.1]
        serviceAccounts: [{namespace: n, serviceAccount: s}]
        destinationPorts: [80]
      - notDestinationPorts: [9999]
    - - {}
  name: deny
  namespace: default
  scope: WorkloadSelector
  dryRun: true
services:
- name: local
  namespace: default
  hostname: example.com
  vips: [/127.10.0.1, "remote/fd00::1", "/10.9.0.0/16"]
  cidrVips: [{network: n, cidr: 10.8.0.0/16}]
  ports: {80: 8080}
  endpoints: {x: {workloadUid: x, port: {80: 80}, status: Healthy}}
  subjectAltNames: [spiffe://cluster.local/ns/default/sa/local]
  waypoint: {destination: {hostname: {namespace: ns, hostname: wp}}, hboneMtlsPort: 15008}
  weightedWaypoints: [{destination: ns/wp2, weight: 3}, {destination: {destination: /10.0.0.7}, weight: 1}]
  loadBalancer: {routingPreferences: [Network, Zone], mode: Strict, healthPolicy: AllowAll}
  ipFamilies: Dual
  canonical: true
  visibility: Namespace
"#;

#[test]
fn every_field_of_a_workload() {
    let mesh = read(WHOLE).unwrap();
    let full = mesh.workload("cluster1//v1/Pod/default/local");
    assert_eq!(full.addresses, [vec![127, 0, 0, 1], [vec![0; 15], vec![1]].concat()]);
    assert_eq!(full.tunnel_protocol(), TunnelProtocol::Hbone);
    assert_eq!(full.network_mode(), NetworkMode::HostNetwork);
    assert_eq!(full.workload_type(), WorkloadType::Job);
    assert_eq!(full.status(), WorkloadStatus::Unhealthy);
    assert_eq!(full.capacity, Some(0));
    assert!(full.native_tunnel);
    assert_eq!((full.trust_domain.as_str(), full.service_account.as_str()), ("td", "sa"));
    assert_eq!(full.locality.as_ref().unwrap().subzone, "s");
    assert_eq!(full.authorization_policies, ["ns/name"]);
    let tunnel = full.application_tunnel.unwrap();
    assert_eq!((tunnel.protocol(), tunnel.port), (application_tunnel::Protocol::Proxy, 15088));
    let ports: Vec<_> = full.services["default/example.com"]
        .ports
        .iter()
        .map(|p| (p.service_port, p.target_port))
        .collect();
    assert_eq!(ports, [(80, 8080), (443, 0)]);
    let waypoint = full.waypoint.as_ref().unwrap();
    let Some(Destination::Address(address)) = &waypoint.destination else { panic!("{waypoint:?}") };
    assert_eq!((address.network.as_str(), &address.address[..]), ("net", &[10, 0, 0, 9][..]));
    assert_eq!(waypoint.hbone_mtls_port, 15009);
    let gateway = full.network_gateway.as_ref().unwrap();
    let Some(Destination::Hostname(host)) = &gateway.destination else { panic!("{gateway:?}") };
    assert_eq!(
        (host.namespace.as_str(), host.hostname.as_str()),
        ("istio-gateways", "gw.example.com")
    );
    assert_eq!(gateway.hbone_mtls_port, 15008);

    let bare = mesh.workload("Kubernetes//Pod/default/bare");
    assert_eq!(bare.tunnel_protocol(), TunnelProtocol::None);
    assert_eq!((&bare.waypoint, bare.capacity), (&None, None));
}

#[test]
fn every_field_of_a_policy() {
    let mesh = read(WHOLE).unwrap();
    let policy = &mesh.policies["default/deny"];
    assert!(policy.dry_run);
    assert_eq!((policy.scope, policy.action), (2, 1));
    let clauses = &policy.rules[0].clauses;
    assert_eq!((clauses.len(), clauses[0].matches.len(), clauses[1].matches.len()), (2, 2, 1));
    let found = &clauses[0].matches[0];
    let principals: Vec<_> =
        found.principals.iter().map(|p| p.match_type.clone().unwrap()).collect();
    let text = |s: &str| s.to_owned();
    assert_eq!(
        principals,
        [
            MatchType::Exact(text("a")),
            MatchType::Prefix(text("b")),
            MatchType::Suffix(text("c")),
            MatchType::Presence(()),
            MatchType::Presence(()),
            MatchType::Exact(text("d")),
        ]
    );
    assert_eq!(found.not_namespaces[0].match_type, Some(MatchType::Exact(text("80"))));
    let lengths: Vec<_> = found.source_ips.iter().map(|ip| (ip.address.len(), ip.length)).collect();
    assert_eq!(lengths, [(4, 8), (16, 8), (4, 32)]);
    assert_eq!(found.service_accounts[0].service_account, "s");
    assert_eq!(clauses[0].matches[1].not_destination_ports, [9999]);
}

#[test]
fn every_field_of_a_service() {
    let mesh = read(WHOLE).unwrap();
    let service = mesh.service("default/example.com");
    let vips: Vec<_> =
        service.addresses.iter().map(|v| (v.network.as_str(), v.address.len(), v.length)).collect();
    assert_eq!(vips, [("", 4, None), ("remote", 16, None), ("", 4, Some(16)), ("n", 4, Some(16))]);
    let balancing = service.load_balancing.as_ref().unwrap();
    assert_eq!(balancing.routing_preference, [6, 2]);
    assert_eq!(balancing.mode(), load_balancing::Mode::Strict);
    assert_eq!(balancing.health_policy(), load_balancing::HealthPolicy::AllowAll);
    assert_eq!((service.ip_families, service.canonical, service.visibility), (3, true, 1));
    let weights: Vec<_> = service
        .weighted_waypoints
        .iter()
        .map(|w| (w.weight, w.destination.as_ref().unwrap().hbone_mtls_port))
        .collect();
    assert_eq!(weights, [(3, 15008), (1, 15008)]);
    assert!(matches!(
        service.waypoint.as_ref().unwrap().destination,
        Some(Destination::Hostname(ref host)) if host.hostname == "wp"
    ));
}

#[test]
fn nothing_is_a_mesh_without_anything() {
    for text in ["", "---\n", "# nothing\n", "{}", "workloads:\n", "workloads: []\nservices: ~\n"] {
        assert_eq!(read(text).unwrap().handed, 0, "{text:?}");
    }
}

#[test]
fn anchors_stand_for_what_they_mark() {
    let mesh = read(
        "workloads:\n- {uid: a, namespace: n, workloadIps: [10.0.0.1], services: &s {n/h: {80: &p 8080}}}\n\
         - {uid: b, namespace: n, workloadIps: [10.0.0.2], services: *s}\n\
         - {uid: c, namespace: n, workloadIps: [10.0.0.3], services: {n/h: {80: *p}}}\n",
    )
    .unwrap();
    assert_eq!(mesh.workload("a").services, mesh.workload("b").services);
    assert_eq!(mesh.workload("a").services, mesh.workload("c").services);
}

#[test]
fn faults_say_where() {
    let table: &[(&str, &str, &str)] = &[
        ("unknown section", "pods: []", "line 1, column 1: pods: no such field here"),
        (
            "unknown field",
            "workloads:\n- uid: a\n  namespace: n\n  workloadIp: 10.0.0.1\n",
            "line 4, column 3: workloads[0].workloadIp: no such field here",
        ),
        (
            "word",
            "workloads:\n- {uid: a, namespace: n}\n- uid: b\n  namespace: n\n  protocol: hbone\n",
            "line 5, column 13: workloads[1].protocol: expected one of HBONE, TCP, found `hbone`",
        ),
        (
            "address",
            "workloads:\n- uid: a\n  namespace: n\n  workloadIps: [10.0.0.1, 10.0.0.256]\n",
            "line 4, column 27: workloads[0].workloadIps[1]: expected an address, found `10.0.0.256`",
        ),
        (
            "service key",
            "workloads:\n- {uid: a, namespace: n, services: {host: {}}}",
            "line 2, column 37: workloads[0].services.host: expected namespace/hostname, found `host`",
        ),
        (
            "port",
            "services:\n- {hostname: h, namespace: n, ports: {80: 65536}}",
            "line 2, column 43: services[0].ports.80: expected a port, found `65536`",
        ),
        (
            "no namespace",
            "services:\n- hostname: h\n",
            "line 2, column 3: services[0].namespace: must be given",
        ),
        (
            "policy without action",
            "policies:\n- {name: a, namespace: n, scope: Global, rules: []}",
            "line 2, column 3: policies[0].action: must be given",
        ),
        (
            "prefix too long",
            "policies:\n- {name: a, namespace: n, scope: Global, action: Deny, rules: [[[{sourceIps: [10.0.0.0/33]}]]]}",
            "line 2, column 79: policies[0].rules[0][0][0].sourceIps[0]: expected an address block such as \
             10.0.0.0/8, found `10.0.0.0/33`",
        ),
        (
            "matcher",
            "policies:\n- {name: a, namespace: n, scope: Global, action: Deny, rules: [[[{namespaces: [{Regex: x}]}]]]}",
            "line 2, column 81: policies[0].rules[0][0][0].namespaces[0].Regex: no such field here",
        ),
        (
            "twice in a map",
            "workloads:\n- {uid: a, uid: b, namespace: n}",
            "line 2, column 12: workloads[0].uid: the key stands here twice",
        ),
        (
            "twice in the file",
            "workloads:\n- {uid: a, namespace: n}\n- {uid: a, namespace: n}",
            "line 3, column 3: workloads[1]: `a` stands here for the second time",
        ),
        ("second document", "{}\n---\n{}", "line 2, column 1: a second document; only one is read"),
        ("not a map", "- a", "line 1, column 1: expected a map"),
    ];
    for (name, text, expected) in table {
        assert_eq!(fault(text), *expected, "{name}");
    }
}

#[test]
fn what_is_not_yaml_or_not_text() {
    assert!(fault("workloads: [\n").contains("not YAML"), "{}", fault("workloads: [\n"));
    assert!(matches!(read("workloads: []\0\nx"), Err(LoadError::NotText { .. })));
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("mesh");
    fs::write(&path, b"workloads: []\n# \xff\n").unwrap();
    assert!(matches!(
        load(&Source::Path(path), &mut Mesh::default()),
        Err(LoadError::NotText { .. })
    ));
    let missing = Source::Path(dir.path().join("missing"));
    assert!(matches!(load(&missing, &mut Mesh::default()), Err(LoadError::Read { .. })));
}

#[test]
fn aliases_of_aliases_are_bounded() {
    // Where upstream's own dump has a field that is passed over, any value can stand.
    let mut text = String::from(
        "services:\n- subjectAltNames: &a0 [x, x, x, x, x, x, x, x]\n  endpoints: {y: [",
    );
    for n in 1..20 {
        let before = n - 1;
        text.push_str(&format!(
            "&a{n} [*a{before}, *a{before}, *a{before}, *a{before}, *a{before}], "
        ));
    }
    text.push_str("x]}\n");
    assert!(fault(&text).contains("too large"), "{}", fault(&text));
}

fn file(text: &str) -> (TempDir, PathBuf) {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("mesh.yaml");
    fs::write(&path, text).unwrap();
    (dir, path)
}

const TWO: &str = "workloads:\n- {uid: a, namespace: n, workloadIps: [10.0.0.1]}\n- {uid: b, namespace: n}\n\
                   policies:\n- {name: p, namespace: n, scope: Global, action: Deny, rules: []}\n";

#[test]
fn a_reload_hands_over_what_changed() {
    let (_dir, path) = file(TWO);
    let source = Source::Path(path.clone());
    let mut mesh = Mesh::default();
    let (mut loaded, first) = load(&source, &mut mesh).unwrap();
    assert_eq!(first, Report { addresses: 2, policies: 1, changed: 3, removed: 0, rejected: 0 });

    // Another layout says the same.
    fs::write(
        &path,
        TWO.replace("- {uid: b, namespace: n}", "- uid: b\n  # comment\n  namespace: \"n\""),
    )
    .unwrap();
    let (report, _) = loaded.reload(&source, &mut mesh).unwrap();
    assert_eq!((report.changed, report.removed, mesh.handed), (0, 0, 3));

    // The pod a is replaced by c, which has its address; b changes; the policy goes.
    fs::write(
        &path,
        "workloads:\n- {uid: c, namespace: n, workloadIps: [10.0.0.1]}\n- {uid: b, namespace: m}\n",
    )
    .unwrap();
    mesh.order.clear();
    let (report, _) = loaded.reload(&source, &mut mesh).unwrap();
    assert_eq!(report, Report { addresses: 2, policies: 0, changed: 2, removed: 2, rejected: 0 });
    assert_eq!(mesh.order, ["a", "n/p", "c", "b"], "removals come first");
    assert_eq!(mesh.workload("b").namespace, "m");
    assert_eq!(mesh.addresses.len(), 2);
}

#[test]
fn a_bad_reload_changes_nothing() {
    let (_dir, path) = file(TWO);
    let source = Source::Path(path.clone());
    let mut mesh = Mesh::default();
    let (mut loaded, _) = load(&source, &mut mesh).unwrap();
    let before = (mesh.addresses.clone(), mesh.handed);
    fs::write(
        &path,
        "workloads:\n- {uid: z, namespace: n}\n- {uid: y, namespace: n, protocol: x}\n",
    )
    .unwrap();
    let error = loaded.reload(&source, &mut mesh).unwrap_err();
    assert!(matches!(error, LoadError::Invalid { .. }), "{error}");
    assert_eq!((mesh.addresses.clone(), mesh.handed), before);
    // And the state is still known: going back is no change.
    fs::write(&path, TWO).unwrap();
    assert_eq!(loaded.reload(&source, &mut mesh).unwrap().0.changed, 0);
}

#[test]
fn what_its_handler_refused_is_tried_again() {
    let (_dir, path) = file(TWO);
    let source = Source::Path(path.clone());
    let mut mesh = Mesh { refuse: Some("b"), ..Mesh::default() };
    let error = load(&source, &mut mesh).unwrap_err();
    assert!(error.to_string().contains("line 3: b: no"), "{error}");

    let mut mesh = Mesh::default();
    let (mut loaded, _) = load(&source, &mut mesh).unwrap();
    mesh.refuse = Some("b");
    fs::write(&path, TWO.replace("uid: b, namespace: n", "uid: b, namespace: m")).unwrap();
    let (report, rejected) = loaded.reload(&source, &mut mesh).unwrap();
    assert_eq!((report.rejected, rejected[0].0, rejected[0].1.name.as_str()), (1, 3, "b"));
    assert_eq!(mesh.workload("b").namespace, "n", "the last good version stays");
    mesh.refuse = None;
    assert_eq!(loaded.reload(&source, &mut mesh).unwrap().0.changed, 1);
    assert_eq!(mesh.workload("b").namespace, "m");
}

fn watched(path: &Path) -> (Arc<Mutex<Mesh>>, Tasks) {
    let mesh = Arc::new(Mutex::new(Mesh::default()));
    let (loaded, _): (Loaded, _) =
        load(&Source::Path(path.to_owned()), &mut Arc::clone(&mesh)).unwrap();
    let tasks = Tasks::new();
    let (path, handlers) = (path.to_owned(), Arc::clone(&mesh));
    tasks.spawn(move |draining| watch(path, loaded, handlers, draining));
    (mesh, tasks)
}

/// Time is paused: this costs none.
async fn until(mesh: &Mutex<Mesh>, what: impl Fn(&Mesh) -> bool) {
    let seen = async {
        while !what(&mesh.lock().unwrap()) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(600), seen).await.expect("it never happened");
}

#[tokio::test(start_paused = true)]
async fn a_link_that_is_turned_elsewhere_is_followed() {
    let dir = TempDir::new().unwrap();
    for (name, text) in [("v1", TWO), ("v2", "workloads:\n- {uid: c, namespace: n}\n")] {
        fs::create_dir(dir.path().join(name)).unwrap();
        fs::write(dir.path().join(name).join("mesh.yaml"), text).unwrap();
    }
    // As the kubelet does: mesh.yaml -> ..data/mesh.yaml, ..data -> v1, and then another ..data renamed over it.
    std::os::unix::fs::symlink("v1", dir.path().join("..data")).unwrap();
    std::os::unix::fs::symlink("..data/mesh.yaml", dir.path().join("mesh.yaml")).unwrap();
    let (mesh, tasks) = watched(&dir.path().join("mesh.yaml"));
    assert_eq!(mesh.lock().unwrap().addresses.len(), 2);
    std::os::unix::fs::symlink("v2", dir.path().join("..new")).unwrap();
    fs::rename(dir.path().join("..new"), dir.path().join("..data")).unwrap();
    until(&mesh, |mesh| mesh.addresses.contains_key("c") && mesh.addresses.len() == 1).await;
    assert!(tasks.drain(Duration::from_secs(1)).await);
}

#[tokio::test(start_paused = true)]
async fn a_bad_file_and_a_missing_file_are_lived_through() {
    let (_dir, path) = file(TWO);
    let (mesh, tasks) = watched(&path);
    fs::write(&path, "workloads: nonsense\n").unwrap();
    tokio::time::sleep(Duration::from_secs(5)).await;
    fs::remove_file(&path).unwrap();
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(mesh.lock().unwrap().addresses.len(), 2);
    fs::write(&path, "workloads:\n- {uid: c, namespace: n}\n").unwrap();
    until(&mesh, |mesh| mesh.addresses.len() == 1).await;
    assert!(tasks.drain(Duration::from_secs(1)).await);
}
