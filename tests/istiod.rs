//! Contract with a real istiod: its xDS generators and its certificate authority, unmodified, in one
//! process without an API server (`tests/realmesh/cmd/fakeistiod`). Run by `tests/run realmesh`.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use mesh_tests::{
    Node, Pod, Program, Scene,
    program::Start,
    scene::{TCP, web},
    topology::NAMESPACE,
    wait::{self, SOON},
};
use serde_json::Value;

const CONTROL: u16 = 15014;
const CONVERTED: &str = "istio-system/istio_converted_static_strict";

fn built() -> PathBuf {
    let home = std::env::home_dir().unwrap_or_default();
    let bin = home.join(".cache/ambient-mesh/realmesh/bin/fakeistiod");
    assert!(bin.exists(), "no {}: build it by tests/realmesh/scripts/build", bin.display());
    bin
}

/// A scene whose mesh is istiod's.
struct World {
    scene: Scene,
    istiod: Option<Program>,
    objects: PathBuf,
}

fn pod(name: &str, (node, ip): (&str, String), account: &str, namespace: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: {namespace}\n  uid: uid-{name}\n  \
         labels: {{app: {account}}}\n  annotations: {{ambient.istio.io/redirection: enabled}}\nspec:\n  nodeName: {node}\n  \
         serviceAccountName: {account}\n  containers: [{{name: c, image: c}}]\nstatus:\n  phase: Running\n  \
         podIP: {ip}\n  podIPs: [{{ip: {ip}}}]\n  conditions: [{{type: Ready, status: \"True\"}}]\n---\n"
    )
}

/// The scene's pods and service, and the node proxies' own pods.
fn objects(scene: &Scene) -> String {
    let mut all = String::from(
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: istio-system}\n---\n\
         apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\ndata: {mesh: \"\"}\n---\n",
    );
    write!(all, "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {NAMESPACE}}}\n---\n").unwrap();
    for node in ["a", "b"] {
        write!(all, "apiVersion: v1\nkind: Node\nmetadata: {{name: {node}}}\n---\n").unwrap();
        let ip = format!("192.0.2.{}", node.len());
        all += &pod(&format!("ztunnel-{node}"), (node, ip), "ztunnel", "istio-system");
    }
    let of = |pod: &Pod| (pod.node().to_owned(), pod.v4().to_string());
    for (name, place, account) in
        [("client", of(&scene.client), "client"), ("server", of(&scene.server), "server")]
    {
        all += &pod(name, (&place.0, place.1), account, NAMESPACE);
    }
    let vip = web(80)[0].ip();
    write!(
        all,
        "apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: {NAMESPACE}}}\nspec:\n  clusterIP: {vip}\n  \
         clusterIPs: [{vip}]\n  selector: {{app: server}}\n  ports: [{{name: http, port: 80, targetPort: 8080}}, \
         {{name: tcp, port: {TCP}, targetPort: {TCP}}}]\n---\n\
         apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: web-1, namespace: {NAMESPACE}, \
         labels: {{kubernetes.io/service-name: web}}}}\naddressType: IPv4\nports: [{{name: http, port: 8080}}, \
         {{name: tcp, port: {TCP}}}]\nendpoints: [{{addresses: [{}], conditions: {{ready: true}}, \
         targetRef: {{kind: Pod, name: server, namespace: {NAMESPACE}}}}}]\n",
        scene.server.v4()
    )
    .unwrap();
    all
}

impl World {
    fn new(more: &str) -> Self {
        let scene = Scene::bare().unwrap();
        let objects = scene.lab.folder().join("objects.yaml");
        fs::write(&objects, format!("{}---\n{more}", self::objects(&scene))).unwrap();
        let mut world = Self { scene, istiod: None, objects };
        world.start();
        world
    }

    fn root(&self) -> PathBuf {
        self.scene.lab.folder().join("istiod-root.pem")
    }

    /// Starts istiod, and waits until it serves.
    fn start(&mut self) {
        let ip = self.scene.a.address().0;
        let log = self.scene.lab.folder().join("istiod.log");
        let before = fs::metadata(&log).map_or(0, |file| file.len());
        let command = [
            built().to_string_lossy().into_owned(),
            "-listen".into(),
            format!("{ip}:15010"),
            "-tls".into(),
            format!("{ip}:15012"),
            "-control".into(),
            format!("127.0.0.1:{CONTROL}"),
            "-root-out".into(),
            self.root().to_string_lossy().into_owned(),
            "-f".into(),
            self.objects.to_string_lossy().into_owned(),
        ];
        let folder = self.scene.lab.folder().to_owned();
        let start = Start::new(self.scene.a.namespace(), &folder, command).log(&log);
        self.istiod = Some(start.spawn().unwrap());
        let from = usize::try_from(before).unwrap();
        wait::until("istiod to be ready", Duration::from_secs(120), || {
            let said = fs::read_to_string(&log)?;
            let said = said.get(from..).unwrap_or_default();
            Ok(said.contains("ready: xDS").then_some(()))
        })
        .unwrap();
    }

    fn stop(&mut self) {
        self.istiod = None;
    }

    fn settings(&self, node: &str) -> Vec<(String, String)> {
        let istiod = format!("https://{}:15012", self.scene.a.address().0);
        let name = format!("ztunnel-{node}");
        let folder = self.scene.lab.folder();
        let token = folder.join(format!("token-{node}"));
        // What this istiod takes for a service account's token, bound to a pod.
        fs::write(&token, format!("istio-system/ztunnel/{name}/uid-{name}")).unwrap();
        let text = |path: &Path| path.to_string_lossy().into_owned();
        [
            ("LOCAL_XDS_PATH", String::new()),
            ("LOCAL_CA_DIR", String::new()),
            ("XDS_ADDRESS", istiod.clone()),
            ("CA_ADDRESS", istiod),
            ("XDS_ROOT_CA", text(&self.root())),
            ("CA_ROOT_CA", text(&self.root())),
            ("ALT_XDS_HOSTNAME", "istiod.istio-system.svc".into()),
            ("ALT_CA_HOSTNAME", "istiod.istio-system.svc".into()),
            ("AUTH_TOKEN", text(&token)),
            ("CLUSTER_ID", "Kubernetes".into()),
            ("POD_NAME", name),
            ("POD_NAMESPACE", "istio-system".into()),
            ("SERVICE_ACCOUNT", "ztunnel".into()),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into()
    }

    fn begin(&self, more: &[(&str, &str)]) {
        let Scene { a, b, client, server, .. } = &self.scene;
        for (node, name, pod, account) in [(a, "a", client, "client"), (b, "b", server, "server")] {
            let settings = self.settings(name);
            let mut all: Vec<_> =
                settings.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
            all.extend_from_slice(more);
            node.start_proxy(&all).unwrap();
            node.enrol(pod, account).unwrap();
        }
    }

    /// Applies or deletes objects.
    fn change(&self, verb: &str, objects: &str) -> Result<()> {
        let url = format!("http://127.0.0.1:{CONTROL}/{verb}");
        let said = self.scene.a.run([
            "curl",
            "-sS",
            "-f",
            "-X",
            "POST",
            "--data-binary",
            objects,
            &url,
        ])?;
        ensure!(said.is_ok(), "{verb}: {}{}", said.out, said.err);
        Ok(())
    }

    fn works(&self) {
        self.scene.ask_until(&self.scene.client, web(80)[0]).unwrap();
    }

    fn refused(&self) {
        wait::until("a refusal", SOON, || {
            Ok(self.scene.ask(&self.scene.client, web(80)[0]).err().map(drop))
        })
        .unwrap();
    }
}

fn dump(node: &Node) -> Value {
    node.with_proxy(|proxy| proxy.config_dump()).unwrap()
}

fn uids(dump: &Value) -> Vec<&str> {
    let workloads = dump["workloads"].as_array().unwrap();
    workloads.iter().filter_map(|workload| workload["uid"].as_str()).collect()
}

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
    let refused = |node: &Node| {
        let metrics = node.with_proxy(|proxy| proxy.metrics()).unwrap();
        metrics.samples().iter().filter(|s| s.name.contains("nack")).map(|s| s.value).sum::<f64>()
    };
    assert!(refused(&world.scene.a) + refused(&world.scene.b) < 0.5, "something was refused");
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
    let to = web(TCP)[0].to_string();
    let mut open = world.scene.client.spawn(["tcp", &to, "tick", "100000", "25"]).unwrap();
    open.says("open", SOON).unwrap();
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
