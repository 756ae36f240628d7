//! The bed, seen from within: kubectl, pods and what runs in them, the node proxies.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::{
    Program,
    netns::Namespace,
    program::{Finished, Start},
    proxy::Doors,
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
const NODES: [&str; 2] = ["node-a", "node-b"];
/// Where the node proxies are.
const SYSTEM: &str = "istio-system";
/// Kubernetes takes its time to start pods on two cores.
pub(super) const KUBERNETES: Duration = Duration::from_secs(90);

/// A node and the pod of its proxy.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) name: &'static str,
    pub(super) namespace: Namespace,
    proxy: Option<NodeProxy>,
}

/// A node proxy that a `DaemonSet` has started.
#[derive(Debug)]
struct NodeProxy {
    process: u32,
    doors: Doors,
}

/// Two nodes of a cluster.
#[derive(Debug)]
pub(super) struct Bed {
    bin: PathBuf,
    run: PathBuf,
    pub(super) nodes: [Node; 2],
}

/// A pod that runs.
#[derive(Clone, Debug)]
pub(super) struct KubePod {
    pub(super) name: String,
    uid: String,
    pub(super) address: String,
    pub(super) ipv6: String,
    pub(super) node: String,
    /// What istio-cni says of it.
    pub(super) enrolled: bool,
    pub(super) restarts: u64,
}

impl Node {
    /// What its proxy shows.
    pub(super) fn proxy(&self) -> Result<&Doors> {
        let proxy = self.proxy.as_ref().map(|proxy| &proxy.doors);
        proxy.with_context(|| format!("no node proxy on {}", self.name))
    }

    fn process(&self) -> Result<u32> {
        let proxy = self.proxy.as_ref().map(|proxy| proxy.process);
        proxy.with_context(|| format!("no node proxy on {}", self.name))
    }
}

impl Bed {
    pub(super) fn new(bin: &Path, run: &Path) -> Result<Self> {
        let node = |name| -> Result<Node> {
            Ok(Node { name, namespace: Namespace::open(name)?, proxy: None })
        };
        let [a, b] = NODES.map(node);
        Ok(Self { bin: bin.to_owned(), run: run.to_owned(), nodes: [a?, b?] })
    }

    /// The node proxies, as `deploy/ztunnel.yaml` has them.
    pub(super) fn start(&mut self) -> Result<String> {
        self.kubectl(&["wait", "--for=condition=Ready", "node", "--all", "--timeout=60s"])?;
        let overlay = realmesh::folder()?.join("mesh/node-proxy");
        let overlay = overlay.to_string_lossy();
        // The manifest is not below the folder of what is laid over it.
        let anywhere = ["kustomize", "--load-restrictor", "LoadRestrictionsNone", &overlay];
        self.apply(&self.kubectl(&anywhere)?)?;
        self.rolled_out()?;
        self.find_proxies()?;
        Ok("the DaemonSet's pods are ready: istiod has signed on both, istio-cni has handed over its snapshot".to_owned())
    }

    /// Waits until the `DaemonSet` is as it is to be on both nodes.
    pub(super) fn rolled_out(&self) -> Result<()> {
        let status = ["rollout", "status", "daemonset/ztunnel", "--timeout=120s"];
        self.kubectl(&[&["-n", SYSTEM], &status[..]].concat()).map(drop)
    }

    /// Finds the processes of the node proxies, after they may have become others, and waits until they are ready.
    pub(super) fn find_proxies(&mut self) -> Result<()> {
        for name in NODES {
            let proxy = wait::retry(&format!("the node proxy of {name}"), KUBERNETES, || {
                let pod = self.proxy_pod(name)?;
                let process = process_of(&pod.name, b"/usr/local/bin/ztunnel\0")?;
                let log = self.newest_log(&pod)?;
                let doors = Doors::new(&Namespace::of_process(process)?, log);
                let said = doors.readiness()?;
                ensure!(said.status == 200, "{}", said.body.trim());
                Ok(NodeProxy { process, doors })
            })?;
            let node = self.nodes.iter_mut().find(|node| node.name == name);
            node.context("no such node")?.proxy = Some(proxy);
        }
        Ok(())
    }

    /// The pod of a node's proxy.
    pub(super) fn proxy_pod(&self, node: &str) -> Result<KubePod> {
        let pods = self.pods(SYSTEM, Some("ztunnel"))?;
        let mut pods = pods.into_iter().filter(|pod| pod.node == node);
        pods.next().with_context(|| format!("no node proxy of {node} is ready"))
    }

    /// What the newest container of a node proxy's pod has said.
    fn newest_log(&self, pod: &KubePod) -> Result<PathBuf> {
        let folder = format!("{SYSTEM}_{}_{}/istio-proxy", pod.name, pod.uid);
        let folder = self.run.join(&pod.node).join("logs").join(folder);
        let all = fs::read_dir(&folder).with_context(|| folder.display().to_string())?;
        let number = |path: &PathBuf| path.file_stem()?.to_str()?.parse::<u32>().ok();
        let logs = all.flatten().map(|entry| entry.path());
        logs.max_by_key(number).context("it has said nothing yet")
    }

    /// Kills the node proxy of a node, as a process.
    pub(super) fn kill_proxy(&self, node: &str) -> Result<()> {
        let process = i32::try_from(self.node(node)?.process()?)?;
        Ok(kill(Pid::from_raw(process), Signal::SIGKILL)?)
    }

    fn node(&self, name: &str) -> Result<&Node> {
        let node = self.nodes.iter().find(|node| node.name == name);
        node.with_context(|| format!("no node {name}"))
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
        let unasked = self.pods("shop", Some("wp-stand-in"))?;
        ensure!(unasked.iter().all(|pod| !pod.enrolled), "a pod is enrolled against its label");
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

    /// Asks istiod for a certificate of this identity with the token that kubelet has given the first node's proxy.
    pub(super) fn certificate(&self, identity: &str) -> Result<String> {
        let root = self.run.join("root.pem");
        let [node, _] = &self.nodes;
        let token = format!("@/proc/{}/root/var/run/secrets/tokens/istio-token", node.process()?);
        let address = format!("{HOST}:15012");
        let root = root.to_string_lossy();
        let asked = ["csr", "-addr", &address, "-ca", &root, "-token", &token, "-id", identity];
        kube(&self.run, &self.bin.join("lab"), &asked)
    }

    /// Kills a part of the bed: the scripts keep its process there.
    pub(super) fn kill(&self, part: &str) -> Result<()> {
        let process = fs::read_to_string(self.run.join(format!("{part}.pid")))?.trim().parse()?;
        Ok(kill(Pid::from_raw(process), Signal::SIGKILL)?)
    }

    /// Starts it again, by the script that did before.
    pub(super) fn start_again(&self, script: &str, part: &str) -> Result<()> {
        let script = realmesh::folder()?.join("scripts").join(script);
        let (bin, run) = (self.bin.to_string_lossy(), self.run.to_string_lossy());
        kube(&self.run, &script, &[&bin, &run, part]).map(drop)
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
                uid: at(pod, "/metadata/uid").context("a pod without a uid")?,
                address: at(pod, "/status/podIP").context("a pod without an address")?,
                ipv6: at(pod, "/status/podIPs/1/ip").context("a pod without a second address")?,
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

    /// The server's pods, one a node, that of the first node first.
    pub(super) fn servers(&self) -> Result<[KubePod; 2]> {
        let mut pods = self.pods("shop", Some("server"))?;
        pods.sort_by(|a, b| a.node.cmp(&b.node));
        let nodes: Vec<_> = pods.iter().map(|pod| pod.node.as_str()).collect();
        ensure!(nodes == NODES, "the servers are on {nodes:?}");
        <[KubePod; 2]>::try_from(pods).ok().context("not two servers")
    }

    /// The virtual address of a Service.
    pub(super) fn vip(&self, namespace: &str, name: &str) -> Result<String> {
        self.kubectl(&["-n", namespace, "get", "service", name, "-o", "jsonpath={.spec.clusterIP}"])
    }

    /// Starts the program of the image in a pod: `get`, `loop`, `hold`.
    pub(super) fn exec(&self, pod: &KubePod, arguments: &[&str]) -> Result<Program> {
        let process = process_of(&pod.name, b"/app\0serve\0")?.to_string();
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
    pub(super) fn proxy_of(&self, pod: &KubePod) -> Result<&Doors> {
        self.node(&pod.node)?.proxy()
    }

    /// Copies what tells why a check failed to a folder that stays.
    pub(super) fn save_logs(&self) -> Result<PathBuf> {
        let to = PathBuf::from(format!("{}-logs", self.run.display()));
        fs::create_dir_all(&to)?;
        let keep = |from: &Path, name: &str| drop(fs::copy(from, to.join(name)));
        for name in ["istiod.log", "manager.log", "apiserver.log"] {
            keep(&self.run.join(name), name);
        }
        for node in NODES {
            for name in ["cni.log", "kubelet.log"] {
                keep(&self.run.join(node).join(name), &format!("{node}-{name}"));
            }
            for pod in fs::read_dir(self.run.join(node).join("logs"))?.flatten() {
                let proxies = fs::read_dir(pod.path().join("istio-proxy")).into_iter().flatten();
                for (number, log) in proxies.flatten().enumerate() {
                    let pod = pod.file_name().to_string_lossy().into_owned();
                    keep(&log.path(), &format!("{pod}-{number}.log"));
                }
            }
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

/// The process in the pod whose command begins so: pods are the hosts of their names.
fn process_of(pod: &str, command: &[u8]) -> Result<u32> {
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(process) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let read = |file: &str| fs::read(entry.path().join(file)).unwrap_or_default();
        if read("cmdline").starts_with(command)
            && read("root/etc/hostname").trim_ascii() == pod.as_bytes()
        {
            return Ok(process);
        }
    }
    bail!("no process of {pod}")
}
