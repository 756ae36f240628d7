//! The bed, seen from within: kubectl, pods and what runs in them, the node proxies.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::{
    Program,
    netns::Namespace,
    program::{Finished, Start},
    proxy::Proxy,
    realmesh,
    wait::{self, SOON},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use super::words;

/// Where the API server and istiod are reached.
const HOST: &str = "192.0.2.1";
const NODES: [(&str, &str); 2] = [("node-a", HOST), ("node-b", "192.0.2.6")];
/// Kubernetes takes its time to start pods on two cores.
pub(super) const KUBERNETES: Duration = Duration::from_secs(90);

/// A node and its proxy.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) name: &'static str,
    address: &'static str,
    pub(super) namespace: Namespace,
    proxy: Option<Proxy>,
}

/// Two nodes of a cluster.
#[derive(Debug)]
pub(super) struct Bed {
    bin: PathBuf,
    run: PathBuf,
    ztunnel: PathBuf,
    pub(super) nodes: [Node; 2],
}

/// A pod that runs.
#[derive(Clone, Debug)]
pub(super) struct KubePod {
    pub(super) name: String,
    pub(super) address: String,
    pub(super) node: String,
    /// What istio-cni says of it.
    pub(super) enrolled: bool,
    pub(super) restarts: u64,
}

impl Node {
    pub(super) fn proxy(&self) -> Result<&Proxy> {
        self.proxy.as_ref().with_context(|| format!("no node proxy on {}", self.name))
    }
}

impl Bed {
    pub(super) fn new(bin: &Path, run: &Path, ztunnel: Option<&Path>) -> Result<Self> {
        let node = |(name, address)| -> Result<Node> {
            let namespace = Namespace::open(name)?;
            Ok(Node { name, address, namespace, proxy: None })
        };
        let [a, b] = NODES.map(node);
        let ztunnel = match ztunnel {
            Some(theirs) => theirs.canonicalize()?,
            None => mesh_tests::internal::ztunnel_in(run)?,
        };
        Ok(Self { bin: bin.to_owned(), run: run.to_owned(), ztunnel, nodes: [a?, b?] })
    }

    /// The accounts and pods that the node proxies' tokens are bound to, and the proxies.
    pub(super) fn start(&mut self) -> Result<String> {
        self.kubectl(&["wait", "--for=condition=Ready", "node", "--all", "--timeout=60s"])?;
        let mut objects = String::from(
            "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: ztunnel, namespace: istio-system}\n",
        );
        for (name, _) in NODES {
            write!(
                objects,
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: ztunnel-{name}, namespace: istio-system, \
                 labels: {{app: ztunnel, istio.io/dataplane-mode: none}}}}\nspec: {{serviceAccountName: ztunnel, \
                 nodeName: {name}, hostNetwork: true, terminationGracePeriodSeconds: 1, \
                 containers: [{{name: z, image: \"lab.test/app:1\", imagePullPolicy: Never}}]}}\n"
            )?;
        }
        self.apply(&objects)?;
        for index in 0..self.nodes.len() {
            self.start_proxy(index)?;
        }
        Ok("istiod has signed on both; istio-cni has handed over its snapshot".to_owned())
    }

    /// Starts the node proxy of a node, and waits until it is ready.
    pub(super) fn start_proxy(&mut self, index: usize) -> Result<()> {
        let (bin, run, ztunnel) = (&self.bin, &self.run, &self.ztunnel);
        let node = self.nodes.get_mut(index).context("no such node")?;
        let folder = run.join(node.name).join("ztunnel");
        fs::create_dir_all(&folder)?;
        let pod = format!("ztunnel-{}", node.name);
        let token = folder.join("token");
        let said = kube(
            run,
            &bin.join("lab"),
            &["token", "-n", "istio-system", "-sa", "ztunnel", "-pod", &pod, "-aud", "istio-ca"],
        )?;
        fs::write(&token, said)?;
        let text = |path: PathBuf| path.to_string_lossy().into_owned();
        let istiod = format!("https://{HOST}:15012");
        let settings = [
            ("INPOD_UDS", text(run.join(node.name).join("zt/ztunnel.sock"))),
            ("XDS_ADDRESS", istiod.clone()),
            ("CA_ADDRESS", istiod),
            ("XDS_ROOT_CA", text(run.join("root.pem"))),
            ("CA_ROOT_CA", text(run.join("root.pem"))),
            ("ALT_XDS_HOSTNAME", "istiod.istio-system.svc".to_owned()),
            ("ALT_CA_HOSTNAME", "istiod.istio-system.svc".to_owned()),
            ("AUTH_TOKEN", text(token)),
            ("CLUSTER_ID", "Kubernetes".to_owned()),
            ("NODE_NAME", node.name.to_owned()),
            ("POD_NAME", pod),
            ("POD_NAMESPACE", "istio-system".to_owned()),
            ("SERVICE_ACCOUNT", "ztunnel".to_owned()),
            ("INSTANCE_IP", node.address.to_owned()),
            ("ZTUNNEL_WORKER_THREADS", "2".to_owned()),
            ("RUST_BACKTRACE", "1".to_owned()),
        ]
        .map(|(key, value)| (key.to_owned(), value));
        node.proxy = None;
        let proxy = Proxy::of(&node.namespace, &folder, node.name, ztunnel, settings.into())?;
        proxy.wait_ready(KUBERNETES)?;
        node.proxy = Some(proxy);
        Ok(())
    }

    /// Kills the node proxy of a node.
    pub(super) fn kill_proxy(&mut self, index: usize) -> Result<()> {
        self.nodes.get_mut(index).context("no such node")?.proxy = None;
        Ok(())
    }

    /// All that the checks need, up and enrolled.
    pub(super) fn populate(&self) -> Result<String> {
        let shop = realmesh::folder()?.join("mesh/shop.yaml");
        self.kubectl(&["apply", "--server-side", "-f", &shop.to_string_lossy()])?;
        for (namespace, name) in [
            ("shop", "client"),
            ("shop", "other"),
            ("shop", "server"),
            ("shop", "guarded"),
            ("shop", "wp-stand-in"),
            ("outside", "legacy"),
            ("moving", "mover"),
        ] {
            let deployment = format!("deployment/{name}");
            self.kubectl(&["-n", namespace, "rollout", "status", &deployment, "--timeout=90s"])?;
        }
        wait::until("istio-cni to enrol the pods", KUBERNETES, || {
            let pods = self.pods("shop", None)?;
            let waiting = |pod: &&KubePod| !pod.enrolled && !pod.name.starts_with("wp");
            Ok((pods.iter().find(waiting).is_none() && pods.len() >= 6).then_some(()))
        })?;
        for namespace in ["outside", "moving"] {
            let pods = self.pods(namespace, None)?;
            ensure!(pods.iter().all(|pod| !pod.enrolled), "{namespace} is enrolled unasked");
        }
        Ok("the pods of namespace shop are enrolled by its label alone, the others are not".into())
    }

    /// Runs kubectl.
    pub(super) fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        let all: Vec<&str> = ["kubectl"].into_iter().chain(arguments.iter().copied()).collect();
        kube(&self.run, &self.bin.join("kube"), &all)
    }

    /// Runs istioctl.
    pub(super) fn istioctl(&self, arguments: &[&str]) -> Result<String> {
        kube(&self.run, &self.bin.join("istioctl"), arguments)
    }

    /// Asks istiod for a certificate of this identity with the token of the first node's proxy.
    pub(super) fn certificate(&self, identity: &str) -> Result<String> {
        let root = self.run.join("root.pem");
        let token = format!("@{}", self.run.join("node-a/ztunnel/token").display());
        let address = format!("{HOST}:15012");
        let root = root.to_string_lossy();
        let asked = ["csr", "-addr", &address, "-ca", &root, "-token", &token, "-id", identity];
        kube(&self.run, &self.bin.join("lab"), &asked)
    }

    /// Kills istiod.
    pub(super) fn kill_istiod(&self) -> Result<()> {
        let process = fs::read_to_string(self.run.join("istiod.pid"))?.trim().parse()?;
        Ok(kill(Pid::from_raw(process), Signal::SIGKILL)?)
    }

    /// Applies objects.
    pub(super) fn apply(&self, objects: &str) -> Result<()> {
        self.objects(&["apply", "--server-side"], objects)
    }

    /// Deletes objects.
    pub(super) fn delete(&self, objects: &str) -> Result<()> {
        self.objects(&["delete", "--ignore-not-found", "--wait=false"], objects)
    }

    fn objects(&self, verb: &[&str], objects: &str) -> Result<()> {
        let file = self.run.join("objects.yaml");
        fs::write(&file, objects)?;
        let file = file.to_string_lossy();
        let all: Vec<&str> = verb.iter().copied().chain(["-f", &file]).collect();
        self.kubectl(&all).map(drop)
    }

    /// The pods of a namespace that are ready and not on their way out, of one app or all.
    pub(super) fn pods(&self, namespace: &str, app: Option<&str>) -> Result<Vec<KubePod>> {
        let said = self.kubectl(&["-n", namespace, "get", "pods", "-o", "json"])?;
        let list: Value = serde_json::from_str(&said)?;
        let items = list.get("items").and_then(Value::as_array).cloned().unwrap_or_default();
        let at =
            |pod: &Value, path: &str| pod.pointer(path).and_then(Value::as_str).map(str::to_owned);
        let mut pods = Vec::new();
        for pod in &items {
            let of = at(pod, "/metadata/labels/app");
            let ready =
                pod.pointer("/status/containerStatuses/0/ready") == Some(&Value::Bool(true));
            let leaving = pod.pointer("/metadata/deletionTimestamp").is_some();
            if !ready || leaving || app.is_some_and(|app| of.as_deref() != Some(app)) {
                continue;
            }
            let annotation = at(pod, "/metadata/annotations/ambient.istio.io~1redirection");
            let restarts = pod.pointer("/status/containerStatuses/0/restartCount");
            pods.push(KubePod {
                name: at(pod, "/metadata/name").context("a pod without a name")?,
                address: at(pod, "/status/podIP").context("a pod without an address")?,
                node: at(pod, "/spec/nodeName").context("a pod without a node")?,
                enrolled: annotation.as_deref() == Some("enabled"),
                restarts: restarts.and_then(Value::as_u64).unwrap_or_default(),
            });
        }
        Ok(pods)
    }

    /// The pod of an app that has but one.
    pub(super) fn pod(&self, namespace: &str, app: &str) -> Result<KubePod> {
        let pods = self.pods(namespace, Some(app))?;
        pods.into_iter().next().with_context(|| format!("no pod of {app} is ready"))
    }

    /// The server's pods, that of the first node first.
    pub(super) fn servers(&self) -> Result<[KubePod; 2]> {
        let mut pods = self.pods("shop", Some("server"))?;
        pods.sort_by(|a, b| a.node.cmp(&b.node));
        let count = pods.len();
        <[KubePod; 2]>::try_from(pods).ok().with_context(|| format!("{count} servers, not 2"))
    }

    /// The virtual address of a Service.
    pub(super) fn vip(&self, namespace: &str, name: &str) -> Result<String> {
        self.kubectl(&["-n", namespace, "get", "service", name, "-o", "jsonpath={.spec.clusterIP}"])
    }

    /// Starts the program of the image in a pod: `get`, `loop`, `hold`.
    pub(super) fn exec(&self, pod: &KubePod, arguments: &[&str]) -> Result<Program> {
        let process = process_of(&pod.name)?.to_string();
        let enter = ["nsenter", "-t", &process, "-m", "-n", "/app"];
        let command = words(&enter).into_iter().chain(words(arguments));
        let [node, _] = &self.nodes;
        Start::new(&node.namespace, &self.run, command).spawn()
    }

    /// One request from a pod, as the answer's JSON.
    pub(super) fn get(&self, pod: &KubePod, url: &str) -> Result<Value> {
        let Finished { code, out, err } = self.exec(pod, &["get", url])?.finish(SOON)?;
        if code != 0 {
            bail!("{}", err.trim().trim_start_matches("app: "));
        }
        serde_json::from_str(&out).with_context(|| format!("not our server's answer: {out}"))
    }

    /// Asks until it is answered.
    pub(super) fn reaches(&self, pod: &KubePod, url: &str) -> Result<Value> {
        wait::retry(&format!("{} to reach {url}", pod.name), SOON, || self.get(pod, url))
    }

    /// Asks until it is refused; what was said then.
    pub(super) fn refused(&self, pod: &KubePod, url: &str) -> Result<String> {
        wait::until(&format!("{} to be refused {url}", pod.name), SOON, || {
            Ok(self.get(pod, url).err().map(|why| why.to_string()))
        })
    }

    /// The node proxy of the pod's node.
    pub(super) fn proxy_of(&self, pod: &KubePod) -> Result<&Proxy> {
        let node = self.nodes.iter().find(|node| node.name == pod.node);
        node.with_context(|| format!("no node {}", pod.node))?.proxy()
    }

    /// What the first node's proxy knows, in a file for istioctl.
    pub(super) fn dump(&self) -> Result<PathBuf> {
        let [node, _] = &self.nodes;
        let file = self.dump_file();
        fs::write(&file, node.proxy()?.admin("GET", "/config_dump")?.body)?;
        Ok(file)
    }

    pub(super) fn dump_file(&self) -> PathBuf {
        self.run.join("config_dump.json")
    }

    pub(super) fn logs(&self) -> impl Iterator<Item = PathBuf> {
        let logs = self.nodes.each_ref().map(|node| {
            mesh_tests::proxy::log_of(&self.run.join(node.name).join("ztunnel"), node.name)
        });
        logs.into_iter()
    }

    /// Copies what tells why a check failed to a folder that stays.
    pub(super) fn save_logs(&self) -> Result<PathBuf> {
        let to = PathBuf::from(format!("{}-logs", self.run.display()));
        fs::create_dir_all(&to)?;
        let mut all: Vec<PathBuf> = self.logs().collect();
        all.extend(["istiod.log", "manager.log"].map(|name| self.run.join(name)));
        all.extend(NODES.map(|(name, _)| self.run.join(name).join("cni.log")));
        for (number, log) in all.iter().enumerate() {
            let name = log.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let _none = fs::copy(log, to.join(format!("{number}-{name}")));
        }
        Ok(to)
    }

    /// Stays until `cargo lab istio-stop` or Ctrl-C ends this process, and the bed with it.
    pub(super) fn stay(&self) -> ! {
        loop {
            wait::pause(Duration::from_secs(3600));
        }
    }
}

fn kube(run: &Path, program: &Path, arguments: &[&str]) -> Result<String> {
    let mut command = std::process::Command::new(program);
    let finished = command.args(arguments).env("KUBECONFIG", run.join("kubeconfig")).output()?;
    if !finished.status.success() {
        let said = String::from_utf8_lossy(&finished.stderr);
        bail!("{} {}: {}", program.display(), arguments.join(" "), said.trim());
    }
    Ok(String::from_utf8(finished.stdout)?)
}

/// A process that serves in the pod: pods are the hosts of their names.
fn process_of(pod: &str) -> Result<u32> {
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(process) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let read = |file: &str| fs::read(entry.path().join(file)).unwrap_or_default();
        let serves = read("cmdline").starts_with(b"/app\0serve\0");
        if serves && read("root/etc/hostname").trim_ascii() == pod.as_bytes() {
            return Ok(process);
        }
    }
    bail!("no process of {pod}")
}
