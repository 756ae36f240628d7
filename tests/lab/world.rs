//! Who is in the lab.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result};
use mesh_tests::{Lab, Mesh, Node, Pod, Program, mesh::principal, program::installed, wait::SOON};
use serde_json::{Value, json};

/// Where HTTP is served, behind port 80 of the VIP; and our TCP server, redis.
pub(crate) const HTTP: u16 = 8080;
pub(crate) const TCP: u16 = 9000;
pub(crate) const REDIS: u16 = 6379;

/// Both versions of the server.
pub(crate) const VIP: (IpAddr, IpAddr) = vip(10);
/// The first version alone.
pub(crate) const FIRST: (IpAddr, IpAddr) = vip(11);

pub(crate) const fn vip(last: u8) -> (IpAddr, IpAddr) {
    let v6 = Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, last as u16);
    (IpAddr::V4(Ipv4Addr::new(10, 96, 0, last)), IpAddr::V6(v6))
}

/// The lab, built: nodes `node-a` and `node-b`, their pods, and what runs in them.
pub(crate) struct World {
    pub(crate) a: Node,
    pub(crate) b: Node,
    /// May use the server.
    pub(crate) client: Pod,
    /// May not.
    pub(crate) intruder: Pod,
    /// Not in the mesh.
    pub(crate) legacy: Pod,
    /// Enrolled while it works.
    pub(crate) late: Pod,
    pub(crate) v1: Pod,
    pub(crate) v2: Pod,
    /// What is behind the waypoint, and the waypoint.
    pub(crate) inner: Pod,
    pub(crate) waypoint: Pod,
    pub(crate) mesh: Mesh,
    /// The first version's TCP server, which says how connections ended.
    pub(crate) v1_tcp: Program,
    programs: Vec<Program>,
    pub(crate) lab: Lab,
}

impl World {
    /// Machines and programs, without node proxies.
    pub(crate) fn build(lab: Lab) -> Result<Self> {
        let (a, b) = (lab.node("node-a")?, lab.node("node-b")?);
        let pods = ["client", "intruder", "legacy", "late"].map(|name| a.pod(name));
        let [client, intruder, legacy, late] = pods;
        let pods = ["server-v1", "server-v2", "inner", "waypoint"].map(|name| b.pod(name));
        let [v1, v2, inner, waypoint] = pods;
        let (client, intruder, legacy, late) = (client?, intruder?, legacy?, late?);
        let (v1, v2, inner, waypoint) = (v1?, v2?, inner?, waypoint?);
        lab.settle(&[&client, &intruder, &legacy, &late, &v1, &v2, &inner, &waypoint])?;
        let mut programs = Vec::new();
        let [http, v1_tcp] = v1.serve(HTTP, TCP)?;
        programs.push(http);
        for pod in [&v2, &legacy, &late, &inner] {
            programs.extend(pod.serve(HTTP, TCP)?);
        }
        let mesh = Mesh::default();
        let mut world = Self {
            a,
            b,
            client,
            intruder,
            legacy,
            late,
            v1,
            v2,
            inner,
            waypoint,
            mesh,
            v1_tcp,
            programs,
            lab,
        };
        world.populate();
        world.apply()?;
        Ok(world)
    }

    /// What the control plane would know.
    fn populate(&mut self) {
        let Self { client, intruder, legacy, late, v1, v2, inner, waypoint, mesh, .. } = self;
        mesh.workload(client, "client");
        mesh.workload(intruder, "intruder");
        mesh.stranger(legacy, "legacy");
        mesh.stranger(late, "late");
        mesh.workload(inner, "inner");
        mesh.workload(waypoint, "waypoint").set("workloadName", json!("waypoint"));
        for (pod, version) in [(&*v1, "v1"), (&*v2, "v2")] {
            let workload = mesh.workload(pod, "server");
            workload.set("canonicalRevision", json!(version));
        }
        let ports = [(80, HTTP), (TCP, TCP), (REDIS, REDIS)];
        mesh.service("server", &[VIP.0, VIP.1], &ports, &[v1, v2]);
        mesh.service("first", &[FIRST.0, FIRST.1], &ports, &[v1]);
        // Who may come in: these identities; and legacy's address, once it is let in at all.
        let friends: Vec<Value> =
            ["client", "server", "late"].map(|a| json!({ "Exact": principal(a) })).into();
        let addresses = [format!("{}/32", legacy.v4()), format!("{}/128", legacy.v6())];
        let rules = json!([[[{ "principals": friends }]], [[{ "sourceIps": addresses }]]]);
        mesh.policy("friends", "Allow", &rules).set("scope", json!("WorkloadSelector"));
        mesh.select("friends", mesh_tests::topology::NAMESPACE, &[v1, v2]);
        mesh.strict(&[v1, v2]);
    }

    /// Tells the node proxies.
    pub(crate) fn apply(&self) -> Result<()> {
        self.lab.apply(&self.mesh)
    }

    pub(crate) fn enrol(&self) -> Result<()> {
        for (pod, account) in [(&self.client, "client"), (&self.intruder, "intruder")] {
            self.a.enrol(pod, account)?;
        }
        for (pod, account) in [(&self.v1, "server"), (&self.v2, "server"), (&self.inner, "inner")] {
            self.b.enrol(pod, account)?;
        }
        Ok(())
    }

    /// Starts redis in the first version's pod, if it is installed.
    pub(crate) fn redis(&mut self) -> Result<bool> {
        if installed("redis-server").is_none() || installed("redis-cli").is_none() {
            return Ok(false);
        }
        let port = REDIS.to_string();
        let options =
            ["--port", &port, "--bind", "*", "-::*", "--save", "", "--protected-mode", "no"];
        let mut redis = self.v1.program(["redis-server"].iter().chain(&options)).spawn()?;
        redis.says("Ready to accept connections", SOON).context("redis")?;
        self.programs.push(redis);
        Ok(true)
    }

    /// All its namespaces: nodes, pods, the wire.
    pub(crate) fn namespaces(&self) -> Vec<&mesh_tests::netns::Namespace> {
        let pods = [
            &self.client,
            &self.intruder,
            &self.legacy,
            &self.late,
            &self.v1,
            &self.v2,
            &self.inner,
            &self.waypoint,
        ];
        let nodes = [self.a.namespace(), self.b.namespace(), self.lab.wire()];
        pods.into_iter().map(Pod::namespace).chain(nodes).collect()
    }
}

/// An address and a port, as in a URL.
pub(crate) fn url(ip: IpAddr, port: u16, path: &str) -> String {
    format!("http://{}{path}", SocketAddr::new(ip, port))
}
