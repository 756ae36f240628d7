//! What most tests begin with: two nodes, a client, a server, and a pod that is not in the mesh.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::{
    Lab, Mesh, Node, Pod, Program,
    ca::{Authority, Issued},
    istio_cni::{Backend, Rules},
    mesh::identity,
    wait::{self, SOON},
};

/// Where the server's HTTP is; port 80 of the service.
pub const HTTP: u16 = 8080;
/// Where its TCP server is; also of the service.
pub const TCP: u16 = 9000;
/// Where tunnels go.
pub const TUNNEL: u16 = 15008;

/// `client` and `outsider` on node `a`, `server` on node `b`, a service `web` of the server.
#[derive(Debug)]
pub struct Scene {
    /// The client's node.
    pub a: Node,
    /// The server's node.
    pub b: Node,
    /// Enrolled, account `client`.
    pub client: Pod,
    /// Enrolled, account `server`; it runs our HTTP and TCP servers.
    pub server: Pod,
    /// Neither enrolled nor known to the mesh; it runs the same.
    pub outsider: Pod,
    /// What the node proxies know.
    pub mesh: Mesh,
    /// The server's TCP server.
    pub tcp: Program,
    _programs: Vec<Program>,
    /// Dropped last.
    pub lab: Lab,
}

impl Scene {
    /// With node proxies ready, and client and server enrolled.
    pub fn start(settings: &[(&str, &str)]) -> Result<Self> {
        let scene = Self::bare()?;
        scene.begin(settings)?;
        Ok(scene)
    }

    /// The same under rules that istio-cni would have written.
    pub fn external(backend: Backend, settings: &[(&str, &str)]) -> Result<Self> {
        let scene = Self::bare()?;
        for pod in [&scene.client, &scene.server] {
            Rules::new(backend).write(pod)?;
        }
        let settings: Vec<_> = [("CAPTURE", "external")].iter().chain(settings).copied().collect();
        scene.begin(&settings)?;
        Ok(scene)
    }

    /// Without node proxies.
    pub fn bare() -> Result<Self> {
        let lab = Lab::new()?;
        let (a, b) = (lab.node("a")?, lab.node("b")?);
        let (client, outsider, server) = (a.pod("client")?, a.pod("outsider")?, b.pod("server")?);
        lab.settle(&[&client, &outsider, &server])?;
        let [web, tcp] = server.serve(HTTP, TCP)?;
        let mut programs = vec![web];
        programs.extend(outsider.serve(HTTP, TCP)?);
        let mut mesh = Mesh::default();
        mesh.workload(&client, "client");
        mesh.workload(&server, "server");
        mesh.service("web", &[vip().0, vip().1], &[(80, HTTP), (TCP, TCP)], &[&server]);
        lab.apply(&mesh)?;
        Ok(Self { a, b, client, server, outsider, mesh, tcp, _programs: programs, lab })
    }

    /// Starts the node proxies and enrols the two.
    pub fn begin(&self, settings: &[(&str, &str)]) -> Result<()> {
        self.a.start_proxy(settings)?;
        self.b.start_proxy(settings)?;
        self.a.enrol(&self.client, "client")?;
        self.b.enrol(&self.server, "server")
    }

    /// Tells the node proxies what the mesh is now.
    pub fn apply(&self) -> Result<()> {
        self.lab.apply(&self.mesh)
    }

    /// The same, and waits until the server's node has the policy.
    pub fn apply_policy(&self, name: &str) -> Result<()> {
        self.apply()?;
        self.b.with_proxy(|proxy| proxy.wait_policy(name, true))
    }

    /// A certificate for an account, from the authority that the node proxies share.
    pub fn certificate(&self, account: &str) -> Result<Issued> {
        Authority::load(&self.lab.ca_folder())?.issue(Some(&identity(account)))
    }

    /// Asks the HTTP server by this address.
    pub fn ask(&self, pod: &Pod, to: SocketAddr) -> Result<Value> {
        let said = pod.fetch(&format!("http://{to}/"))?.ok()?;
        serde_json::from_str(&said).with_context(|| format!("not our server: {said}"))
    }

    /// The same, until it answers: the mesh may just have changed.
    pub fn ask_until(&self, pod: &Pod, to: SocketAddr) -> Result<Value> {
        wait::retry(&format!("an answer from {to}"), SOON, || self.ask(pod, to))
    }

    /// The address that the server says this pod comes from, once it answers.
    pub fn seen_as(&self, pod: &Pod, to: SocketAddr) -> Result<String> {
        let said = self.ask_until(pod, to)?;
        let client = said.get("client").and_then(Value::as_str);
        Ok(client.context("not our server")?.to_owned())
    }

    /// The server's tunnel port.
    #[must_use]
    pub fn tunnel(&self) -> SocketAddr {
        SocketAddr::new(self.server.v4(), TUNNEL)
    }

    /// The server's addresses, with this port.
    #[must_use]
    pub fn server_at(&self, port: u16) -> [SocketAddr; 2] {
        [self.server.v4(), self.server.v6()].map(|ip| SocketAddr::new(ip, port))
    }
}

/// The addresses of the service `web`.
#[must_use]
pub fn vip() -> (IpAddr, IpAddr) {
    let v6 = Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 0x20);
    (Ipv4Addr::new(10, 96, 0, 20).into(), v6.into())
}

/// The same with this port.
#[must_use]
pub fn web(port: u16) -> [SocketAddr; 2] {
    [vip().0, vip().1].map(|ip| SocketAddr::new(ip, port))
}
