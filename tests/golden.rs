//! What a real istiod sends for one of nearly every kind of object (`tests/realmesh/golden`), read right.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use mesh_tests::{
    Scene,
    control_plane::{ControlPlane, Kind},
};
use serde_json::{Value, json};

/// Made by `tests/realmesh/scripts/golden.sh` with the objects of `tests/realmesh/mesh` in a real API server.
const SENT: &str = include_str!("realmesh/golden/istio-1.29.1.txt");
/// Entries and policies of these objects, as they are to be known.
const ENTRIES: &str = include_str!("istiod/entries.json");

type Named<'a> = Vec<(&'a str, Vec<u8>)>;

/// The resources of one type by name.
fn sent(kind: &str) -> Named<'static> {
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    let line = |line: &'static str| {
        let mut words = line.split(' ');
        let (of, name, hex) = (words.next()?, words.next()?, words.next()?);
        (of == kind).then(|| (name, hex.as_bytes().chunks(2).map(byte).collect()))
    };
    SENT.lines().filter_map(line).collect()
}

fn names(list: &Value, name: impl Fn(&Value) -> String) -> Vec<String> {
    let mut names: Vec<_> = list.as_array().unwrap().iter().map(name).collect();
    names.sort();
    names
}

fn text(value: &Value, pointer: &str) -> String {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}

#[test]
fn what_istiod_sends_is_accepted_and_read() {
    let scene = Scene::bare().unwrap();
    let control = ControlPlane::start(&scene.lab).unwrap();
    scene.a.start_proxy(&control.settings()).unwrap();
    let (addresses, policies) = (sent("address"), sent("authorization"));
    assert!(addresses.len() > 70 && policies.len() == 13, "the golden file is cut");
    control.push(Kind::Address, &addresses);
    control.push(Kind::Authorization, &policies);
    let whole = |dump: &Value| {
        let of = |key: &str| dump[key].as_array().map_or(0, Vec::len);
        of("policies") == policies.len() && of("workloads") + of("services") == addresses.len()
    };
    let proxy = |dump: &mut Value| {
        scene.a.with_proxy(|proxy| {
            proxy.wait_dump("all resources", whole)?;
            *dump = proxy.config_dump()?;
            proxy.metrics()
        })
    };
    let mut dump = Value::Null;
    let metrics = proxy(&mut dump).unwrap();
    // Nothing was refused, and by name all is there.
    let complaints = control.seen().iter().filter(|seen| !seen.complaint().is_empty()).count();
    assert_eq!(complaints, 0);
    assert!(metrics.samples().iter().all(|s| !s.name.contains("nack") || s.value == 0.0));
    let mut read = names(&dump["workloads"], |w| text(w, "/uid"));
    read.extend(names(&dump["services"], |s| {
        format!("{}/{}", text(s, "/namespace"), text(s, "/hostname"))
    }));
    let mut all: Vec<_> = addresses.iter().map(|(name, _)| (*name).to_owned()).collect();
    read.sort();
    all.sort();
    assert_eq!(read, all);
    details(&dump);
}

fn find<'a>(dump: &'a Value, list: &str, key: &str, value: &str) -> &'a Value {
    let list = dump[list].as_array().unwrap();
    list.iter().find(|one| text(one, key) == value).unwrap()
}

fn details(dump: &Value) {
    let entries: Value = serde_json::from_str(ENTRIES).unwrap();
    for policy in entries.get("policies").and_then(Value::as_array).unwrap() {
        let found = find(dump, "policies", "/name", policy["name"].as_str().unwrap());
        assert_eq!(found, policy);
    }
    for entry in entries.get("workloads").and_then(Value::as_array).unwrap() {
        let found = find(dump, "workloads", "/uid", entry["uid"].as_str().unwrap());
        for key in ["locality", "network", "capacity", "hostname", "serviceAccount", "services"] {
            assert_eq!(found.get(key), entry.get(key), "{key} of {}", entry["uid"]);
        }
    }
    let web = find(dump, "workloads", "/uid", "Kubernetes//Pod/shop/web-1");
    for (pointer, expect) in [
        ("/protocol", json!("HBONE")),
        ("/serviceAccount", json!("web")),
        ("/workloadIps", json!(["10.1.0.11"])),
        ("/services", json!(["shop/web.shop.svc.cluster.local"])),
        (
            "/authorizationPolicies",
            json!(["shop/web-l4", "istio-system/istio_converted_static_strict"]),
        ),
        ("/locality", json!({ "region": "r1", "zone": "z1" })),
    ] {
        assert_eq!(web.pointer(pointer), Some(&expect), "{pointer} of {web}");
    }
    let vm = "Kubernetes/networking.istio.io/WorkloadEntry/wide/vm-1";
    let vm = find(dump, "workloads", "/uid", vm);
    assert_eq!(vm["capacity"], 7, "{vm}");
    assert_eq!(vm["protocol"], "TCP", "{vm}");
    let service = |host: &str| find(dump, "services", "/hostname", host);
    let headless = service("headless.wide.svc.cluster.local");
    assert_eq!(headless["vips"], json!([]), "{headless}");
    let near = service("near.wide.svc.cluster.local");
    assert_eq!(text(near, "/loadBalancer/mode"), "Failover");
    assert_eq!(
        near.pointer("/loadBalancer/routingPreferences").unwrap(),
        &json!(["Network", "Region", "Zone"])
    );
    assert_eq!(text(service("none.example.test"), "/loadBalancer/mode"), "Passthrough");
    let guarded = service("web.shop.svc.cluster.local");
    let waypoint = text(guarded, "/waypoint/destination");
    assert_eq!(waypoint, "shop/waypoint.shop.svc.cluster.local", "{guarded}");
    assert_eq!(guarded["endpoints"].as_object().unwrap().len(), 2, "{guarded}");
    let deny = find(dump, "policies", "/name", "deny-outside");
    assert_eq!((text(deny, "/scope"), text(deny, "/action")), ("Namespace".into(), "Deny".into()));
}
