//! The machines: nodes on an underlay, pods behind them.
//!
//! ```text
//! pod 10.80.1.10, fd80:1::10 ── eth0 │ v10 ── node 10.77.0.1, fd77::1 ── eth0 │ n1 ── bridge "wire"
//! ```

use std::{
    ffi::OsStr,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result};

use crate::{
    instance::Instance,
    mesh::Mesh,
    netlink::Netlink,
    netns::Namespace,
    program::{Finished, Program, Start},
    proxy::Proxy,
    wait::{self, SOON},
    zds::Zds,
};

/// An instance of the lab: the underlay, and what all its nodes share.
#[derive(Clone, Debug)]
pub struct Lab(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    nodes: Mutex<Vec<Node>>,
    /// Held while a node is made: each gets a number, and routes to all others.
    making: Mutex<()>,
    wire: Namespace,
    ztunnel: PathBuf,
    /// The last to go: it takes away all the rest.
    instance: Instance,
}

impl Lab {
    /// A lab with a name of its own.
    pub fn new() -> Result<Self> {
        Self::named(None, None)
    }

    /// A lab with this name, whose node proxies are this executable and not the one built in.
    pub fn named(id: Option<&str>, ztunnel: Option<&Path>) -> Result<Self> {
        let instance = Instance::begin(id)?;
        let wire = Namespace::create(&instance.name("wire"))?;
        wire.run(|| {
            let netlink = Netlink::open()?;
            netlink.bridge("wire")?;
            netlink.address("wire", GATEWAY.0, 24)?;
            netlink.address("wire", GATEWAY.1, 64)?;
            netlink.up("wire")
        })?;
        let ztunnel = match ztunnel {
            Some(path) => path.canonicalize().context("no such node proxy")?,
            None => crate::internal::ztunnel_in(instance.folder())?,
        };
        for folder in ["programs", "ca", "pins"] {
            std::fs::create_dir(instance.folder().join(folder))?;
        }
        Ok(Self(Arc::new(Inner {
            nodes: Mutex::default(),
            making: Mutex::default(),
            wire,
            ztunnel,
            instance,
        })))
    }

    /// What it is called.
    #[must_use]
    pub fn id(&self) -> &str {
        self.0.instance.id()
    }

    /// Its files.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.0.instance.folder()
    }

    /// Where the node proxies' local certificate authority is.
    #[must_use]
    pub fn ca_folder(&self) -> PathBuf {
        self.folder().join("ca")
    }

    /// The namespace that sees all that nodes send each other.
    #[must_use]
    pub fn wire(&self) -> &Namespace {
        &self.0.wire
    }

    /// The file that the node proxies read the mesh from.
    #[must_use]
    pub fn mesh_file(&self) -> PathBuf {
        self.folder().join("mesh.yaml")
    }

    /// Gives every node proxy this mesh, at once.
    pub fn apply(&self, mesh: &Mesh) -> Result<()> {
        let new = self.folder().join("mesh.new");
        std::fs::write(&new, mesh.yaml())?;
        std::fs::rename(&new, self.mesh_file()).context("cannot write the mesh")
    }

    /// The nodes, in the order of their making.
    #[must_use]
    pub fn nodes(&self) -> Vec<Node> {
        locked(&self.0.nodes).clone()
    }

    /// Another node, with routes to and from the pods of the others.
    pub fn node(&self, name: &str) -> Result<Node> {
        let _making = locked(&self.0.making);
        let number = u8::try_from(self.nodes().len() + 1).context("too many nodes")?;
        let namespace = Namespace::create(&self.0.instance.name(name))?;
        let forward = ["ipv4/ip_forward", "ipv6/conf/all/forwarding"];
        // So that a probe can be sent from an address that is not the node's.
        for key in forward.into_iter().chain(["ipv4/ip_nonlocal_bind", "ipv6/ip_nonlocal_bind"]) {
            namespace.sysctl(key, "1")?;
        }
        let port = format!("n{number}");
        self.0.wire.run(|| {
            let netlink = Netlink::open()?;
            netlink.veth(&port, "eth0", namespace.fd())?;
            netlink.port(&port, "wire")?;
            netlink.up(&port)
        })?;
        let address = [
            IpAddr::from([10, 77, 0, number]),
            IpAddr::from([0xfd77, 0, 0, 0, 0, 0, 0, u16::from(number)]),
        ];
        let [v4, v6] = address;
        namespace.run(|| {
            let netlink = Netlink::open()?;
            netlink.address("eth0", v4, 24)?;
            netlink.address("eth0", v6, 64)?;
            // Where istio-cni would have kubelet's probes come from. No addresses of the node: what is one
            // of its own could be anybody's, and the node proxy refuses to let that pass.
            netlink.taken(PROBE.0)?;
            netlink.taken(PROBE.1)?;
            netlink.up("eth0")?;
            netlink.route((IpAddr::from([0; 4]), 0), Some(GATEWAY.0), "eth0")?;
            netlink.route((IpAddr::from([0; 16]), 0), Some(GATEWAY.1), "eth0")
        })?;
        let zds = Zds::listen(&self.folder().join(format!("{name}.sock")))?;
        let machine = Machine { name: name.to_owned(), number, address, namespace, zds };
        let node = Node {
            machine: Arc::new(machine),
            pods: Arc::new(AtomicU8::new(10)),
            proxy: Arc::default(),
            lab: Folder { root: self.folder().to_owned(), ztunnel: self.0.ztunnel.clone() },
            id: self.0.instance.name(""),
        };
        for other in self.nodes() {
            node.route_to(&other)?;
            other.route_to(&node)?;
        }
        locked(&self.0.nodes).push(node.clone());
        Ok(node)
    }

    /// Waits until these pods reach those, in both families: fresh devices take seconds. Before
    /// anything is enrolled, because it asks for what nobody answers.
    pub fn settle(&self, pods: &[&Pod]) -> Result<()> {
        let nodes = self.nodes();
        for pod in pods {
            for ip in nodes.iter().flat_map(|node| node.machine.address) {
                let reaches = || pod.namespace.run(|| refused(SocketAddr::new(ip, 9)));
                wait::retry(&format!("{} to reach {ip}", pod.name), SOON, reaches)?;
            }
        }
        Ok(())
    }
}

/// Where nodes send what they have no route for: it is seen on the wire, and goes nowhere.
const GATEWAY: (IpAddr, IpAddr) = (
    IpAddr::V4(Ipv4Addr::new(10, 77, 0, 254)),
    IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0xfe)),
);

/// Where probes come from.
pub const PROBE: (IpAddr, IpAddr) = (
    IpAddr::V4(Ipv4Addr::new(169, 254, 7, 127)),
    IpAddr::V6(Ipv6Addr::new(0xfd16, 0x9254, 0x7127, 0x1337, 0xffff, 0xffff, 0xffff, 0xffff)),
);

/// Whether the address is there: it refuses connections.
fn refused(to: SocketAddr) -> Result<()> {
    match TcpStream::connect_timeout(&to, Duration::from_millis(200)) {
        Err(why) if why.kind() == std::io::ErrorKind::ConnectionRefused => Ok(()),
        other => other.map(drop).context("not there"),
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Clone, Debug)]
pub(crate) struct Folder {
    pub(crate) root: PathBuf,
    pub(crate) ztunnel: PathBuf,
}

#[derive(Debug)]
struct Machine {
    name: String,
    number: u8,
    address: [IpAddr; 2],
    namespace: Namespace,
    zds: Zds,
}

/// A node: a router to its pods, and where its node proxy runs.
#[derive(Clone, Debug)]
pub struct Node {
    machine: Arc<Machine>,
    pods: Arc<AtomicU8>,
    proxy: Arc<Mutex<Option<Proxy>>>,
    pub(crate) lab: Folder,
    id: String,
}

impl Node {
    /// Its name, also in the mesh.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.machine.name
    }

    /// Its namespace.
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.machine.namespace
    }

    /// Its address, by family.
    #[must_use]
    pub fn address(&self) -> (IpAddr, IpAddr) {
        let [v4, v6] = self.machine.address;
        (v4, v6)
    }

    /// The CNI agent's side, which its node proxy connects to.
    #[must_use]
    pub fn zds(&self) -> &Zds {
        &self.machine.zds
    }

    /// Another pod on it.
    pub fn pod(&self, name: &str) -> Result<Pod> {
        let (node, number) = (self.machine.number, self.pods.fetch_add(1, Ordering::Relaxed));
        let namespace = Namespace::create(&format!("{}{name}", self.id))?;
        let (v4, gateway4) = (ip4(node, number), ip4(node, 1));
        let (v6, gateway6) = (ip6(node, number), ip6(node, 1));
        let device = format!("v{number}");
        self.machine.namespace.run(|| {
            let netlink = Netlink::open()?;
            netlink.veth(&device, "eth0", namespace.fd())?;
            netlink.address(&device, gateway4, 32)?;
            netlink.address(&device, gateway6, 128)?;
            netlink.up(&device)?;
            netlink.route((v4, 32), None, &device)?;
            netlink.route((v6, 128), None, &device)
        })?;
        namespace.run(|| {
            let netlink = Netlink::open()?;
            netlink.address("eth0", v4, 32)?;
            netlink.address("eth0", v6, 128)?;
            netlink.up("eth0")?;
            netlink.route((gateway4, 32), None, "eth0")?;
            netlink.route((gateway6, 128), None, "eth0")?;
            netlink.route((IpAddr::from([0; 4]), 0), Some(gateway4), "eth0")?;
            netlink.route((IpAddr::from([0; 16]), 0), Some(gateway6), "eth0")
        })?;
        Ok(Pod {
            name: name.to_owned(),
            node: self.name().to_owned(),
            namespace,
            v4,
            v6,
            folder: self.lab.root.join("programs"),
        })
    }

    fn route_to(&self, other: &Self) -> Result<()> {
        let [v4, v6] = other.machine.address;
        let number = other.machine.number;
        self.machine.namespace.run(|| {
            let netlink = Netlink::open()?;
            netlink.route((ip4(number, 0), 24), Some(v4), "eth0")?;
            netlink.route((ip6(number, 0), 64), Some(v6), "eth0")
        })
    }

    /// Starts its node proxy with these settings over the usual ones, and waits until it is ready.
    pub fn start_proxy(&self, settings: &[(&str, &str)]) -> Result<()> {
        let proxy = self.begin_proxy(settings)?;
        let ready = proxy.wait_ready(SOON);
        *locked(&self.proxy) = Some(proxy);
        ready
    }

    /// Starts a node proxy and leaves it to the caller, as it is.
    pub fn begin_proxy(&self, settings: &[(&str, &str)]) -> Result<Proxy> {
        Proxy::start(self, settings)
    }

    /// Starts a node proxy in the pod's namespace, for dedicated mode.
    pub fn begin_proxy_in(&self, pod: &Pod, settings: &[(&str, &str)]) -> Result<Proxy> {
        Proxy::start_in(self, pod.namespace(), settings)
    }

    /// The node proxy's executable.
    #[must_use]
    pub fn executable(&self) -> &Path {
        &self.lab.ztunnel
    }

    /// Runs the node proxy's executable with these arguments on the node.
    pub fn proxy_command(&self, arguments: &[&str]) -> Result<Finished> {
        Proxy::command(self, arguments)
    }

    /// Does this with its node proxy.
    pub fn with_proxy<T>(&self, f: impl FnOnce(&mut Proxy) -> Result<T>) -> Result<T> {
        let mut proxy = locked(&self.proxy);
        f(proxy.as_mut().with_context(|| format!("{} has no node proxy", self.name()))?)
    }

    /// Starts another node proxy beside its own, as an upgrade does, and waits until it is ready. It is the
    /// node's from then on; returned is the one before, which still runs. It has a namespace of its own, as the
    /// pod of a `DaemonSet` has: both have their ports.
    pub fn succeed_proxy(&self, settings: &[(&str, &str)]) -> Result<Proxy> {
        let next = self.begin_successor(settings)?;
        next.wait_ready(SOON)?;
        let before = locked(&self.proxy).replace(next);
        before.with_context(|| format!("{} had no node proxy", self.name()))
    }

    /// Starts another node proxy beside its own, in a namespace of its own, and leaves it to the caller, as it is.
    pub fn begin_successor(&self, settings: &[(&str, &str)]) -> Result<Proxy> {
        static COUNT: AtomicU8 = AtomicU8::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let namespace = Namespace::create(&format!("{}{}-{number}", self.id, self.name()))?;
        Proxy::start_in(self, &namespace, settings)
    }

    /// Kills its node proxy, which gets no warning.
    pub fn kill_proxy(&self) {
        locked(&self.proxy).take();
    }

    /// Enrols the pod, as the CNI agent does when it is labelled; its account is `account`.
    pub fn enrol(&self, pod: &Pod, account: &str) -> Result<()> {
        self.zds().add(&pod.uid(), pod.info(account), pod.namespace())
    }

    /// Takes the pod out of the mesh.
    pub fn release(&self, pod: &Pod) -> Result<()> {
        self.zds().del(&pod.uid())
    }

    /// Fetches a URL from this address of the node's, with curl or, where there is none, our own client.
    pub fn fetch_from(&self, from: IpAddr, url: &str) -> Result<Finished> {
        let (from, folder) = (from.to_string(), self.lab.root.join("programs"));
        if crate::program::installed("curl").is_some() {
            return self.run(["curl", "-gsS", "--max-time", "5", "--interface", &from, url]);
        }
        Start::ours(&self.machine.namespace, &folder, ["http-get-from", &from, url]).run(SOON)
    }

    /// Runs a program on the node itself.
    pub fn run<S: AsRef<OsStr>>(&self, command: impl IntoIterator<Item = S>) -> Result<Finished> {
        Start::new(&self.machine.namespace, &self.lab.root.join("programs"), command).run(SOON)
    }
}

fn ip4(node: u8, host: u8) -> IpAddr {
    IpAddr::from([10, 80, node, host])
}

fn ip6(node: u8, host: u8) -> IpAddr {
    IpAddr::from([0xfd80, u16::from(node), 0, 0, 0, 0, 0, u16::from(host)])
}

/// A pod: a namespace with one device, in which programs run.
#[derive(Clone, Debug)]
pub struct Pod {
    name: String,
    node: String,
    namespace: Namespace,
    v4: IpAddr,
    v6: IpAddr,
    folder: PathBuf,
}

/// The Kubernetes namespace that all pods of the lab are in.
pub const NAMESPACE: &str = "lab";

impl Pod {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The node it is on.
    #[must_use]
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Its IPv4 address.
    #[must_use]
    pub fn v4(&self) -> IpAddr {
        self.v4
    }

    /// Its IPv6 address.
    #[must_use]
    pub fn v6(&self) -> IpAddr {
        self.v6
    }

    /// Its network namespace.
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Its uid with the CNI agent, of the shape and length that Kubernetes has.
    #[must_use]
    pub fn uid(&self) -> String {
        let IpAddr::V4(ip) = self.v4 else { return self.name.clone() };
        format!("5b5ec8f3-1cf3-4ca1-9a47-0000{:08x}", ip.to_bits())
    }

    /// What the CNI agent says of it.
    #[must_use]
    pub fn info(&self, account: &str) -> crate::zds::Info {
        crate::zds::Info {
            name: self.name.clone(),
            namespace: NAMESPACE.to_owned(),
            service_account: account.to_owned(),
        }
    }

    /// A program in it, to be started.
    pub fn program<S: AsRef<OsStr>>(&self, command: impl IntoIterator<Item = S>) -> Start<'_> {
        Start::new(&self.namespace, &self.folder, command)
    }

    /// Runs a program in it to its end.
    pub fn run<S: AsRef<OsStr>>(&self, command: impl IntoIterator<Item = S>) -> Result<Finished> {
        self.program(command).run(Duration::from_secs(60))
    }

    /// Starts one of our own programs in it.
    pub fn spawn<S: AsRef<OsStr>>(&self, command: impl IntoIterator<Item = S>) -> Result<Program> {
        Start::ours(&self.namespace, &self.folder, command).spawn()
    }

    /// Runs our TCP client in it.
    pub fn tcp<S: AsRef<str>>(&self, to: SocketAddr, what: &[S]) -> Result<Finished> {
        let words = ["tcp".to_owned(), to.to_string()].into_iter();
        let words = words.chain(what.iter().map(|word| word.as_ref().to_owned()));
        Start::ours(&self.namespace, &self.folder, words).run(Duration::from_secs(120))
    }

    /// Fetches a URL with curl or, where there is none, our own client.
    pub fn fetch(&self, url: &str) -> Result<Finished> {
        if crate::program::installed("curl").is_some() {
            let options = ["-gsS", "--fail-with-body", "--max-time", "8"];
            return self.run(["curl"].iter().chain(&options).chain(&[url]));
        }
        Start::ours(&self.namespace, &self.folder, ["http-get", url]).run(SOON)
    }

    /// Fetches these, one after the other, on one connection, with our own client.
    pub fn fetch_all(&self, urls: &[&str]) -> Result<Finished> {
        let words = ["http-get"].iter().chain(urls);
        Start::ours(&self.namespace, &self.folder, words).run(SOON)
    }

    /// Starts our HTTP server and our TCP server in it, on these ports of both families.
    pub fn serve(&self, http: u16, tcp: u16) -> Result<[Program; 2]> {
        let address = |port| format!("[::]:{port}");
        let mut web = self.spawn(["http-server", self.name(), &address(http)])?;
        let mut other = self.spawn(["tcp-server", &address(tcp)])?;
        web.says("listening", SOON)?;
        other.says("listening", SOON)?;
        Ok([web, other])
    }
}
