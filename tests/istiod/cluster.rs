//! istiod with an API server, etcd and a controller manager, all real, and node proxies on nodes that have no kubelet:
//! pods are objects, and where a test needs one to be more, a namespace of the harness.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use mesh_tests::{
    Lab, Node, Pod, Program,
    program::Start,
    realmesh,
    wait::{self, SOON},
    zds::Info,
};
use serde_json::Value;

/// What Kubernetes needs to start, on two cores that others use too.
const START: Duration = Duration::from_secs(180);

/// The one of this process, for as long as a test has it.
static SHARED: Mutex<Weak<Cluster>> = Mutex::new(Weak::new());
/// Tests that have all of it to themselves, and those that have not.
static TURN: RwLock<()> = RwLock::new(());

/// API server, etcd, controller manager and istiod, on a node of their own.
pub(crate) struct Cluster {
    host: String,
    run: PathBuf,
    /// What they run under: they end with it.
    holder: Program,
    control: Node,
    lab: Lab,
}

/// The cluster, and the right to use it: beside others, or alone.
pub(crate) struct Turn<Right> {
    cluster: Arc<Cluster>,
    _right: Right,
}

impl<Right> std::ops::Deref for Turn<Right> {
    type Target = Cluster;
    fn deref(&self) -> &Cluster {
        &self.cluster
    }
}

/// The cluster, beside other tests.
pub(crate) fn beside() -> Turn<RwLockReadGuard<'static, ()>> {
    let cluster = shared();
    Turn { cluster, _right: TURN.read().unwrap_or_else(PoisonError::into_inner) }
}

/// The cluster when no other test uses it, to do to it what others would notice.
pub(crate) fn alone() -> Turn<RwLockWriteGuard<'static, ()>> {
    let cluster = shared();
    Turn { cluster, _right: TURN.write().unwrap_or_else(PoisonError::into_inner) }
}

/// The cluster that there is, or else a new one.
fn shared() -> Arc<Cluster> {
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    shared.upgrade().unwrap_or_else(|| {
        let cluster = Arc::new(Cluster::start().unwrap());
        *shared = Arc::downgrade(&cluster);
        cluster
    })
}

impl Cluster {
    fn start() -> Result<Self> {
        let lab = Lab::new()?;
        let control = lab.node("control")?;
        let host = control.address().0.to_string();
        let run = lab.folder().join("cluster");
        let up = realmesh::folder()?.join("scripts/up.sh");
        realmesh::program("kube")?;
        // In a process namespace of their own they end with its first process, which ends with this one.
        let script = format!(
            "HOST={host} CRDS=crd-experimental {} {} {} && echo it is up && while :; do sleep 3600; done",
            up.display(),
            realmesh::programs().display(),
            run.display(),
        );
        let command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c"];
        let command = command.into_iter().chain([script.as_str()]);
        let mut holder = Start::new(control.namespace(), lab.folder(), command).spawn()?;
        holder.says("it is up", START)?;
        Ok(Self { host, run, holder, control, lab })
    }

    /// Runs one of the bed's programs on the control plane's node; what it says.
    fn program(&self, name: &str, words: &[&str]) -> Result<String> {
        let program = realmesh::program(name)?.to_string_lossy().into_owned();
        let kubeconfig = format!("KUBECONFIG={}", self.run.join("kubeconfig").display());
        let command = ["env", &kubeconfig, &program].into_iter().chain(words.iter().copied());
        let start = Start::new(self.control.namespace(), self.lab.folder(), command);
        start.run(START)?.ok().with_context(|| format!("{name} {}", words.join(" ")))
    }

    /// Runs kubectl.
    pub(crate) fn kubectl(&self, words: &[&str]) -> Result<String> {
        self.program("kube", &[&["kubectl"], words].concat())
    }

    /// Applies objects, with their status.
    pub(crate) fn apply(&self, objects: &str) -> Result<()> {
        self.lab_with("apply", objects)
    }

    /// Applies a file of `tests/realmesh/mesh`.
    pub(crate) fn apply_file(&self, name: &str) -> Result<()> {
        self.apply(&fs::read_to_string(realmesh::folder()?.join("mesh").join(name))?)
    }

    /// Deletes objects, at once.
    pub(crate) fn delete(&self, objects: &str) -> Result<()> {
        self.lab_with("delete", objects)
    }

    fn lab_with(&self, verb: &str, objects: &str) -> Result<()> {
        let name = std::thread::current().id();
        let file = self.lab.folder().join(format!("objects-{name:?}.yaml"));
        fs::write(&file, objects)?;
        self.program("lab", &[verb, "-f", &file.to_string_lossy()]).map(drop)
    }

    /// A token for an account of `istio-system`, bound to a pod if one is named.
    pub(crate) fn token(&self, account: &str, pod: &str, audience: &str) -> Result<String> {
        let words = ["token", "-n", "istio-system", "-sa", account, "-pod", pod, "-aud", audience];
        Ok(self.program("lab", &words)?.trim().to_owned())
    }

    /// Asks istiod for a certificate of this identity, as a node proxy does.
    pub(crate) fn certificate(&self, token: &str, identity: &str) -> Result<String> {
        let (istiod, root) = (format!("{}:15012", self.host), self.root());
        let root = root.to_string_lossy();
        let words = ["csr", "-addr", &istiod, "-ca", &root, "-token", token, "-id", identity];
        self.program("lab", &words)
    }

    /// Has a pod be on a node, as the scheduler would.
    pub(crate) fn bind(&self, namespace: &str, pod: &str, node: &str) -> Result<()> {
        let binding = serde_json::json!({
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": { "name": pod },
            "target": { "apiVersion": "v1", "kind": "Node", "name": node },
        });
        let file = self.lab.folder().join(format!("binding-{pod}.json"));
        fs::write(&file, binding.to_string())?;
        let path = format!("/api/v1/namespaces/{namespace}/pods/{pod}/binding");
        self.kubectl(&["create", "--raw", &path, "-f", &file.to_string_lossy()]).map(drop)
    }

    /// One of istiod's debug pages, which it shows to whoever is on its own machine.
    pub(crate) fn debug(&self, page: &str) -> Result<Value> {
        let url = format!("http://{}:8080/debug/{page}", self.host);
        let command = ["curl", "-sSf", "--interface", "127.0.0.1", &url];
        let said = self.control.run(command)?.ok()?;
        serde_json::from_str(&said).with_context(|| format!("{page}: {said}"))
    }

    /// Kills `istiod` or `apiserver`.
    pub(crate) fn kill(&self, name: &str) -> Result<()> {
        let process = fs::read_to_string(self.run.join(format!("{name}.pid")))?;
        self.inside(&["kill", "-9", process.trim()])
    }

    /// Starts what was killed, and waits until it serves.
    pub(crate) fn restart(&self, name: &str) -> Result<()> {
        let script = realmesh::folder()?.join("scripts/start.sh");
        let host = format!("HOST={}", self.host);
        let (script, bin) = (script.to_string_lossy(), realmesh::programs());
        let (bin, run) = (bin.to_string_lossy(), self.run.to_string_lossy());
        self.inside(&["env", &host, &script, &bin, &run, name])
    }

    /// Runs this where the control plane's processes are.
    fn inside(&self, words: &[&str]) -> Result<()> {
        let holder = self.holder.id();
        let first = fs::read_to_string(format!("/proc/{holder}/task/{holder}/children"))?;
        let enter = ["nsenter", "-t", first.trim(), "-p", "-m"];
        let command = enter.into_iter().chain(words.iter().copied());
        let start = Start::new(self.control.namespace(), self.lab.folder(), command);
        start.run(START)?.ok().map(drop)
    }

    fn root(&self) -> PathBuf {
        self.run.join("root.pem")
    }

    /// Another node, of the harness and of the API server, with the pod that its node proxy's token is bound to.
    pub(crate) fn node(&self, name: &str) -> Result<Node> {
        let node = self.lab.node(name)?;
        self.apply(&format!(
            "apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\n---\n\
             apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: ztunnel, namespace: istio-system}}\n---\n{}",
            object(("istio-system", &proxy_of(name)), (name, &node.address().0.to_string()), "ztunnel")
        ))?;
        Ok(node)
    }

    /// Where the token of the node's proxy is.
    pub(crate) fn token_file(&self, node: &Node) -> PathBuf {
        self.lab.folder().join(format!("token-{}", node.name()))
    }

    /// What the node proxy of a node is told, with a token that is right.
    pub(crate) fn settings(&self, node: &Node) -> Result<Vec<(String, String)>> {
        let (pod, file) = (proxy_of(node.name()), self.token_file(node));
        fs::write(&file, self.token("ztunnel", &pod, "istio-ca")?)?;
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let istiod = format!("https://{}:15012", self.host);
        let name = "istiod.istio-system.svc".to_owned();
        let settings = [
            ("LOCAL_XDS_PATH", String::new()),
            ("LOCAL_CA_DIR", String::new()),
            ("XDS_ADDRESS", istiod.clone()),
            ("CA_ADDRESS", istiod),
            ("XDS_ROOT_CA", text(&self.root())),
            ("CA_ROOT_CA", text(&self.root())),
            ("ALT_XDS_HOSTNAME", name.clone()),
            ("ALT_CA_HOSTNAME", name),
            ("AUTH_TOKEN", text(&file)),
            ("CLUSTER_ID", "Kubernetes".into()),
            ("POD_NAME", pod),
            ("POD_NAMESPACE", "istio-system".into()),
            ("SERVICE_ACCOUNT", "ztunnel".into()),
        ];
        Ok(settings.map(|(key, value)| (key.to_owned(), value)).into())
    }

    /// Starts the node proxy of a node, with these settings as well.
    pub(crate) fn begin(&self, node: &Node, more: &[(&str, &str)]) -> Result<()> {
        let settings = self.settings(node)?;
        let settings = settings.iter().map(|(key, value)| (key.as_str(), value.as_str()));
        let settings: Vec<_> = settings.chain(more.iter().copied()).collect();
        node.start_proxy(&settings)
    }

    /// A pod of the harness that is one of the API server's too. Its namespace and account have to be there.
    pub(crate) fn pod(
        &self,
        node: &Node,
        (namespace, name): (&str, &str),
        account: &str,
    ) -> Result<Pod> {
        let pod = node.pod(name)?;
        self.apply(&object((namespace, name), (node.name(), &pod.v4().to_string()), account))?;
        Ok(pod)
    }

    /// Waits until the two node proxies' streams are in order, by what istiod says: all that was sent is
    /// acknowledged, and nothing refused.
    pub(crate) fn in_order(&self, node: &Node) -> Result<()> {
        let whom = format!("{}.istio-system", proxy_of(node.name()));
        wait::retry(&format!("istiod to have {whom} in order"), SOON, || {
            let all = self.debug("syncz")?;
            let mine = all.as_array().and_then(|all| all.iter().find(|one| one["proxy"] == *whom));
            let resources = mine.and_then(|one| one["resources"].as_object());
            let resources = resources.with_context(|| format!("istiod does not know it: {all}"))?;
            ensure!(resources.len() == 2, "{resources:?}");
            for (kind, of) in resources {
                let acknowledged = of["acked"].is_string() && of["acked"] == of["sent"];
                ensure!(acknowledged && of.get("lastError").is_none(), "{kind}: {of}");
            }
            Ok(())
        })
    }
}

/// The pod of a node's proxy.
fn proxy_of(node: &str) -> String {
    format!("ztunnel-{node}")
}

/// A pod that is ready and enrolled; its app is its name.
pub(crate) fn object(
    (namespace, name): (&str, &str),
    (node, ip): (&str, &str),
    account: &str,
) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: {namespace}\n  labels: {{app: {name}}}\n  \
         annotations: {{ambient.istio.io/redirection: enabled}}\nspec:\n  nodeName: {node}\n  \
         serviceAccountName: {account}\n  containers: [{{name: c, image: c}}]\nstatus:\n  phase: Running\n  \
         podIP: {ip}\n  podIPs: [{{ip: {ip}}}]\n  conditions: [{{type: Ready, status: \"True\"}}]\n---\n"
    )
}

/// A namespace with these accounts.
pub(crate) fn namespace(name: &str, accounts: &[&str]) -> String {
    let mut all = format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}}}\n---\n");
    for account in accounts {
        all += &format!(
            "apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {account}, namespace: {name}}}\n---\n"
        );
    }
    all
}

/// Enrols a pod of the harness, as what the API server knows it.
pub(crate) fn enrol(node: &Node, pod: &Pod, namespace: &str, account: &str) -> Result<()> {
    let info = Info {
        name: pod.name().to_owned(),
        namespace: namespace.to_owned(),
        service_account: account.to_owned(),
    };
    node.zds().add(&pod.uid(), info, pod.namespace())
}
