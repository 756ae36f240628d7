//! What istiod says, signs and pushes, and that it may go and come.

use std::time::Duration;

use anyhow::Context as _;
use mesh_tests::{
    scene::web,
    topology::NAMESPACE,
    wait::{self, SOON},
};
use serde_json::Value;

use crate::world::{World, dump, pod, refusals, uids};

const CONVERTED: &str = "istio-system/istio_converted_static_strict";

fn deny() -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: no-client, namespace: {NAMESPACE}}}\n\
         spec: {{selector: {{matchLabels: {{app: server}}}}, action: DENY, rules: [{{from: [{{source: {{principals: \
         [cluster.local/ns/{NAMESPACE}/sa/client]}}}}]}}]}}\n"
    )
}

#[test]
fn its_mesh_its_certificates_and_its_pushes() {
    let world = World::new("");
    world.begin(&[]);
    world.works();
    let line = world.scene.b.with_proxy(|proxy| {
        proxy.wait_access(0, "the request", |line| line.field("direction") == "inbound")
    });
    let line = line.unwrap();
    let of = |account: &str| format!("spiffe://cluster.local/ns/{NAMESPACE}/sa/{account}");
    assert_eq!(line.field("src.identity"), of("client"), "{}", line.text);
    assert_eq!(line.field("dst.identity"), of("server"), "{}", line.text);
    // A policy comes, and goes.
    world.change("apply", &deny()).unwrap();
    world.refused();
    world.change("delete", &deny()).unwrap();
    world.works();
    // STRICT is a policy that istiod makes up and workloads refer to.
    let strict = format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: default, namespace: {NAMESPACE}}}\n\
         spec: {{mtls: {{mode: STRICT}}}}\n"
    );
    world.change("apply", &strict).unwrap();
    let refers = |dump: &Value| {
        let workloads = dump["workloads"].as_array().into_iter().flatten();
        let mut server = workloads.filter(|workload| workload["name"] == "server");
        server.any(|server| server["authorizationPolicies"].to_string().contains(CONVERTED))
    };
    world.scene.b.with_proxy(|proxy| proxy.wait_dump("STRICT", refers)).unwrap();
    world.works();
    assert!(refusals(&world.scene.a) + refusals(&world.scene.b) < 0.5, "something was refused");
}

#[test]
fn a_node_proxy_signs_for_its_own_pods_only() {
    let world = World::new("");
    world.begin(&[]);
    world.works();
    // No pod of that account is on the node, by what istiod knows.
    world.scene.a.enrol(&world.scene.outsider, "somebody").unwrap();
    let outcome = world.scene.ask(&world.scene.outsider, web(80)[0]);
    assert!(outcome.is_err(), "{outcome:?}");
    world.works();
}

#[test]
fn it_goes_and_comes_back() {
    let mut world = World::new("");
    world.begin(&[]);
    world.works();
    let mut open = world.ticking();
    world.stop();
    for node in [&world.scene.a, &world.scene.b] {
        let heard = node.with_proxy(|proxy| {
            let log = proxy.log();
            wait::until("a line on the control plane", SOON, || {
                let lines = log.since(0);
                Ok(lines.into_iter().find(|line| line.contains("\twarn\t") && line.contains("xds")))
            })
        });
        heard.unwrap();
    }
    world.works();
    world.start();
    world.change("apply", &deny()).unwrap();
    // It has heard of the policy: the open connection is the policy's to end, and nothing else has.
    open.wait(Duration::from_secs(60)).context("the policy ended it").unwrap();
    world.refused();
}

#[test]
fn on_demand_it_is_asked_for_what_is_needed() {
    let other = pod("far-away", ("c", "10.9.9.9".into()), "other", NAMESPACE);
    let world = World::new(&other);
    world.begin(&[("XDS_ON_DEMAND", "true")]);
    world.works();
    let known = dump(&world.scene.a);
    let uids = uids(&known);
    assert!(uids.iter().any(|uid| uid.ends_with("/server")), "{uids:?}");
    assert!(!uids.iter().any(|uid| uid.ends_with("/far-away")), "{uids:?}");
}

#[test]
fn ten_thousand_pods() {
    let mut many = String::new();
    for index in 0..10_000_u32 {
        let ip = format!("10.{}.{}.{}", 100 + index / 40_000, index / 200 % 200, index % 200 + 1);
        many += &pod(&format!("many-{index}"), ("c", ip), "many", NAMESPACE);
    }
    let world = World::new(&many);
    world.begin(&[]);
    world.works();
    for node in [&world.scene.a, &world.scene.b] {
        let count = uids(&dump(node)).len();
        assert!(count >= 10_004, "{count}");
    }
}
