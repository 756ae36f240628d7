//! The node proxy and its control plane: real node proxies against a scripted istiod.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{net::SocketAddr, time::Duration};

use anyhow::Result;
use mesh_proto::istio::{
    security::{Action, Authorization, Scope},
    workload::{Address, Workload, address::Type},
};
use mesh_tests::{
    Program, Scene,
    ca::Authority,
    control_plane::{ControlPlane, Fault, Kind, Order, Seen},
    hbone::{Dial, Tunnel, refused},
    mesh::{hostname, identity, principal},
    scene::{HTTP, TCP, web},
    topology::NAMESPACE,
    wait::{self, SOON},
};
use prost::Message as _;
use serde_json::json;

/// A scene whose mesh comes from a control plane.
struct World {
    control: ControlPlane,
    scene: Scene,
}

impl World {
    /// Without node proxies.
    fn bare() -> Self {
        let scene = Scene::bare().unwrap();
        let control = ControlPlane::start(&scene.lab).unwrap();
        control.apply(&scene.mesh).unwrap();
        Self { control, scene }
    }

    fn begin(&self, more: &[(&str, &str)]) {
        let mut settings = self.control.settings();
        settings.extend_from_slice(more);
        self.scene.begin(&settings).unwrap();
    }

    fn start(more: &[(&str, &str)]) -> Self {
        let world = Self::bare();
        world.begin(more);
        world
    }

    fn apply(&self) {
        self.control.apply(&self.scene.mesh).unwrap();
    }

    /// From the client to the server's service, until it answers.
    fn works(&self) {
        self.scene.ask_until(&self.scene.client, web(80)[0]).unwrap();
    }

    /// The server's node proxy has denied a connection because of this policy since then, without waiting for it.
    fn denied_at_once(&self, since: u64, policy: &str) {
        let line = self.scene.b.with_proxy(|proxy| {
            proxy.wait_access(since, "the denial", |line| line.field("error").contains(policy))
        });
        let line = line.unwrap();
        let took: u64 = line.field("duration").strip_suffix("ms").unwrap().parse().unwrap();
        assert!(took < 2_000, "it waited: {}", line.text);
    }

    /// A connection from the client to the server that exchanges something all the time.
    fn ticking(&self) -> Program {
        let to = web(TCP)[0].to_string();
        let mut open = self.scene.client.spawn(["tcp", &to, "tick", "100000", "25"]).unwrap();
        open.says("open", SOON).unwrap();
        open
    }

    /// A connection from the client to the server that is open.
    fn open(&self) -> Program {
        let to = web(TCP)[0].to_string();
        let mut open = self.scene.client.spawn(["tcp", &to, "hold"]).unwrap();
        open.says("open", SOON).unwrap();
        open
    }

    /// A metric of the client's node (`a`) or the server's (`b`).
    fn metric(&self, node: &str, name: &str, labels: &[(&str, &str)]) -> f64 {
        let node = if node == "a" { &self.scene.a } else { &self.scene.b };
        node.with_proxy(|proxy| Ok(proxy.metrics()?.sum(name, labels))).unwrap()
    }

    fn wait_metric(&self, node: &str, name: &str, labels: &[(&str, &str)], least: f64) {
        let counted = || Ok((self.metric(node, name, labels) >= least).then_some(()));
        wait::until(&format!("{name} {labels:?}"), SOON, counted).unwrap();
    }
}

/// A workload of this uid and name, as it is sent.
fn fine(uid: &str) -> Vec<u8> {
    let workload = Workload {
        uid: uid.to_owned(),
        name: uid.to_owned(),
        namespace: NAMESPACE.to_owned(),
        ..Workload::default()
    };
    Address { r#type: Some(Type::Workload(workload)) }.encode_to_vec()
}

fn first_of(node: &'static str, kind: Kind) -> impl Fn(&Seen) -> bool {
    move |seen| seen.node == node && seen.is(kind) && seen.is_first()
}

#[test]
fn everything_comes_from_the_control_plane() {
    let world = World::bare();
    world.control.hold(true);
    let mut settings = world.control.settings();
    settings.push(("XDS_HEADER_X-One", "1"));
    let proxy = world.scene.a.begin_proxy(&settings).unwrap();
    let first = world.control.wait_seen("policies", 0, first_of("a", Kind::Authorization)).unwrap();
    assert_eq!(first.headers, ["lab-cluster", "Bearer a-token"]);
    let node = first.request.node.unwrap();
    assert_eq!(node.id, "ztunnel~1.1.1.1~ztunnel-x.istio-system~istio-system.svc.cluster.local");
    let seen = world.control.seen();
    assert!(seen[0].is(Kind::Address), "addresses are asked for first");
    let readiness = proxy.readiness().unwrap();
    assert_eq!(readiness.status, 500);
    assert!(readiness.body.contains("state manager"), "{}", readiness.body);
    drop(proxy);
    world.control.hold(false);
    world.begin(&[]);
    world.works();
    for account in ["client", "server"] {
        assert!(world.control.signed(&identity(account)) >= 1, "{account}");
    }
    let url = [("url", Kind::Address.url())];
    assert!(world.metric("b", "istio_xds_last_message_age_seconds", &url) > 0.0);
    let who = [("identity", identity("server"))];
    let who: Vec<_> = who.iter().map(|(key, value)| (*key, value.as_str())).collect();
    assert!(world.metric("b", "istio_certificate_expiration_timestamp_seconds", &who) > 1e9);
    assert!(world.metric("b", "istio_tls_handshakes_total", &[("result", "ok")]) >= 1.0);
    assert!(world.metric("a", "istio_tls_handshakes_total", &[("reporter", "source")]) >= 1.0);
}

/// A pod is taken when all is known: until then a service may be taken for a stranger's address, and a policy that
/// has not come may deny.
#[test]
fn no_pod_is_taken_before_policies_are_known() {
    let world = World::bare();
    world.control.hold_only(&[Kind::Authorization]);
    let scene = &world.scene;
    for (node, pod, account) in
        [(&scene.a, &scene.client, "client"), (&scene.b, &scene.server, "server")]
    {
        // For the first node proxy that comes.
        node.enrol(pod, account).unwrap();
    }
    let proxy = scene.b.begin_proxy(&world.control.settings()).unwrap();
    wait::retry("the mesh", SOON, || {
        let services = proxy.config_dump()?["services"].to_string();
        anyhow::ensure!(services.contains(&hostname("web")), "{services}");
        Ok(())
    })
    .unwrap();
    let pending = "not ready, pending: state manager, workload proxy manager\n";
    assert_eq!(proxy.readiness().unwrap().body, pending);
    assert_eq!(scene.b.zds().connections(), 0);
    world.control.hold(false);
    proxy.wait_ready(SOON).unwrap();
    assert_eq!(scene.b.zds().connections(), 1);
    drop(proxy);
    world.begin(&[]);
    world.works();
}

/// What was refused of a first response is refused, and the rest is served: the node is only not ready.
#[test]
fn a_bad_resource_in_the_first_response_costs_readiness_and_no_pod() {
    let world = World::bare();
    world.control.also(Kind::Address, "torn", vec![0x0a, 0x03, 0x0a, 0x01]);
    let scene = &world.scene;
    scene.a.enrol(&scene.client, "client").unwrap();
    scene.b.enrol(&scene.server, "server").unwrap();
    let _proxies = [&scene.a, &scene.b].map(|node| {
        let proxy = node.begin_proxy(&world.control.settings()).unwrap();
        node.zds().wait_connections(1, SOON).unwrap();
        wait::until("what it waits for", SOON, || {
            let body = proxy.readiness()?.body;
            Ok((body == "not ready, pending: state manager\n").then_some(()))
        })
        .unwrap();
        proxy
    });
    world.works();
}

#[test]
fn a_bad_resource_costs_no_other_and_a_new_stream_claims_what_is_there() {
    let mut world = World::start(&[]);
    let rules = json!([[[{ "principals": [{ "Exact": principal("client") }] }]]]);
    world.scene.mesh.policy("good", "Allow", &rules);
    let mark = world.control.mark();
    world.apply();
    world.scene.b.with_proxy(|proxy| proxy.wait_policy("good", true)).unwrap();
    // In one response with a good one: what is cut short, and what is no message at all.
    world.control.push(
        Kind::Address,
        &[("torn", vec![0x0a, 0x03, 0x0a, 0x01]), ("fine", fine("fine")), ("other", vec![0xff])],
    );
    let nack = world
        .control
        .wait_seen("a refusal", mark, |seen| seen.node == "b" && !seen.complaint().is_empty())
        .unwrap();
    assert!(nack.is(Kind::Address));
    let complaint = nack.complaint();
    assert!(complaint.starts_with("torn: ") && complaint.contains("; other: "), "{complaint}");
    let knows = |dump: &serde_json::Value| dump["workloads"].to_string().contains("\"fine\"");
    world.scene.b.with_proxy(|proxy| proxy.wait_dump("the good one", knows)).unwrap();
    let url = [("url", Kind::Address.url())];
    assert!((world.metric("b", "istio_xds_nacks_total", &url) - 1.0).abs() < 0.1);
    assert!((world.metric("b", "istio_xds_rejected_resources_total", &url) - 2.0).abs() < 0.1);
    world.works();

    let (mark, mut open) = (world.control.mark(), world.open());
    world.control.cut();
    let claims = world.control.wait_seen("a new stream", mark, first_of("b", Kind::Address));
    let claims = claims.unwrap().request.initial_resource_versions;
    let service = format!("{NAMESPACE}/{}", hostname("web"));
    let pod = format!("Kubernetes//Pod/{NAMESPACE}/server");
    for name in [&service, &pod] {
        let version = claims.get(name).map(String::as_str).unwrap_or_default();
        assert_eq!(version.len(), 16, "{name} in {claims:?}");
    }
    assert!(claims.contains_key("fine") && !claims.contains_key("torn"), "{claims:?}");
    let policies = world.control.wait_seen("policies", mark, first_of("b", Kind::Authorization));
    let policies = policies.unwrap().request.initial_resource_versions;
    assert!(policies.contains_key(&format!("{NAMESPACE}/good")), "{policies:?}");
    world.works();
    assert!(open.is_running(), "{}", open.output());
    world.wait_metric("b", "istio_xds_connection_terminations_total", &[], 1.0);

    // What it no longer has when the stream is new is taken away.
    world.control.fail(Fault::Gone);
    world.control.cut();
    world.scene.mesh.remove_policy("good");
    world.apply();
    world.control.fail(Fault::None);
    world.scene.b.with_proxy(|proxy| proxy.wait_policy("good", false)).unwrap();
    assert!(open.is_running(), "{}", open.output());
}

/// A policy that came and cannot be enforced denies at once, by name; what is open goes on.
#[test]
fn a_policy_that_is_not_understood_denies_at_once() {
    let world = World::start(&[]);
    world.works();
    let mut open = world.open();
    // Of the pods' namespace, and with an action that nobody knows.
    let policy = Authorization {
        name: "odd".to_owned(),
        namespace: NAMESPACE.to_owned(),
        scope: Scope::Namespace.into(),
        action: 77,
        ..Authorization::default()
    };
    let (name, mark) = (format!("{NAMESPACE}/odd"), world.control.mark());
    world.control.push(Kind::Authorization, &[(&name, policy.encode_to_vec())]);
    let refused = |seen: &Seen| seen.node == "b" && seen.complaint().starts_with(&name);
    world.control.wait_seen("a refusal", mark, refused).unwrap();
    let since = world.scene.b.with_proxy(|proxy| Ok(proxy.log().mark())).unwrap();
    world.scene.ask(&world.scene.client, web(80)[0]).unwrap_err();
    world.denied_at_once(since, &name);
    let labels = [("policy", name.as_str()), ("reason", "rejected")];
    assert!(world.metric("b", "istio_policy_unavailable_denials_total", &labels) > 0.5);
    assert!(open.is_running(), "{}", open.output());
    // Understood at last, it is as it says.
    let policy = Authorization { action: Action::Deny.into(), ..policy };
    world.control.push(Kind::Authorization, &[(&name, policy.encode_to_vec())]);
    world.works();
}

/// What a policy says cannot be known when its bytes cannot be read; whom it applies to can, or it is taken for one
/// of all pods of its namespace, and in Istio's own namespace for one of all pods.
#[test]
fn a_policy_that_cannot_be_read_denies_at_once() {
    let world = World::start(&[]);
    world.works();
    let mut open = world.open();
    // A list of rules that ends before it says that it does.
    let cut = [0x2a, 0x7f];
    let scoped = |scope: Scope| {
        let policy = Authorization { scope: scope.into(), ..Authorization::default() };
        [policy.encode_to_vec().as_slice(), &cut].concat()
    };
    let own = format!("{NAMESPACE}/cut");
    let cases: [(&str, Vec<u8>, bool); 6] = [
        (&own, scoped(Scope::Namespace), true),
        (&own, scoped(Scope::WorkloadSelector), false),
        (&own, cut.to_vec(), true),
        ("elsewhere/cut", scoped(Scope::Namespace), false),
        ("elsewhere/cut", cut.to_vec(), false),
        ("istio-system/cut", cut.to_vec(), true),
    ];
    for (name, bytes, denies) in cases {
        let case = format!("{name} {bytes:x?}");
        let mark = world.control.mark();
        world.control.push(Kind::Authorization, &[(name, bytes.clone())]);
        let refused = |seen: &Seen| seen.node == "b" && seen.complaint().starts_with(name);
        world.control.wait_seen("a refusal", mark, refused).unwrap();
        let since = world.scene.b.with_proxy(|proxy| Ok(proxy.log().mark())).unwrap();
        let asked = world.scene.ask(&world.scene.client, web(80)[0]);
        assert_eq!(asked.is_err(), denies, "{case}");
        if denies {
            world.denied_at_once(since, name);
        }
        assert!(open.is_running(), "{case}: {}", open.output());
        let gone = vec![name.to_owned()];
        let order = Order::new(Kind::Authorization, [], gone);
        let _told = world.control.deliver(&order);
        world.works();
    }
}

#[test]
fn what_is_sent_again_unchanged_changes_nothing() {
    let mut world = World::bare();
    let rules = json!([[[{ "principals": [{ "Exact": principal("client") }] }]]]);
    world.scene.mesh.policy("allow", "Allow", &rules);
    world.apply();
    world.begin(&[]);
    world.works();
    let mut open = world.open();
    let dump = || {
        let mut dump = world.scene.b.with_proxy(|proxy| proxy.config_dump()).unwrap();
        ["workloads", "services", "policies"].map(|key| dump[key].take())
    };
    let before = dump();
    for _ in 0..3 {
        let mark = world.control.mark();
        world.control.repeat();
        for kind in Kind::ALL {
            let is = |seen: &Seen| seen.node == "b" && seen.is(kind);
            let answer = world.control.wait_seen("an acknowledgement", mark, is).unwrap();
            assert_eq!(answer.complaint(), "");
        }
    }
    assert_eq!(dump(), before);
    assert!(open.is_running(), "{}", open.output());
    assert_eq!(world.control.signed(&identity("server")), 1);
}

#[test]
fn established_connections_outlive_a_control_plane_in_any_trouble() {
    let world = World::start(&[]);
    world.works();
    let mut ticking = world.ticking();
    for fault in [Fault::Gone, Fault::Garbage, Fault::GarbageInside, Fault::Silent] {
        let failed = [("reason", "ConnectionError")];
        let name = "istio_xds_connection_terminations_total";
        let before = world.metric("a", name, &failed);
        world.control.fail(fault);
        world.control.cut();
        // Twice: the first may have been on its way.
        world.wait_metric("a", name, &failed, before + 2.0);
        assert!(ticking.is_running(), "{fault:?}: {}{}", ticking.output(), ticking.errors());
        // What is known stays known: new connections are served too.
        world.works();
        let log = world.scene.a.with_proxy(|proxy| Ok(proxy.log().tail(200))).unwrap();
        assert!(log.contains("control plane"), "{fault:?}: {log}");
        let mark = world.control.mark();
        world.control.fail(Fault::None);
        world.control.cut();
        world.control.wait_seen("a new stream", mark, first_of("a", Kind::Address)).unwrap();
    }
    assert!(ticking.is_running(), "{}{}", ticking.output(), ticking.errors());
}

#[test]
fn a_response_that_breaks_in_the_middle_is_as_if_it_had_not_come() {
    let mut world = World::start(&[]);
    world.works();
    let mut ticking = world.ticking();
    let rules = json!([[[{ "principals": [{ "Exact": "a".repeat(20_000) }] }]]]);
    world.scene.mesh.policy("long", "Deny", &rules);
    let mark = world.control.mark();
    world.control.break_after(5_000);
    world.apply();
    world.wait_metric("b", "istio_xds_connection_terminations_total", &[], 1.0);
    assert!(ticking.is_running(), "{}{}", ticking.output(), ticking.errors());
    let has = |proxy: &mut mesh_tests::Proxy| -> Result<bool> {
        let dump = proxy.config_dump()?;
        let policies = dump["policies"].as_array().cloned().unwrap_or_default();
        Ok(policies.iter().any(|policy| policy["name"] == "long"))
    };
    assert!(!world.scene.b.with_proxy(has).unwrap(), "half of it was taken");
    world.control.cut();
    world.control.wait_seen("a new stream", mark, first_of("b", Kind::Address)).unwrap();
    world.scene.b.with_proxy(|proxy| proxy.wait_policy("long", true)).unwrap();
    assert!(ticking.is_running(), "{}{}", ticking.output(), ticking.errors());
}

#[test]
fn on_demand_the_first_connection_asks_and_waits() {
    let world = World::start(&[("XDS_ON_DEMAND", "true"), ("ISTIO_META_DNS_CAPTURE", "false")]);
    let asks = |name: &'static str| {
        move |seen: &Seen| seen.request.resource_names_subscribe.iter().any(|asked| asked == name)
    };
    let star = world.control.wait_seen("nothing yet", 0, first_of("a", Kind::Address)).unwrap();
    assert_eq!(star.request.resource_names_subscribe, ["*"]);
    assert_eq!(star.request.resource_names_unsubscribe, ["*"]);
    let knows = |what: &str| {
        let dump = world.scene.a.with_proxy(|proxy| proxy.config_dump()).unwrap();
        dump.to_string().contains(what)
    };
    assert!(!knows(&hostname("web")), "nobody has asked for it");

    let to = web(80)[0];
    world.control.hold(true);
    let mark = world.control.mark();
    std::thread::scope(|scope| {
        let answer = scope.spawn(|| world.scene.ask(&world.scene.client, to));
        let name = Box::leak(format!("/{}", to.ip()).into_boxed_str());
        world.control.wait_seen("the service", mark, asks(name)).unwrap();
        assert!(!answer.is_finished(), "it does not wait");
        world.control.hold(false);
        answer.join().unwrap().unwrap();
    });
    assert!(knows(&hostname("web")));

    // Nobody has it: it is asked for each time, and passes.
    let outside = SocketAddr::new(world.scene.outsider.v4(), HTTP);
    let name = Box::leak(format!("/{}", outside.ip()).into_boxed_str());
    for _ in 0..2 {
        let mark = world.control.mark();
        world.scene.ask(&world.scene.client, outside).unwrap();
        world.control.wait_seen("the stranger", mark, asks(name)).unwrap();
    }
    // A new stream claims what is there, by its own name.
    let mark = world.control.mark();
    world.control.cut();
    let claims = world.control.wait_seen("a new stream", mark, first_of("a", Kind::Address));
    let claims = claims.unwrap().request.initial_resource_versions;
    assert!(claims.contains_key(&format!("{NAMESPACE}/{}", hostname("web"))), "{claims:?}");
    world.works();
}

#[test]
fn endpoints_may_come_before_their_service() {
    let mut world = World::bare();
    let full = world.scene.mesh.clone();
    world.scene.mesh.remove_service("web");
    world.apply();
    world.begin(&[]);
    let staged = format!("{NAMESPACE}/{}", hostname("web"));
    let is_staged = |dump: &serde_json::Value| dump["stagedServices"].to_string().contains(&staged);
    world.scene.a.with_proxy(|proxy| proxy.wait_dump("staged", is_staged)).unwrap();
    world.scene.mesh = full;
    world.apply();
    world.works();
    world
        .scene
        .a
        .with_proxy(|proxy| proxy.wait_dump("not staged", |dump| !is_staged(dump)))
        .unwrap();
}

#[test]
fn a_revoked_certificate_closes_its_tunnels_and_opens_no_more() {
    let world = World::bare();
    world.begin(&[("CRL_PATH", world.control.lists())]);
    world.works();
    let mut open = world.open();
    world.control.revoke(&identity("client")).unwrap();
    // The server's node closes what the client has open.
    open.says("closed", SOON).unwrap();
    let revoked = [("response_flags", "CERT_REVOKED")];
    world.wait_metric("b", "istio_tcp_connections_failed_total", &revoked, 1.0);
    world.wait_metric(
        "b",
        "istio_crl_policy_rejections_total",
        &[("reporter", "destination")],
        1.0,
    );
    let to = web(80)[0];
    let refused = || Ok(world.scene.ask(&world.scene.client, to).is_err().then_some(()));
    wait::until("a refusal", SOON, refused).unwrap();
    let result = [("reporter", "destination"), ("result", "revoked")];
    world.wait_metric("b", "istio_tls_handshakes_total", &result, 1.0);
}

#[test]
fn a_revoked_server_is_left_by_its_clients() {
    let world = World::bare();
    // Only the client's node looks at the lists.
    let mut settings = world.control.settings();
    world.scene.b.start_proxy(&settings).unwrap();
    settings.push(("CRL_PATH", world.control.lists()));
    world.scene.a.start_proxy(&settings).unwrap();
    world.scene.a.enrol(&world.scene.client, "client").unwrap();
    world.scene.b.enrol(&world.scene.server, "server").unwrap();
    world.works();
    let mut open = world.open();
    world.control.revoke(&identity("server")).unwrap();
    open.says("closed", SOON).unwrap();
    let revoked = [("response_flags", "CERT_REVOKED")];
    world.wait_metric("a", "istio_tcp_connections_failed_total", &revoked, 1.0);
    let refused = || Ok(world.scene.ask(&world.scene.client, web(80)[0]).is_err().then_some(()));
    wait::until("a refusal", SOON, refused).unwrap();
    let result = [("reporter", "source"), ("result", "revoked")];
    world.wait_metric("a", "istio_tls_handshakes_total", &result, 1.0);
}

#[test]
fn roots_change_without_cutting_a_tunnel() {
    let world = World::bare();
    // Refreshed after 5 s.
    world.control.validity(Duration::from_secs(12));
    world.begin(&[]);
    world.works();
    let mut ticking = world.ticking();
    let refreshed = |more: usize| {
        for account in ["client", "server"] {
            let wanted = world.control.signed(&identity(account)) + more;
            let signed = || Ok((world.control.signed(&identity(account)) >= wanted).then_some(()));
            wait::until("certificates that are new", SOON, signed).unwrap();
        }
    };
    // First all get to trust both, one of them sooner; then they have certificates of the new root alone.
    world.control.rotate().unwrap();
    refreshed(1);
    world.works();
    world.control.retire();
    refreshed(2);
    world.works();
    assert!(ticking.is_running(), "{}{}", ticking.output(), ticking.errors());
}

#[test]
fn a_certificate_goes_with_the_last_pod_that_has_its_identity() {
    let world = World::start(&[]);
    world.works();
    let has = |dump: &serde_json::Value| dump["certificates"].to_string().contains("/sa/client");
    world.scene.a.with_proxy(|proxy| proxy.wait_dump("the certificate", has)).unwrap();
    world.scene.a.release(&world.scene.client).unwrap();
    world.scene.a.with_proxy(|proxy| proxy.wait_dump("no certificate", |dump| !has(dump))).unwrap();
    // And comes again with it.
    world.scene.a.enrol(&world.scene.client, "client").unwrap();
    world.works();
}

#[test]
fn what_tls_is_spoken_is_a_setting() {
    for (settings, old, old_speaks) in [
        (&[][..], true, false),
        (&[("TLS12_ENABLED", "true")], true, true),
        (&[("TLS12_ENABLED", "true"), ("COMPLIANCE_POLICY", "pqc")], true, false),
        (&[("COMPLIANCE_POLICY", "pqc")], false, true),
    ] {
        let scene = Scene::start(settings).unwrap();
        scene.ask_until(&scene.client, web(80)[0]).unwrap();
        let client = Authority::load(&scene.lab.ca_folder()).unwrap();
        let client = client.issue(Some(&identity("client"))).unwrap();
        let dial = Dial { old, ..Dial::new(scene.outsider.namespace(), scene.tunnel(), &client) };
        if old_speaks {
            let mut tunnel = Tunnel::open(&dial).unwrap();
            let to = format!("{}:{HTTP}", scene.server.v4());
            assert_eq!(tunnel.connect(&to, &[]).unwrap().status, 200, "{settings:?}");
        } else {
            refused(&dial).unwrap();
        }
    }
}
