//! The real `istioctl ztunnel-config` reads our `/config_dump`. Run by `tests/run realmesh`, which builds it.

#![expect(clippy::indexing_slicing, clippy::unwrap_used, reason = "a test may panic")]

#[path = "contract/ads.rs"]
#[expect(dead_code, reason = "the contract's, of which a part is enough")]
mod ads;
#[path = "contract/world.rs"]
#[expect(dead_code, reason = "the contract's, of which a part is enough")]
mod world;

use std::{fs, path::PathBuf, process::Command};

use mesh_tests::{
    mesh::{hostname, identity},
    realmesh,
    scene::{TCP, web},
    wait::{self, SOON},
};
use serde_json::Value;

use crate::world::World;

struct Istioctl {
    program: PathBuf,
    dump: PathBuf,
}

impl Istioctl {
    fn run(&self, arguments: &[&str]) -> String {
        let mut command = Command::new(&self.program);
        command.arg("ztunnel-config").args(arguments).arg("--file").arg(&self.dump);
        // It is not to find any cluster.
        let ran = command.env("KUBECONFIG", "/dev/null").output().unwrap();
        let (out, err) = (String::from_utf8(ran.stdout), String::from_utf8_lossy(&ran.stderr));
        assert!(ran.status.success(), "istioctl {arguments:?}: {err}");
        out.unwrap()
    }

    /// The rows of a summary, by their columns, without the head.
    fn rows(&self, arguments: &[&str]) -> Vec<Vec<String>> {
        let said = self.run(arguments);
        let row = |line: &str| line.split_whitespace().map(str::to_owned).collect();
        said.lines().skip(1).map(row).collect()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let mut arguments = arguments.to_vec();
        arguments.extend(["-o", "json"]);
        serde_json::from_str(&self.run(&arguments)).unwrap()
    }
}

fn row(rows: &[Vec<String>], column: usize, value: &str) -> Vec<String> {
    let found = rows.iter().find(|row| row.get(column).is_some_and(|cell| cell == value));
    assert!(found.is_some(), "no {value} in {rows:?}");
    found.unwrap().clone()
}

#[test]
fn istioctl_reads_the_dump() {
    let program = realmesh::program("istioctl").unwrap();
    let world = World::start(&[]).unwrap();
    let scene = &world.scene;
    wait::retry("an echo", SOON, || scene.client.tcp(web(TCP)[0], &["echo", "x"])?.ok()).unwrap();
    let mut open = scene.client.spawn(["tcp", &web(TCP)[0].to_string(), "hold"]).unwrap();
    open.says("open", SOON).unwrap();
    let [outbound, inbound] = [(&scene.a, "a"), (&scene.b, "b")].map(|(node, name)| {
        let text = node.with_proxy(|proxy| proxy.admin("GET", "/config_dump")).unwrap().body;
        let dump = scene.lab.folder().join(format!("{name}.json"));
        fs::write(&dump, text).unwrap();
        Istioctl { program: program.clone(), dump }
    });
    summaries(&world, &outbound);
    details(&outbound);
    let connection = |of: &Istioctl, workload: &str| row(&of.rows(&["connections"]), 0, workload);
    let seen = connection(&outbound, "client.lab");
    let server = format!("server.lab:{}", mesh_tests::scene::TUNNEL);
    let target = format!("{}:{TCP}", hostname("web"));
    assert_eq!(seen[1], "Outbound");
    assert!(seen[2].starts_with("client.lab:"), "{seen:?}");
    assert_eq!(seen[3..], [server, target, "HBONE".to_owned()], "{seen:?}");
    let seen = connection(&inbound, "server.lab");
    assert_eq!((seen[1].as_str(), seen[2].as_str()), ("Inbound", "server.lab:9000"), "{seen:?}");
    let all = outbound.run(&["all"]);
    for word in ["client", "wide", "everywhere", &identity("client")] {
        assert!(all.contains(word), "{word} in {all}");
    }
}

fn summaries(world: &World, istioctl: &Istioctl) {
    let scene = &world.scene;
    let workloads = istioctl.rows(&["workloads"]);
    let ips = format!("{},{}", scene.client.v4(), scene.client.v6());
    assert_eq!(row(&workloads, 1, "client"), ["lab", "client", &ips, "a", "None", "HBONE"]);
    // By the name of the service that its waypoint is, and by its name where it has no address.
    let wide = row(&workloads, 1, "wide-1");
    assert_eq!(wide, ["lab", "wide-1", "10.9.9.9", "elsewhere", "wide", "HBONE"]);
    assert_eq!(row(&workloads, 1, "named")[2], "localhost");
    let services = istioctl.rows(&["services"]);
    let vips = web(TCP).map(|vip| vip.ip().to_string()).join(",");
    assert_eq!(row(&services, 1, "web"), ["lab", "web", &vips, "None", "1/1"]);
    // Of its one endpoint, none is healthy.
    assert_eq!(row(&services, 1, "wide"), ["lab", "wide", "10.96.9.9", "wide", "0/1"]);
    let policies = istioctl.rows(&["policies"]);
    assert_eq!(row(&policies, 1, "wide"), ["lab", "wide", "Deny", "WorkloadSelector"]);
    assert_eq!(row(&policies, 1, "everywhere")[3], "Global");
    let certificates = istioctl.rows(&["certificates"]);
    let own: Vec<_> = certificates.iter().filter(|row| row[0] == identity("client")).collect();
    let types: Vec<_> = own.iter().map(|row| row[1].as_str()).collect();
    assert_eq!(types, ["Leaf", "Root"], "{certificates:?}");
    for certificate in own {
        assert_eq!(certificate[2..4], ["Available", "true"], "{certificate:?}");
        assert!(certificate[4].bytes().all(|digit| digit.is_ascii_hexdigit()), "{certificate:?}");
    }
}

/// What goes through its own types and back out.
fn details(istioctl: &Istioctl) {
    let workloads = istioctl.json(&["workloads"]);
    let find = |list: &Value, key: &str, value: &str| {
        list.as_array().unwrap().iter().find(|one| one[key] == value).unwrap().clone()
    };
    let wide = find(&workloads, "name", "wide-1");
    for (key, value) in [
        ("uid", "far//Pod/lab/wide-1"),
        ("network", "far"),
        ("trustDomain", "far.example"),
        ("status", "Unhealthy"),
        ("workloadType", "pod"),
        ("canonicalRevision", "v2"),
        ("clusterId", "far"),
    ] {
        assert_eq!(wide[key], value, "{key} in {wide}");
    }
    assert_eq!(wide["networkGateway"]["destination"], "far/10.96.9.9");
    assert_eq!(wide["applicationTunnel"]["port"], 15088);
    assert_eq!(wide["locality"]["subzone"], "s");
    assert_eq!(wide["authorizationPolicies"][0], "lab/wide");
    assert_eq!(wide["capacity"], 3);
    let service = find(&istioctl.json(&["services"]), "name", "wide");
    assert_eq!(service["loadBalancer"]["mode"], "Failover", "{service}");
    assert_eq!(service["ipFamilies"], "IPv4");
    assert_eq!(service["endpoints"]["far//Pod/lab/wide-1"]["port"]["80"], 8081, "{service}");
    let policy = find(&istioctl.json(&["policies"]), "name", "wide");
    let one = &policy["rules"][0][0][0];
    assert_eq!(one["principals"][0]["Exact"], "x", "{policy}");
    assert_eq!(one["notDestinationPorts"][0], 81, "{policy}");
    assert_eq!(one["serviceAccounts"][0]["serviceAccount"], "x", "{policy}");
    let certificates = istioctl.json(&["certificates"]);
    assert_eq!(find(&certificates, "identity", &identity("client"))["state"], "Available");
    let all = istioctl.json(&["all"]);
    for section in ["workloads", "services", "policies", "certificates", "workloadState"] {
        assert!(all.get(section).is_some(), "no {section} in {all:.200}");
    }
}
