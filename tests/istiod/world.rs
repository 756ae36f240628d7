//! A scene whose mesh is istiod's, in one process without an API server (`tests/realmesh/cmd/fakeistiod`).

use std::{
    fmt::Write as _,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Result, ensure};
use mesh_tests::{
    Node, Pod, Program, Scene,
    program::Start,
    realmesh,
    scene::{TCP, web},
    topology::NAMESPACE,
    wait::{self, SOON},
};
use serde_json::Value;

const CONTROL: u16 = 15014;
const TLS: u16 = 15012;

/// A scene whose mesh is istiod's.
pub(crate) struct World {
    pub(crate) scene: Scene,
    istiod: Option<Program>,
    objects: PathBuf,
    /// Where the node proxies are told that istiod is.
    told: SocketAddr,
}

/// A pod that is ready and enrolled.
pub(crate) fn pod(
    name: &str,
    (node, ip): (&str, String),
    account: &str,
    namespace: &str,
) -> String {
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
    /// With these objects as well, and without node proxies.
    pub(crate) fn new(more: &str) -> Self {
        let scene = Scene::bare().unwrap();
        let objects = scene.lab.folder().join("objects.yaml");
        fs::write(&objects, format!("{}---\n{more}", self::objects(&scene))).unwrap();
        let told = SocketAddr::new(scene.a.address().0, TLS);
        let mut world = Self { scene, istiod: None, objects, told };
        world.start();
        world
    }

    fn root(&self) -> PathBuf {
        self.scene.lab.folder().join("istiod-root.pem")
    }

    /// Where istiod is.
    pub(crate) fn istiod(&self) -> SocketAddr {
        SocketAddr::new(self.scene.a.address().0, TLS)
    }

    /// Has the node proxies believe that istiod is elsewhere.
    pub(crate) fn tell(&mut self, address: SocketAddr) {
        self.told = address;
    }

    /// Starts istiod, and waits until it serves.
    pub(crate) fn start(&mut self) {
        let ip = self.scene.a.address().0;
        let log = self.scene.lab.folder().join("istiod.log");
        let before = fs::metadata(&log).map_or(0, |file| file.len());
        let command = [
            realmesh::program("fakeistiod").unwrap().to_string_lossy().into_owned(),
            "-listen".into(),
            format!("{ip}:15010"),
            "-tls".into(),
            self.istiod().to_string(),
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

    /// Kills istiod.
    pub(crate) fn stop(&mut self) {
        self.istiod = None;
    }

    fn settings(&self, node: &str) -> Vec<(String, String)> {
        let istiod = format!("https://{}", self.told);
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

    /// Starts the node proxies and enrols client and server.
    pub(crate) fn begin(&self, more: &[(&str, &str)]) {
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
    pub(crate) fn change(&self, verb: &str, objects: &str) -> Result<()> {
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

    /// From the client to the server's service, until it answers.
    pub(crate) fn works(&self) {
        self.scene.ask_until(&self.scene.client, web(80)[0]).unwrap();
    }

    /// The same, until it is refused.
    pub(crate) fn refused(&self) {
        wait::until("a refusal", SOON, || {
            Ok(self.scene.ask(&self.scene.client, web(80)[0]).err().map(drop))
        })
        .unwrap();
    }

    /// A connection from the client to the server that exchanges something all the time.
    pub(crate) fn ticking(&self) -> Program {
        let to = web(TCP)[0].to_string();
        let mut open = self.scene.client.spawn(["tcp", &to, "tick", "1000000", "25"]).unwrap();
        open.says("open", SOON).unwrap();
        open
    }
}

/// What its node proxy knows.
pub(crate) fn dump(node: &Node) -> Value {
    node.with_proxy(|proxy| proxy.config_dump()).unwrap()
}

/// The workloads in a dump.
pub(crate) fn uids(dump: &Value) -> Vec<&str> {
    let workloads = dump["workloads"].as_array().unwrap();
    workloads.iter().filter_map(|workload| workload["uid"].as_str()).collect()
}

/// How many responses its node proxy has refused, or parts of them.
pub(crate) fn refusals(node: &Node) -> f64 {
    let metrics = node.with_proxy(|proxy| proxy.metrics()).unwrap();
    let refused = |name: &str| name.contains("nack") || name.contains("rejected_resources");
    metrics.samples().iter().filter(|s| refused(&s.name)).map(|s| s.value).sum()
}
