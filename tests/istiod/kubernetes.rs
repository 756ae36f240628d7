//! With an API server: what istiod makes of objects is accepted and read right, and what changes takes effect.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::{
    Node,
    topology::NAMESPACE,
    wait::{self, SOON},
};
use serde_json::{Value, json};

use crate::{
    cluster::{self, Cluster, namespace, object},
    oracle::Objects,
    world::{dump, refusals, uids},
};

/// Entries, endpoints written by hand and policies, as the files of `tests/realmesh/mesh` have them.
const ENTRIES: &str = include_str!("entries.json");
/// How soon a change is seen: istiod gathers changes for 100 ms, and the machine has two cores.
const PUSH: Duration = Duration::from_secs(10);
const KINDS: [&str; 3] = ["workloads", "services", "policies"];

/// What there is of a kind, by name.
type Named = BTreeMap<String, Value>;

/// By name, and so that what means the same is the same.
fn named(all: impl IntoIterator<Item = Value>) -> Named {
    let text = |one: &Value, key: &str| one[key].as_str().unwrap_or_default().to_owned();
    let of = |one: Value| {
        let key = ["uid", "hostname", "name"].into_iter().find(|key| one.get(key).is_some());
        let name = text(&one, key.unwrap_or_default());
        (format!("{} {name}", text(&one, "namespace")), same(one))
    };
    all.into_iter().map(of).collect()
}

fn same(mut one: Value) -> Value {
    for key in ["services", "authorizationPolicies"] {
        if let Some(Value::Array(list)) = one.get_mut(key) {
            list.sort_by_key(Value::to_string);
        }
    }
    for vip in one.get_mut("vips").and_then(Value::as_array_mut).into_iter().flatten() {
        // istiod gives addresses to entries that have none, in the order in which it sees them.
        for (start, means) in [("/240.240.", "/given v4"), ("/2001:2::", "/given v6")] {
            if vip.as_str().is_some_and(|vip| vip.starts_with(start)) {
                *vip = json!(means);
            }
        }
    }
    // In 1.29.1, one Service that publishes what is not ready does so for all that prefer what is near.
    if let Some(balance) = one.get_mut("loadBalancer").and_then(Value::as_object_mut)
        && balance.get("routingPreferences") == Some(&json!(["Network", "Region", "Zone"]))
    {
        balance.remove("healthPolicy");
    }
    one
}

/// What a node proxy is to know of these namespaces: by the objects, and for the rest by the file.
fn expected(cluster: &Cluster, namespaces: &[&str]) -> Result<[Named; 3]> {
    let objects = Objects::read(cluster)?;
    let entries: Value = serde_json::from_str(ENTRIES)?;
    let entries = |kind: &str| entries.get(kind)?.as_array().cloned();
    let [workloads, services, policies] = KINDS.map(|kind| entries(kind).unwrap_or_default());
    Ok([
        named(objects.workloads(namespaces).into_iter().chain(workloads)),
        named(objects.services(namespaces).into_iter().chain(services)),
        named(policies),
    ])
}

/// Where the two differ, field by field.
fn differences(expected: &Named, found: &Named) -> Vec<String> {
    let mut all = Vec::new();
    for name in expected.keys().chain(found.keys()) {
        let empty = json!({});
        let of = |map: &Named| map.get(name).unwrap_or(&empty).clone();
        let (Value::Object(expected), Value::Object(found)) = (of(expected), of(found)) else {
            continue;
        };
        for key in expected.keys().chain(found.keys()) {
            let (expected, found) = (expected.get(key), found.get(key));
            if expected != found {
                all.push(format!("{name}: {key} is {found:?}, not {expected:?}"));
            }
        }
    }
    all.sort();
    all.dedup();
    all
}

#[test]
fn everything_is_accepted_and_read_as_the_objects_say_it() {
    let cluster = cluster::beside();
    let node = cluster.node("node-a").unwrap();
    cluster.begin(&node, &[]).unwrap();
    for file in ["kube.yaml", "gateway.yaml", "istio.yaml", "wide.yaml", "more.yaml"] {
        cluster.apply_file(file).unwrap();
    }
    let namespaces = ["client", "outside", "shop", "wide", "more", "gates"];
    let whole = wait::retry("all that the objects say to be known", SOON, || {
        let expected = expected(&cluster, &namespaces)?;
        let dump = dump(&node);
        let mut counts = Vec::new();
        for (kind, expected) in KINDS.into_iter().zip(&expected) {
            let all = dump[kind].as_array().cloned().unwrap_or_default();
            // Other tests have pods there, and no policies.
            let ours = all.into_iter().filter(|one| {
                let of = one["namespace"].as_str().unwrap_or_default();
                namespaces.contains(&of) || kind == "policies" && of == "istio-system"
            });
            let differences = differences(expected, &named(ours));
            ensure!(differences.is_empty(), "{kind}: {differences:#?}");
            counts.push(expected.len());
        }
        Ok(counts)
    });
    let [workloads, services, policies] = whole.unwrap().try_into().unwrap();
    assert!(
        workloads >= 26 && services >= 36 && policies >= 13,
        "{workloads} {services} {policies}"
    );
    cluster.in_order(&node).unwrap();
    assert!(refusals(&node) < 0.5, "something was refused");
}

/// Waits until what a dump has at this place is this.
fn sees(node: &Node, (kind, name): (&str, &str), pointer: &str, value: &Value) {
    let found = || -> Result<()> {
        let dump = dump(node);
        let all = dump.get(kind).and_then(Value::as_array).context("no list")?;
        let key = if kind == "workloads" { "name" } else { "hostname" };
        let one = all.iter().find(|one| one[key] == name).unwrap_or(&Value::Null);
        let found = one.pointer(pointer).unwrap_or(&Value::Null);
        ensure!(found == value, "{pointer} of {name} is {found}");
        Ok(())
    };
    wait::retry(&format!("{pointer} of {name} to be {value}"), PUSH, found).unwrap();
}

fn policy(action: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: one, namespace: changes}}\n\
         spec: {{selector: {{matchLabels: {{app: one}}}}, action: {action}, rules: [{{from: [{{source: {{namespaces: [a]}}}}]}}]}}\n"
    )
}

#[test]
fn a_change_takes_effect() {
    let cluster = cluster::beside();
    let node = cluster.node("node-changes").unwrap();
    cluster.begin(&node, &[]).unwrap();
    let kubectl = |words: &str| {
        let words: Vec<_> = words.split(' ').collect();
        cluster.kubectl(&[&["-n", "changes"], &words[..]].concat()).unwrap()
    };
    let one = object(("changes", "one"), ("node-changes", "10.9.1.1"), "default");
    cluster.apply(&namespace("changes", &["default"])).unwrap();
    cluster.apply(&one).unwrap();
    let pod = ("workloads", "one");
    sees(&node, pod, "/protocol", &json!("HBONE"));
    kubectl("annotate pod one ambient.istio.io/redirection-");
    sees(&node, pod, "/protocol", &json!("TCP"));

    kubectl("create service clusterip svc --tcp=80:8080");
    let service = ("services", "svc.changes.svc.cluster.local");
    sees(&node, service, "/ports", &json!({ "80": 8080 }));
    sees(&node, service, "/endpoints", &json!({}));
    kubectl("set selector service svc app=one");
    let endpoint = "/endpoints/Kubernetes~1~1Pod~1changes~1one";
    sees(&node, service, &format!("{endpoint}/port/80"), &json!(8080));
    sees(&node, pod, "/services/0", &json!("changes/svc.changes.svc.cluster.local"));
    let ready = r#"patch pod one --subresource=status -p {"status":{"conditions":[{"type":"Ready","status":"False"}]}}"#;
    kubectl(ready);
    sees(&node, service, &format!("{endpoint}/status"), &json!("Unhealthy"));
    kubectl(&ready.replace("False", "True"));
    sees(&node, pod, "/status", &json!("Healthy"));
    kubectl(r#"patch service svc -p {"spec":{"ports":[{"port":80,"targetPort":9090}]}}"#);
    sees(&node, service, &format!("{endpoint}/port/80"), &json!(9090));
    kubectl("label pod one app=other --overwrite");
    sees(&node, service, "/endpoints", &json!({}));
    kubectl("label pod one app=one --overwrite");

    cluster.apply(&policy("DENY")).unwrap();
    sees(&node, pod, "/authorizationPolicies", &json!(["changes/one"]));
    let action = |wanted: Option<&str>| {
        let said = |dump: &Value| {
            let all = dump["policies"].as_array().into_iter().flatten();
            let mut ours = all.filter(|one| one["namespace"] == "changes");
            ours.next().and_then(|one| one["action"].as_str()) == wanted
        };
        node.with_proxy(|proxy| proxy.wait_dump(&format!("{wanted:?}"), said)).unwrap();
    };
    action(Some("Deny"));
    cluster.apply(&policy("ALLOW")).unwrap();
    action(Some("Allow"));
    cluster.delete(&policy("ALLOW")).unwrap();
    action(None);
    sees(&node, pod, "/authorizationPolicies", &Value::Null);

    let deployment = "create deployment made --image=app --replicas=1";
    kubectl(deployment);
    let made = wait::until("the Deployment's pod", SOON, || {
        let said = kubectl("get pods -l app=made -o jsonpath={.items[*].metadata.name}");
        Ok((!said.is_empty()).then_some(said))
    });
    let made = made.unwrap();
    cluster.bind("changes", &made, "node-changes").unwrap();
    let runs = r#"{"status":{"phase":"Running","podIP":"10.9.1.2","podIPs":[{"ip":"10.9.1.2"}]}}"#;
    kubectl(&format!("patch pod {made} --subresource=status -p {runs}"));
    sees(&node, ("workloads", &made), "/workloadName", &json!("made"));
    sees(&node, ("workloads", &made), "/node", &json!("node-changes"));

    cluster.delete(&one).unwrap();
    sees(&node, pod, "", &Value::Null);
    kubectl("delete service svc");
    sees(&node, service, "", &Value::Null);
    cluster.in_order(&node).unwrap();
    assert!(refusals(&node) < 0.5, "something was refused");
}

/// All addresses are then of that network, and nobody who is not on it reaches them directly.
#[test]
fn a_network_gets_a_name() {
    let cluster = cluster::alone();
    let node = cluster.node("node-network").unwrap();
    cluster.apply(&namespace("network", &["default"])).unwrap();
    cluster.apply(&object(("network", "on-it"), ("node-network", "10.9.2.1"), "default")).unwrap();
    cluster.begin(&node, &[]).unwrap();
    let pod = ("workloads", "on-it");
    let service = ("services", "kubernetes.default.svc.cluster.local");
    sees(&node, pod, "/network", &Value::Null);
    let label = "topology.istio.io/network";
    cluster.kubectl(&["label", "namespace", "istio-system", &format!("{label}=net-1")]).unwrap();
    sees(&node, pod, "/network", &json!("net-1"));
    sees(&node, service, "/vips", &json!(["net-1/10.96.0.1"]));
    cluster.kubectl(&["label", "namespace", "istio-system", &format!("{label}-")]).unwrap();
    sees(&node, pod, "/network", &Value::Null);
    sees(&node, service, "/vips", &json!(["/10.96.0.1"]));
}

#[test]
fn on_demand_it_is_asked_for_what_is_needed() {
    let cluster = cluster::beside();
    let node = cluster.node("node-demand").unwrap();
    let place = NAMESPACE;
    cluster.apply(&namespace(place, &["client", "server"])).unwrap();
    let client = cluster.pod(&node, (place, "client"), "client").unwrap();
    let server = cluster.pod(&node, (place, "server"), "server").unwrap();
    cluster.apply(&object((place, "far-away"), ("elsewhere", "10.9.3.1"), "server")).unwrap();
    let _programs = server.serve(8080, 9000).unwrap();
    let on_demand = [("XDS_ON_DEMAND", "true"), ("ISTIO_META_DNS_CAPTURE", "false")];
    cluster.begin(&node, &on_demand).unwrap();
    node.enrol(&client, "client").unwrap();
    node.enrol(&server, "server").unwrap();
    let url = format!("http://{}:8080/", server.v4());
    wait::retry("an answer", SOON, || client.fetch(&url)?.ok()).unwrap();
    let known = dump(&node);
    let uids = uids(&known);
    assert!(uids.iter().any(|uid| uid.ends_with("/server")), "{uids:?}");
    assert!(!uids.iter().any(|uid| uid.ends_with("/far-away")), "{uids:?}");
    cluster.in_order(&node).unwrap();
}
