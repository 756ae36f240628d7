//! Every metric of spec/ztunnel.md §11.2, its type and its labels, and every value that a label can have (§11.3).

use std::{
    collections::BTreeMap,
    net::{SocketAddr, UdpSocket},
    time::Duration,
};

use mesh_tests::{
    Scene,
    hbone::Listener,
    mesh::{hostname, identity},
    metrics::{Metrics, Sample},
    scene::{TCP, web},
    wait::{self, SOON},
};

use crate::world::{LOST, NAMED, RELEASE, World};

const COMMON: &[&str] = &[
    "reporter",
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
    "destination_service",
    "destination_service_namespace",
    "destination_service_name",
    "destination_workload",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_cluster",
    "request_protocol",
    "response_flags",
    "connection_security_policy",
    "source_region",
    "source_zone",
    "destination_region",
    "destination_zone",
];
const NAME: &[&str] = &[
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
    "hostname",
];
const DNS: &[&str] = &[
    "request_query_type",
    "request_protocol",
    "source_canonical_service",
    "source_canonical_revision",
];

/// Family, type, labels in their order. Upstream's `istio_crl_untracked_connections` is not among them: it counts
/// what cannot happen here.
const FAMILIES: &[(&str, &str, &[&str])] = &[
    ("process_open_fds", "gauge", &[]),
    ("process_max_fds", "gauge", &[]),
    ("tokio_num_workers", "gauge", &[]),
    ("tokio_global_queue_depth", "gauge", &[]),
    ("tokio_num_alive_tasks", "gauge", &[]),
    ("tokio_worker_total_busy_duration_seconds", "counter", &["worker"]),
    ("tokio_worker_park_count", "counter", &["worker"]),
    ("tokio_worker_park_unpark_count", "counter", &["worker"]),
    ("istio_build", "gauge", &["component", "tag"]),
    ("istio_tcp_connections_opened", "counter", COMMON),
    ("istio_tcp_connections_closed", "counter", COMMON),
    ("istio_tcp_connections_failed", "counter", COMMON),
    ("istio_tcp_received_bytes", "counter", COMMON),
    ("istio_tcp_sent_bytes", "counter", COMMON),
    ("istio_tcp_sockets_open", "gauge", &["reporter"]),
    ("istio_on_demand_dns", "counter", NAME),
    ("istio_crl_policy_rejections", "counter", &["reporter"]),
    ("istio_dns_requests", "counter", DNS),
    ("istio_dns_upstream_requests", "counter", DNS),
    ("istio_dns_upstream_failures", "counter", DNS),
    ("istio_dns_upstream_request_duration_seconds", "histogram", DNS),
    ("istio_xds_connection_terminations", "counter", &["reason"]),
    ("istio_xds_message", "counter", &["url"]),
    ("istio_xds_message_bytes", "counter", &["url"]),
    ("workload_manager_active_proxy_count", "gauge", &[]),
    ("workload_manager_pending_proxy_count", "gauge", &[]),
    ("workload_manager_proxies_started", "counter", &[]),
    ("workload_manager_proxies_stopped", "counter", &[]),
];

/// Families that have a unit.
const UNITS: [(&str, &str); 2] = [
    ("istio_xds_message_bytes", "bytes"),
    ("istio_dns_upstream_request_duration_seconds", "seconds"),
];

/// A question of a pod for a name, over UDP, to an address where nobody is.
pub(crate) fn ask_dns(pod: &mesh_tests::Pod, name: &str) {
    let mut packet = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        packet.push(u8::try_from(label.len()).unwrap());
        packet.extend_from_slice(label.as_bytes());
    }
    packet.extend_from_slice(&[0, 0, 1, 0, 1]);
    let asked = pod.namespace().run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.send_to(&packet, SocketAddr::from(([10, 96, 0, 10], 53)))?;
        // An answer, or a refusal of what cannot be forwarded: it is the counters that are looked at.
        socket.set_read_timeout(Some(Duration::from_millis(500)))?;
        let _answer = socket.recv_from(&mut [0; 512]);
        Ok(())
    });
    asked.unwrap();
}

/// One of everything that is counted, on node `a`.
pub(crate) fn traffic(world: &World) {
    let scene = &world.scene;
    let echo = || scene.client.tcp(web(TCP)[0], &["echo", "hello"])?.ok();
    wait::retry("an echo", SOON, echo).unwrap();
    // Nobody listens there.
    let _refused = scene.client.tcp(scene.server_at(7)[0], &["echo", "x"]);
    let _named = scene.client.tcp(SocketAddr::from((NAMED, 80)), &["echo", "x"]);
    ask_dns(&scene.client, &hostname("web"));
    ask_dns(&scene.client, "elsewhere.example");
    let before = world.ads.connections();
    world.ads.cut();
    wait::until("the control plane to be called again", SOON, || {
        Ok((world.ads.connections() > before).then_some(()))
    })
    .unwrap();
}

/// The types and units that the text declares, by family.
fn declared<'a>(text: &'a str, what: &str) -> BTreeMap<&'a str, &'a str> {
    let lines = text.lines().filter_map(|line| line.strip_prefix(what)?.split_once(' '));
    lines.collect()
}

#[test]
fn every_family_with_its_type_and_labels() {
    // Nothing is revoked by a list that is not there yet, and that is counted.
    let world = World::start(&[("CRL_PATH", "/run/no-such-list.pem")]).unwrap();
    traffic(&world);
    let proxy = |f: &dyn Fn(&str) -> bool| {
        world.scene.a.with_proxy(|proxy| {
            wait::until("metrics", SOON, || {
                let text = proxy.metrics_text()?;
                Ok(f(&text).then_some(text))
            })
        })
    };
    let all =
        |text: &str| FAMILIES.iter().all(|(name, ..)| text.contains(&format!("# TYPE {name} ")));
    let text = match proxy(&all) {
        Ok(text) => text,
        Err(_) => proxy(&|_| true).unwrap(),
    };
    let metrics = Metrics::parse(&text).unwrap();
    let (types, helps) = (declared(&text, "# TYPE "), declared(&text, "# HELP "));
    let mut faults = Vec::new();
    for (family, kind, labels) in FAMILIES {
        match types.get(family) {
            Some(said) if said == kind => {}
            other => faults.push(format!("{family}: {other:?} and not a {kind}")),
        }
        let help = helps.get(family).copied().unwrap_or_default();
        let stop = !family.starts_with("process_") && !family.starts_with("tokio_");
        if help.is_empty() || help.ends_with('.') != stop {
            faults.push(format!("{family}: HELP {help:?}"));
        }
        let name = match *kind {
            "counter" => format!("{family}_total"),
            "histogram" => format!("{family}_count"),
            _ => (*family).to_owned(),
        };
        for sample in metrics.find(&name, &[]) {
            let names: Vec<_> = sample.labels.iter().map(|(name, _)| name.as_str()).collect();
            if names != *labels {
                faults.push(format!("{name}: {names:?}"));
            }
        }
    }
    assert!(faults.is_empty(), "{}\n{text}", faults.join("\n"));
    let units = declared(&text, "# UNIT ");
    for (family, unit) in UNITS {
        assert_eq!(units.get(family), Some(&unit), "{family}");
    }
    let ours = |family: &&&str| !UNITS.iter().any(|(name, _)| *name == **family);
    for family in units.keys().filter(ours) {
        assert!(!FAMILIES.iter().any(|(name, ..)| name == family), "{family} has a unit");
    }
    values(&metrics);
}

/// What is more than a number.
fn values(metrics: &Metrics) {
    let build = metrics.find("istio_build", &[("component", "ztunnel"), ("tag", RELEASE)]);
    assert_eq!(build.count(), 1);
    for url in [crate::ads::ADDRESS, crate::ads::AUTHORIZATION] {
        assert!(metrics.sum("istio_xds_message_total", &[("url", url)]) > 0.5, "{url}");
        assert!(metrics.sum("istio_xds_message_bytes_total", &[("url", url)]) > 0.5, "{url}");
    }
    for sample in metrics.find("istio_xds_connection_terminations_total", &[]) {
        let reason = sample.label("reason");
        let known = ["ConnectionError", "Error", "Reconnect", "Complete"];
        assert!(known.contains(&reason), "{reason}");
    }
    let named = metrics.find("istio_on_demand_dns_total", &[("hostname", "localhost")]).next();
    let named = named.unwrap();
    assert_eq!(named.label("source_workload"), "client-deployment");
    assert_eq!(named.label("source_principal"), identity("client"));
    let asked = [("request_query_type", "a"), ("request_protocol", "udp")];
    let dns = metrics.find("istio_dns_requests_total", &asked).next().unwrap();
    assert_eq!(dns.label("source_canonical_service"), "client-app");
    let bounds: Vec<_> = metrics
        .find("istio_dns_upstream_request_duration_seconds_bucket", &asked)
        .map(|sample| {
            assert_eq!(sample.labels[0].0, "le", "the bound is the first label: {sample:?}");
            sample.label("le").to_owned()
        })
        .collect();
    let known = ["0.0005", "0.001", "0.01", "0.1", "1.0", "5.0", "+Inf"];
    assert_eq!(bounds[..known.len()], known, "{bounds:?}");
}

/// One connection as a reporter has it: the labels that tell it from others, and all the values.
struct Case {
    name: &'static str,
    reporter: &'static str,
    find: Vec<(&'static str, String)>,
    values: Vec<String>,
}

/// The values of one end: workload, service, revision, namespace, principal, app, version, cluster, region, zone.
type Party = [String; 10];

fn known(word: &str, principal: bool) -> Party {
    let of = |what: &str| format!("{word}-{what}");
    let principal = if principal { identity(word) } else { "unknown".to_owned() };
    [
        of("deployment"),
        of("app"),
        of("v1"),
        "lab".to_owned(),
        principal,
        of("app"),
        of("v1"),
        of("cluster"),
        of("region"),
        of("zone"),
    ]
}

fn unknown() -> Party {
    std::array::from_fn(|_| "unknown".to_owned())
}

/// Of the connection: the service that it was for, and its security.
type How = ([String; 3], &'static str);

fn to_web(security: &'static str) -> How {
    ([hostname("web"), "lab".to_owned(), "web".to_owned()], security)
}

/// All values, in the order of the labels.
fn values_of(reporter: &str, (source, destination): (&Party, &Party), how: &How) -> Vec<String> {
    let text = str::to_owned;
    let mut values = vec![text(reporter)];
    values.extend_from_slice(&source[..8]);
    values.extend_from_slice(&how.0);
    values.extend_from_slice(&destination[..8]);
    values.extend([text("tcp"), text("-"), text(how.1)]);
    values.extend_from_slice(&source[8..]);
    values.extend_from_slice(&destination[8..]);
    values
}

fn case(
    name: &'static str,
    reporter: &'static str,
    (source, destination): (Party, Party),
    how: &How,
) -> Case {
    let find = vec![
        ("source_app", source[5].clone()),
        ("destination_app", destination[5].clone()),
        ("connection_security_policy", how.1.to_owned()),
    ];
    let values = values_of(reporter, (&source, &destination), how);
    Case { name, reporter, find, values }
}

#[test]
fn every_label_of_a_connection() {
    let mut world = World::start(&[]).unwrap();
    let scene = &world.scene;
    let outside = SocketAddr::new(scene.outsider.v4(), TCP);
    let echo = |scene: &Scene, pod: &mesh_tests::Pod, to| {
        wait::retry("an echo", SOON, || pod.tcp(to, &["echo", "hello"])?.ok()).unwrap();
        assert!(!scene.lab.id().is_empty());
    };
    echo(scene, &scene.client, web(TCP)[0]);
    echo(scene, &scene.client, outside);
    echo(scene, &scene.outsider, scene.server_at(TCP)[0]);
    let client = || known("client", true);
    let nowhere = (["unknown"; 3].map(str::to_owned), "unknown");
    let cases = [
        case("out", "source", (client(), known("server", true)), &to_web("mutual_tls")),
        case("in", "destination", (client(), known("server", true)), &to_web("mutual_tls")),
        case("out to nobody known", "source", (known("client", false), unknown()), &nowhere),
        case("in, plain", "destination", (unknown(), known("server", true)), &to_web("unknown")),
    ];
    for case in &cases {
        check(scene, case);
    }
    // The server's node does not know the client: what the client says of itself is taken.
    world.scene.mesh.remove_workload(&world.scene.client);
    world.scene.apply().unwrap();
    let scene = &world.scene;
    let gone = |dump: &serde_json::Value| !dump["workloads"].to_string().contains("client-app");
    scene.b.with_proxy(|proxy| proxy.wait_dump("no client", gone)).unwrap();
    echo(scene, &scene.client, web(TCP)[0]);
    let mut told = client();
    told[5] = "client-deployment".to_owned();
    check(
        scene,
        &case(
            "in, by baggage",
            "destination",
            (told, known("server", true)),
            &to_web("mutual_tls"),
        ),
    );
}

fn check(scene: &Scene, case: &Case) {
    let node = if case.reporter == "source" { &scene.a } else { &scene.b };
    let find: Vec<_> = case.find.iter().map(|(label, value)| (*label, value.as_str())).collect();
    let sample = node.with_proxy(|proxy| {
        wait::until(&format!("a sample: {}", case.name), SOON, || {
            let metrics = proxy.metrics()?;
            let mut found = metrics.find("istio_tcp_connections_closed_total", &find);
            Ok(found.next().cloned())
        })
    });
    let sample: Sample = sample.unwrap();
    for ((label, said), (wanted, value)) in
        sample.labels.iter().zip(COMMON.iter().zip(&case.values))
    {
        assert_eq!((label.as_str(), said), (*wanted, value), "{}: {sample:?}", case.name);
    }
    assert_eq!(sample.labels.len(), COMMON.len(), "{}", case.name);
}

/// The flags, each on the node that reports it. The others are elsewhere: `H2_HANDSHAKE_FAILURE` in `tests/abuse.rs`,
/// `CERT_REVOKED` in `tests/control_plane.rs`.
#[test]
fn every_response_flag() {
    let mut world = World::start(&[]).unwrap();
    let deny = serde_json::json!([[[{ "destinationPorts": [9] }]]]);
    world.scene.mesh.policy("deny", "Deny", &deny);
    world.scene.apply_policy("deny").unwrap();
    let scene = &world.scene;
    let _denied = scene.client.tcp(scene.server_at(9)[0], &["echo", "x"]);
    let _closed = scene.client.tcp(scene.server_at(7)[0], &["echo", "x"]);
    let _lost = scene.client.tcp(SocketAddr::from((LOST, 80)), &["echo", "x"]);
    // Somebody else's certificate.
    let theirs = scene.certificate("client").unwrap();
    let _impostor = Listener::start(scene.outsider.namespace(), &theirs, 200).unwrap();
    let _refused = scene.client.tcp(SocketAddr::new(scene.outsider.v6(), 80), &["echo", "x"]);
    for (node, flag, other) in [
        (&scene.a, "TLS_FAILURE", ("destination_principal", identity("impostor").as_str())),
        (&scene.b, "DENY", ("destination_workload", "server-deployment")),
        (&scene.b, "CONNECT", ("destination_workload", "server-deployment")),
        (&scene.a, "CONNECT", ("destination_workload", "server-deployment")),
        // The connect to its tunnel port timed out.
        (&scene.a, "NETWORK_POLICY", ("destination_principal", &identity("lost"))),
    ] {
        failed(node, flag, other);
    }
    // Nobody signs.
    scene.a.kill_proxy();
    let settings = [("LOCAL_CA_DIR", ""), ("CA_ADDRESS", "")];
    scene.a.start_proxy(&settings).unwrap();
    scene.a.zds().wait_connections(1, SOON).unwrap();
    wait::retry("a connection that is counted", SOON, || {
        let _none = scene.client.tcp(web(TCP)[0], &["echo", "x"]);
        scene.a.with_proxy(|proxy| {
            let sum = proxy.metrics()?.sum("istio_tcp_connections_failed_total", &[]);
            anyhow::ensure!(sum > 0.5, "none yet");
            Ok(())
        })
    })
    .unwrap();
    failed(&scene.a, "IDENTITY_ERROR", ("destination_workload", "server-deployment"));
}

/// Counted as closed and as failed with the flag, and as opened without.
fn failed(node: &mesh_tests::Node, flag: &str, other: (&str, &str)) {
    let labels = [("response_flags", flag), other];
    let found = node.with_proxy(|proxy| {
        wait::until(&format!("{flag} on {}", node.name()), SOON, || {
            let metrics = proxy.metrics()?;
            let failed = metrics.sum("istio_tcp_connections_failed_total", &labels);
            Ok((failed > 0.5).then_some(metrics))
        })
    });
    let metrics = found.unwrap();
    assert!(metrics.sum("istio_tcp_connections_closed_total", &labels) > 0.5, "{flag}");
    assert_eq!(metrics.find("istio_tcp_connections_opened_total", &labels).count(), 0, "{flag}");
    let opened = [("response_flags", "-"), other];
    assert!(metrics.sum("istio_tcp_connections_opened_total", &opened) > 0.5, "{flag}");
}
