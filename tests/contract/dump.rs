//! The admin port: its paths, and every key of `/config_dump` (spec/ztunnel.md §11.5).

use std::collections::{BTreeMap, BTreeSet};

use mesh_tests::{
    Scene, http,
    scene::{TCP, web},
    wait::{self, SOON},
};
use serde_json::Value;

use crate::world::{RELEASE, World};

/// What a value is. `Maybe` is text or null.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    Text,
    Number,
    Flag,
    List,
    Map,
    Maybe,
}
use Kind::{Flag, List, Map, Maybe, Number, Text};

/// Whether a key may be left out where it is empty, or the default.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum When {
    Always,
    Filled,
    /// Not Istio's: beside what istioctl reads.
    Ours,
}
use When::{Always, Filled, Ours};

/// Every key by its path; a star is each element of a list, or each value of a map.
const KEYS: &[(&str, Kind, When)] = &[
    ("workloads", List, Always),
    ("services", List, Always),
    ("policies", List, Always),
    ("stagedServices", Map, Filled),
    ("certificates", List, Always),
    ("workloadState", Map, Always),
    ("staticConfig", Map, Always),
    ("version", Map, Always),
    ("config", Map, Always),
    ("workloads/*/workloadIps", List, Always),
    ("workloads/*/waypoint", Map, Filled),
    ("workloads/*/waypoint/destination", Text, Always),
    ("workloads/*/waypoint/hboneMtlsPort", Number, Always),
    ("workloads/*/networkGateway", Map, Filled),
    ("workloads/*/networkGateway/destination", Text, Always),
    ("workloads/*/networkGateway/hboneMtlsPort", Number, Always),
    ("workloads/*/protocol", Text, Always),
    ("workloads/*/networkMode", Text, Always),
    ("workloads/*/uid", Text, Always),
    ("workloads/*/name", Text, Filled),
    ("workloads/*/namespace", Text, Filled),
    ("workloads/*/trustDomain", Text, Filled),
    ("workloads/*/serviceAccount", Text, Filled),
    ("workloads/*/network", Text, Filled),
    ("workloads/*/workloadName", Text, Filled),
    ("workloads/*/workloadType", Text, Filled),
    ("workloads/*/canonicalName", Text, Filled),
    ("workloads/*/canonicalRevision", Text, Filled),
    ("workloads/*/hostname", Text, Filled),
    ("workloads/*/node", Text, Filled),
    ("workloads/*/nativeTunnel", Flag, Filled),
    ("workloads/*/applicationTunnel", Map, Filled),
    ("workloads/*/applicationTunnel/protocol", Text, Always),
    ("workloads/*/applicationTunnel/port", Number, Filled),
    ("workloads/*/authorizationPolicies", List, Filled),
    ("workloads/*/authorizationPolicies/*", Text, Always),
    ("workloads/*/status", Text, Always),
    ("workloads/*/clusterId", Text, Filled),
    ("workloads/*/locality", Map, Filled),
    ("workloads/*/locality/region", Text, Filled),
    ("workloads/*/locality/zone", Text, Filled),
    ("workloads/*/locality/subzone", Text, Filled),
    ("workloads/*/services", List, Filled),
    ("workloads/*/services/*", Text, Always),
    ("workloads/*/capacity", Number, Always),
    ("services/*/name", Text, Always),
    ("services/*/namespace", Text, Always),
    ("services/*/hostname", Text, Always),
    ("services/*/vips", List, Always),
    ("services/*/vips/*", Text, Always),
    ("services/*/cidrVips", List, Filled),
    ("services/*/cidrVips/*/network", Text, Always),
    ("services/*/cidrVips/*/cidr", Text, Always),
    ("services/*/ports", Map, Always),
    ("services/*/ports/*", Number, Always),
    ("services/*/endpoints", Map, Always),
    ("services/*/endpoints/*/workloadUid", Text, Always),
    ("services/*/endpoints/*/port", Map, Always),
    ("services/*/endpoints/*/port/*", Number, Always),
    ("services/*/endpoints/*/status", Text, Always),
    ("services/*/subjectAltNames", List, Always),
    ("services/*/waypoint", Map, Filled),
    ("services/*/waypoint/destination", Text, Always),
    ("services/*/waypoint/hboneMtlsPort", Number, Always),
    ("services/*/weightedWaypoints", List, Filled),
    ("services/*/weightedWaypoints/*/destination", Map, Always),
    ("services/*/weightedWaypoints/*/weight", Number, Always),
    ("services/*/loadBalancer", Map, Filled),
    ("services/*/loadBalancer/routingPreferences", List, Always),
    ("services/*/loadBalancer/mode", Text, Always),
    ("services/*/loadBalancer/healthPolicy", Text, Always),
    ("services/*/ipFamilies", Text, Filled),
    ("services/*/canonical", Flag, Always),
    ("services/*/visibility", Text, Always),
    ("policies/*/name", Text, Always),
    ("policies/*/namespace", Text, Always),
    ("policies/*/scope", Text, Always),
    ("policies/*/action", Text, Always),
    ("policies/*/rules", List, Always),
    ("policies/*/rules/*/*/*/namespaces", List, Filled),
    ("policies/*/rules/*/*/*/notNamespaces", List, Filled),
    ("policies/*/rules/*/*/*/principals", List, Filled),
    ("policies/*/rules/*/*/*/notPrincipals", List, Filled),
    ("policies/*/rules/*/*/*/sourceIps", List, Filled),
    ("policies/*/rules/*/*/*/notSourceIps", List, Filled),
    ("policies/*/rules/*/*/*/destinationIps", List, Filled),
    ("policies/*/rules/*/*/*/notDestinationIps", List, Filled),
    ("policies/*/rules/*/*/*/destinationPorts", List, Filled),
    ("policies/*/rules/*/*/*/notDestinationPorts", List, Filled),
    ("policies/*/rules/*/*/*/serviceAccounts", List, Filled),
    ("policies/*/rules/*/*/*/notServiceAccounts", List, Filled),
    ("policies/*/rules/*/*/*/principals/*/Exact", Text, Filled),
    ("policies/*/rules/*/*/*/principals/*/Prefix", Text, Filled),
    ("policies/*/rules/*/*/*/principals/*/Suffix", Text, Filled),
    ("policies/*/rules/*/*/*/principals/*/Presence", List, Filled),
    ("policies/*/dryRun", Flag, Always),
    ("stagedServices/*/*/workloadUid", Text, Always),
    ("stagedServices/*/*/port", Map, Always),
    ("stagedServices/*/*/status", Text, Always),
    ("certificates/*/identity", Text, Always),
    ("certificates/*/state", Text, Always),
    ("certificates/*/certChain", List, Always),
    ("certificates/*/rootCerts", List, Always),
    ("certificates/*/certChain/*/pem", Text, Always),
    ("certificates/*/certChain/*/serialNumber", Text, Always),
    ("certificates/*/certChain/*/validFrom", Text, Always),
    ("certificates/*/certChain/*/expirationTime", Text, Always),
    ("certificates/*/rootCerts/*/pem", Text, Always),
    ("certificates/*/rootCerts/*/serialNumber", Text, Always),
    ("certificates/*/rootCerts/*/validFrom", Text, Always),
    ("certificates/*/rootCerts/*/expirationTime", Text, Always),
    ("workloadState/*/state", Text, Always),
    ("workloadState/*/connections", Map, Always),
    ("workloadState/*/connections/inbound", List, Always),
    ("workloadState/*/connections/outbound", List, Always),
    ("workloadState/*/connections/inbound/*/src", Text, Always),
    ("workloadState/*/connections/inbound/*/originalDst", Maybe, Always),
    ("workloadState/*/connections/inbound/*/actualDst", Text, Always),
    ("workloadState/*/connections/inbound/*/protocol", Text, Always),
    ("workloadState/*/connections/outbound/*/src", Text, Always),
    ("workloadState/*/connections/outbound/*/originalDst", Text, Always),
    ("workloadState/*/connections/outbound/*/actualDst", Text, Always),
    ("workloadState/*/connections/outbound/*/protocol", Text, Always),
    ("workloadState/*/info", Map, Always),
    ("workloadState/*/info/name", Text, Always),
    ("workloadState/*/info/namespace", Text, Always),
    ("workloadState/*/info/serviceAccount", Text, Always),
    ("workloadState/*/capture", Map, Ours),
    ("workloadState/*/capture/by", Text, Ours),
    ("workloadState/*/capture/state", Text, Ours),
    ("workloadState/*/capture/originalSource", Flag, Ours),
    ("staticConfig/workloads", List, Always),
    ("staticConfig/services", List, Always),
    ("staticConfig/policies", List, Always),
    ("version/version", Text, Always),
    ("version/gitRevision", Text, Always),
    ("version/rustVersion", Text, Always),
    ("version/buildProfile", Text, Always),
    ("version/buildStatus", Text, Always),
    ("version/istioVersion", Text, Always),
    ("version/cryptoProvider", Text, Always),
];

/// Values that are words: all that the two dumps say there.
const WORDS: &[(&str, &[&str])] = &[
    ("workloads/*/protocol", &["HBONE", "TCP"]),
    ("workloads/*/networkMode", &["HostNetwork", "Standard"]),
    ("workloads/*/status", &["Healthy", "Unhealthy"]),
    ("workloads/*/workloadType", &["deployment", "pod"]),
    ("workloads/*/applicationTunnel/protocol", &["PROXY"]),
    ("workloads/*/waypoint/destination", &["lab/wide.lab.svc.cluster.local"]),
    ("workloads/*/networkGateway/destination", &["far/10.96.9.9"]),
    ("services/*/visibility", &["Namespace", "Public"]),
    ("services/*/ipFamilies", &["Dual", "IPv4"]),
    ("services/*/cidrVips/*/cidr", &["10.97.0.0/16"]),
    ("services/*/loadBalancer/mode", &["Failover"]),
    ("services/*/loadBalancer/healthPolicy", &["AllowAll"]),
    ("services/*/loadBalancer/routingPreferences/*", &["Network", "Region"]),
    ("policies/*/scope", &["Global", "Namespace", "WorkloadSelector"]),
    ("policies/*/action", &["Allow", "Deny"]),
    ("policies/*/rules/*/*/*/sourceIps/*", &["10.0.0.0/8"]),
    ("certificates/*/state", &["Available"]),
    ("workloadState/*/state", &["Up"]),
    ("workloadState/*/connections/inbound/*/protocol", &["HBONE", "TCP"]),
    ("workloadState/*/connections/outbound/*/protocol", &["HBONE", "TCP"]),
    ("workloadState/*/capture/by", &["ebpf"]),
    ("workloadState/*/capture/state", &["Captured"]),
    ("version/istioVersion", &[RELEASE, "unknown"]),
    ("version/cryptoProvider", &["aws-lc"]),
];

/// What is at the path, with whether there is something at all above it.
fn at<'a>(value: &'a Value, path: &str) -> Vec<&'a Value> {
    path.split('/').fold(vec![value], |found, part| {
        let below = |value: &'a Value| -> Vec<&'a Value> {
            match (part, value) {
                ("*", Value::Array(list)) => list.iter().collect(),
                ("*", Value::Object(map)) => map.values().collect(),
                (key, Value::Object(map)) => map.get(key).into_iter().collect(),
                _ => Vec::new(),
            }
        };
        found.into_iter().flat_map(below).collect()
    })
}

fn is(kind: Kind, value: &Value) -> bool {
    match kind {
        Text => value.is_string(),
        Number => value.is_u64(),
        Flag => value.is_boolean(),
        List => value.is_array(),
        Map => value.is_object(),
        Maybe => value.is_string() || value.is_null(),
    }
}

/// The maps whose keys are a contract: those that a path of the table goes through by name.
fn parents() -> BTreeMap<&'static str, BTreeSet<&'static str>> {
    let mut parents: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    for (path, ..) in KEYS {
        let (parent, key) = path.rsplit_once('/').unwrap_or(("", path));
        if key != "*" {
            parents.entry(parent).or_default().insert(key);
        }
    }
    parents
}

/// Both dumps with all kinds of connections open.
fn dumps(world: &World) -> [Value; 2] {
    let scene = &world.scene;
    let echo = || scene.client.tcp(web(TCP)[0], &["echo", "x"])?.ok();
    wait::retry("an echo", SOON, echo).unwrap();
    let hold = |from: &mesh_tests::Pod, to: std::net::SocketAddr| {
        let mut open = from.spawn(["tcp", &to.to_string(), "hold"]).unwrap();
        open.says("open", SOON).unwrap();
        open
    };
    let outside = std::net::SocketAddr::new(scene.outsider.v4(), TCP);
    let _open = [
        hold(&scene.client, web(TCP)[0]),
        hold(&scene.client, outside),
        hold(&scene.outsider, scene.server_at(TCP)[0]),
    ];
    let full = |direction: &'static str| {
        move |dump: &Value| {
            at(dump, &format!("workloadState/*/connections/{direction}/*")).len() == 2
        }
    };
    [(&scene.a, "outbound"), (&scene.b, "inbound")].map(|(node, direction)| {
        node.with_proxy(|proxy| {
            proxy.wait_dump(&format!("two connections {direction}"), full(direction))?;
            proxy.config_dump()
        })
        .unwrap()
    })
}

/// What of the dumps is not as the tables say.
fn faults(dumps: &[Value; 2]) -> Vec<String> {
    let mut faults = Vec::new();
    for (path, kind, when) in KEYS {
        let (parent, key) = path.rsplit_once('/').unwrap_or(("", path));
        let found: Vec<_> = dumps.iter().flat_map(|dump| at(dump, path)).collect();
        if found.is_empty() {
            faults.push(format!("{path}: nowhere"));
        }
        for wrong in found.iter().filter(|value| !is(*kind, value)) {
            faults.push(format!("{path}: not {kind:?}: {wrong}"));
        }
        if *when != Filled && key != "*" && !parent.is_empty() {
            let above = dumps.iter().flat_map(|dump| at(dump, parent));
            for lacking in above.filter(|value| value.get(key).is_none()) {
                faults.push(format!("{path}: not in {lacking:.80}"));
            }
        }
    }
    for (parent, keys) in parents() {
        let maps = dumps
            .iter()
            .flat_map(|dump| if parent.is_empty() { vec![dump] } else { at(dump, parent) });
        for key in maps.filter_map(Value::as_object).flat_map(|map| map.keys()) {
            if !keys.contains(key.as_str()) {
                faults.push(format!("{parent}/{key}: not in the table"));
            }
        }
    }
    for (path, words) in WORDS {
        let said: BTreeSet<_> =
            dumps.iter().flat_map(|dump| at(dump, path)).filter_map(Value::as_str).collect();
        if said != words.iter().copied().collect() {
            faults.push(format!("{path}: {said:?} and not {words:?}"));
        }
    }
    faults.sort();
    faults.dedup();
    faults
}

#[test]
fn every_key_of_the_dump() {
    let mut world = World::start(&[]).unwrap();
    let allow = serde_json::json!([[[{ "destinationPorts": [TCP] }]]]);
    world.scene.mesh.policy("allow", "Allow", &allow);
    world.scene.apply_policy("allow").unwrap();
    let dumps = dumps(&world);
    let faults = faults(&dumps);
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    assert_eq!(world.ads.refused(), Vec::<String>::new());
    sorted(&dumps);
    // What is local is shown as such, and what is not is not.
    let [remote, local] = &dumps;
    assert!(at(remote, "staticConfig/workloads/*").is_empty());
    assert_eq!(local["staticConfig"]["workloads"], local["workloads"]);
}

fn sorted(dumps: &[Value; 2]) {
    for dump in dumps {
        for (list, key) in
            [("workloads", "uid"), ("services", "hostname"), ("certificates", "identity")]
        {
            let keys = at(dump, &format!("{list}/*/{key}"));
            assert!(keys.is_sorted_by_key(|key| key.as_str()), "{list}: {keys:?}");
        }
        let name = |policy: &Value| format!("{}/{}", policy["namespace"], policy["name"]);
        assert!(dump["policies"].as_array().unwrap().is_sorted_by_key(name));
        let text = dump.to_string();
        assert!(!text.contains("PRIVATE") && !text.contains("UFJJVkFURS"), "a key is in the dump");
        assert!(!text.contains("a-secret-token"), "the token is in the dump");
        for number in at(dump, "certificates/*/certChain/*/serialNumber") {
            let number = number.as_str().unwrap();
            assert!(number.bytes().all(|digit| digit.is_ascii_digit()), "{number}");
        }
        for time in ["validFrom", "expirationTime"] {
            for time in at(dump, &format!("certificates/*/certChain/*/{time}")) {
                let time = time.as_str().unwrap();
                assert!(time.len() == 20 && time.ends_with('Z'), "{time}");
            }
        }
    }
}

/// A pod that cannot be captured is in the dump with the reason, and one that cannot be served for now is pending.
#[test]
fn a_pod_that_is_not_captured_says_why() {
    let scene = Scene::bare().unwrap();
    scene.a.start_proxy(&[]).unwrap();
    let rules = ["ip", "route", "add", "local", "default", "dev", "lo", "table", "100"];
    scene.client.run(rules).unwrap().ok().unwrap();
    // Refused, which the agent is told too.
    let _told = scene.a.enrol(&scene.client, "client");
    let uid = scene.client.uid();
    let dump = scene.a.with_proxy(|proxy| {
        proxy.wait_dump("the pod", |dump| dump["workloadState"].get(&uid).is_some())?;
        proxy.config_dump()
    });
    let entry = &dump.unwrap()["workloadState"][&uid];
    assert_eq!(entry["state"], "Pending", "{entry}");
    assert_eq!(entry["info"]["name"], "client", "{entry}");
    assert_eq!(entry["capture"]["state"], "Failed", "{entry}");
    assert!(entry["capture"]["reason"].as_str().unwrap().contains("100"), "{entry}");
    assert!(entry.get("connections").is_none(), "only what is up has connections: {entry}");
    let metrics = scene.a.with_proxy(|proxy| proxy.metrics()).unwrap();
    assert!(metrics.sum("workload_manager_pending_proxy_count", &[]) > 0.5);
}

/// Method, path, status, a part of the body.
const PATHS: &[(&str, &str, u16, &str)] = &[
    ("GET", "/", 200, "config_dump"),
    ("POST", "/", 405, ""),
    ("GET", "/config_dump", 200, "\"workloads\""),
    ("POST", "/config_dump", 200, "\"workloads\""),
    ("GET", "/logging", 405, ""),
    ("PUT", "/logging", 405, ""),
    ("POST", "/logging", 200, "current log level is info\n"),
    ("POST", "/logging?level=debug", 200, "current log level is debug"),
    ("POST", "/logging?level=access%3Dtrace,xds=off", 200, "access=trace,xds=off"),
    // As istioctl's examples have it, which upstream rejects.
    ("POST", "/logging?level=access:info", 200, "access=info"),
    ("POST", "/logging?level=warn&reset", 200, "current log level is warn\n"),
    ("POST", "/logging?reset", 200, "current log level is info\n"),
    ("POST", "/logging?level=", 400, "usage"),
    ("POST", "/logging?level=loud", 400, "usage"),
    ("POST", "/logging?level=access=loud", 400, "usage"),
    ("POST", "/logging?unknown=1", 400, "usage"),
    // Where we differ: no profiler inside.
    ("GET", "/debug/pprof/profile", 501, "perf record"),
    ("GET", "/debug/pprof/profile?seconds=1", 501, "perf record"),
    ("GET", "/debug/pprof/heap", 501, "smaps_rollup"),
    ("GET", "/debug/pprof/heap/profiling?activate=true", 501, "smaps_rollup"),
    ("GET", "/nothing", 404, ""),
    ("GET", "/quitquitquit", 405, ""),
    ("POST", "/quitquitquit", 200, "shutdown now"),
];

#[test]
fn every_path_of_the_admin_port() {
    let scene = Scene::bare().unwrap();
    scene.a.start_proxy(&[]).unwrap();
    for (method, path, status, part) in PATHS {
        let answer = scene.a.with_proxy(|proxy| proxy.admin(method, path)).unwrap();
        assert_eq!(answer.status, *status, "{method} {path}: {}", answer.body);
        assert!(answer.body.contains(part), "{method} {path}: {}", answer.body);
    }
    let code = scene.a.with_proxy(|proxy| proxy.program().wait(SOON)).unwrap();
    assert_eq!(code, 0);
}

/// On the control plane's first word it is ready, and not before.
#[test]
fn readiness_waits_for_the_control_plane() {
    let scene = Scene::bare().unwrap();
    // Nobody listens there.
    let settings = [("LOCAL_XDS_PATH", ""), ("XDS_ADDRESS", "http://127.0.0.1:9")];
    let proxy = scene.a.begin_proxy(&settings).unwrap();
    let waits = wait::until("what it waits for", SOON, || {
        // The CNI agent is there, and is left alone as long as nothing is known.
        Ok(proxy.readiness().ok())
    });
    let waits = waits.unwrap();
    let pending = "not ready, pending: state manager, workload proxy manager\n";
    assert_eq!((waits.status, waits.body.as_str()), (500, pending));
    let head = http::get(scene.a.namespace(), 15021, "/healthz/ready").unwrap().head;
    assert!(head.to_ascii_lowercase().contains("content-type: text/plain"), "{head}");
}
