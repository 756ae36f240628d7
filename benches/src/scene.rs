//! Where it is measured: two nodes, pods on both, and a load between them.
//!
//! ```text
//! near: client (enrolled), bare-client      far: server, plain (enrolled), bare-server
//! ```
//!
//! `plain` is enrolled, but the mesh says that it takes no tunnels: what goes there is captured and passed on as it
//! is by both node proxies. The bare pods are on the same nodes and in no mesh: between them nothing is in the way.

use std::{
    env,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use mesh_tests::{
    Lab, Mesh, Node, Pod, Program,
    control_plane::ControlPlane,
    wait::{SOON, pause},
};

use crate::{
    load::client::{Outcome, Work},
    process::{Memory, Usage},
    rows::{PORTS, Row, Via},
};

/// Apart from the ports that a node proxy speaks from in a client's name (10240 to 32767): a client that is itself
/// there could meet a connection of its own (spec/capture.md).
pub const CLIENT_PORTS: &str = "32768 60999";

/// The two nodes, their pods and what answers there.
#[derive(Debug)]
pub struct Scene {
    lab: Lab,
    near: Node,
    far: Node,
    client: Pod,
    bare_client: Pod,
    server: Pod,
    plain: Pod,
    bare_server: Pod,
    mesh: Mesh,
    servers: Vec<Program>,
    settings: Vec<(String, String)>,
}

/// What one run did and what the node proxies used for it.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// What the load saw.
    pub outcome: Outcome,
    /// Of both node proxies together.
    pub used: Usage,
}

impl Scene {
    /// Builds it. No node proxy runs yet; when one does, it has these settings over the harness's.
    pub fn build(lab: Lab, settings: &[(String, String)]) -> Result<Self> {
        let (near, far) = (lab.node("near")?, lab.node("far")?);
        let (client, bare_client) = (near.pod("client")?, near.pod("bare-client")?);
        let (server, plain, bare_server) =
            (far.pod("server")?, far.pod("plain")?, far.pod("bare-server")?);
        for namespace in [near.namespace(), far.namespace()] {
            namespace.sysctl("ipv4/ip_local_port_range", CLIENT_PORTS)?;
        }
        for pod in [&client, &bare_client, &server, &plain, &bare_server] {
            pod.namespace().sysctl("ipv4/ip_local_port_range", CLIENT_PORTS)?;
        }
        lab.settle(&[&client, &bare_client, &server, &plain, &bare_server])?;
        let mut mesh = Mesh::default();
        mesh.workload(&client, "client");
        mesh.workload(&server, "server");
        mesh.stranger(&plain, "plain");
        mesh.stranger(&bare_client, "bare");
        mesh.stranger(&bare_server, "bare");
        let settings = settings.to_vec();
        let mut scene = Self {
            lab,
            near,
            far,
            client,
            bare_client,
            server,
            plain,
            bare_server,
            mesh,
            servers: Vec::new(),
            settings,
        };
        for pod in [&scene.server, &scene.plain, &scene.bare_server] {
            let mut program = pod.program([own()?, "serve".into()]).spawn()?;
            program.says("listening", SOON)?;
            scene.servers.push(program);
        }
        scene.near.enrol(&scene.client, "client")?;
        scene.far.enrol(&scene.server, "server")?;
        scene.far.enrol(&scene.plain, "plain")?;
        scene.lab.apply(&scene.mesh)?;
        Ok(scene)
    }

    /// The lab, for its files.
    #[must_use]
    pub const fn lab(&self) -> &Lab {
        &self.lab
    }

    /// A control plane that has this mesh, for node proxies that get its settings.
    pub fn control_plane(&self) -> Result<ControlPlane> {
        let control = ControlPlane::start(&self.lab)?;
        control.apply(&self.mesh)?;
        Ok(control)
    }

    /// More pods on the far node, each enrolled with an account of its own, all answering short connections.
    pub fn add_servers(&mut self, count: usize) -> Result<Vec<Pod>> {
        let mut pods = Vec::new();
        for index in 0..count {
            let name = format!("many-{index}");
            let pod = self.far.pod(&name)?;
            self.mesh.workload(&pod, &name);
            self.far.enrol(&pod, &name)?;
            pods.push(pod);
        }
        let names = pods.iter().map(|pod| pod.namespace().name().to_owned());
        let command =
            [own()?.into_os_string().into_string().unwrap_or_default(), "serve-short".to_owned()];
        let mut program = self.bare_server.program(command.into_iter().chain(names)).spawn()?;
        program.says("listening", SOON)?;
        self.servers.push(program);
        self.lab.apply(&self.mesh)?;
        Ok(pods)
    }

    /// Starts both node proxies, fresh, with these settings over all others.
    pub fn start_proxies(&self, settings: &[(&str, &str)]) -> Result<()> {
        let own = self.settings.iter().map(|(key, value)| (key.as_str(), value.as_str()));
        let all: Vec<_> = own.chain(settings.iter().copied()).collect();
        for node in [&self.near, &self.far] {
            node.kill_proxy();
            let connections = node.zds().connections();
            node.start_proxy(&all)?;
            node.zds().wait_connections(connections + 1, SOON)?;
            if let Some(complaint) = node.zds().complaint() {
                bail!("the node proxy of {}: {complaint}", node.name());
            }
        }
        Ok(())
    }

    /// How long the state's writer of the near and of the far node proxy has kept its readers waiting, at most, in
    /// seconds.
    pub fn longest_holds(&self) -> Result<[f64; 2]> {
        let hold = |node: &Node| {
            node.with_proxy(|proxy| {
                Ok(proxy.metrics()?.sum("istio_state_longest_hold_seconds", &[]))
            })
        };
        Ok([hold(&self.near)?, hold(&self.far)?])
    }

    /// Does short connections from the client to the server: eight at once, each of which rests after it.
    pub fn gentle(&self, length: Duration) -> Result<Run> {
        let to = SocketAddr::new(self.server.v4(), PORTS.short);
        self.measured(Work::Rested(Duration::from_millis(8)), &[to], 8, length)
    }

    /// Starts a node proxy on a node without pods, which loads the mesh from this file.
    pub fn start_loader(&self, node: &Node, file: &Path) -> Result<mesh_tests::Proxy> {
        let file = file.to_string_lossy();
        let own = self.settings.iter().map(|(key, value)| (key.as_str(), value.as_str()));
        let all: Vec<_> = own.chain([("LOCAL_XDS_PATH", &*file)]).collect();
        node.begin_proxy(&all)
    }

    /// The process ids of the two node proxies.
    pub fn proxies(&self) -> Result<[u32; 2]> {
        let id = |node: &Node| node.with_proxy(|proxy| Ok(proxy.program().id()));
        Ok([id(&self.near)?, id(&self.far)?])
    }

    /// What both node proxies have used.
    pub fn usage(&self) -> Result<Usage> {
        let [near, far] = self.proxies()?;
        Ok([Usage::of(near)?, Usage::of(far)?].into_iter().sum())
    }

    /// The memory of the near and the far node proxy.
    pub fn memory(&self) -> Result<[Memory; 2]> {
        let [near, far] = self.proxies()?;
        Ok([Memory::of(near)?, Memory::of(far)?])
    }

    /// Does a row's work between the bare pods.
    pub fn without(&self, row: &Row, length: Duration) -> Result<Outcome> {
        let to = SocketAddr::new(self.bare_server.v4(), row.port());
        load(&self.bare_client, row.work, &[to], row.parallel, length)
    }

    /// Does a row's work through the node proxies.
    pub fn through(&self, row: &Row, length: Duration) -> Result<Run> {
        let pod = match row.via {
            Via::Tunnel => &self.server,
            Via::Plain => &self.plain,
        };
        self.measured(row.work, &[SocketAddr::new(pod.v4(), row.port())], row.parallel, length)
    }

    /// Does work from the client, through the node proxies, and says what they used.
    pub fn measured(
        &self,
        work: Work,
        to: &[SocketAddr],
        parallel: usize,
        length: Duration,
    ) -> Result<Run> {
        let before = self.usage()?;
        let outcome = load(&self.client, work, to, parallel, length)?;
        // What is left to be done when the load has ended is part of it.
        pause(Duration::from_millis(50));
        Ok(Run { outcome, used: self.usage()? - before })
    }

    /// Opens so many more connections from the client and holds them until the program is dropped.
    pub fn hold(&self, count: usize) -> Result<Program> {
        let to = SocketAddr::new(self.server.v4(), PORTS.hold);
        let words = ["hold".to_owned(), to.to_string(), count.to_string()];
        let mut program = self.client.program(command(&words)?).spawn()?;
        program.says("holding", Duration::from_secs(120))?;
        Ok(program)
    }

    /// Records for so long where both node proxies spend their time.
    pub fn profile(&self, file: &Path, length: Duration) -> Result<Profile> {
        let [near, far] = self.proxies()?;
        // It ends by itself: it inherits a mask that keeps signals from it.
        let child = Command::new("perf")
            .args(["record", "-q", "-F", "499", "-g", "-o"])
            .arg(file)
            .args(["-p", &format!("{near},{far}"), "--", "sleep"])
            .arg(length.as_secs_f64().to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("perf does not start")?;
        Ok(Profile(child))
    }
}

/// A profile being recorded; dropping it waits for its end.
#[derive(Debug)]
pub struct Profile(Child);

impl Drop for Profile {
    fn drop(&mut self) {
        // Without one, its file is missing, which says it all.
        drop(self.0.wait());
    }
}

fn load(
    pod: &Pod,
    work: Work,
    to: &[SocketAddr],
    parallel: usize,
    length: Duration,
) -> Result<Outcome> {
    let mut words = vec![
        "load".to_owned(),
        work.to_string(),
        parallel.to_string(),
        length.as_secs_f64().to_string(),
    ];
    words.extend(to.iter().map(ToString::to_string));
    let finished = pod.program(command(&words)?).run(length + SOON + SOON)?;
    ensure!(
        finished.is_ok(),
        "the load: {}",
        finished.err.lines().take(6).collect::<Vec<_>>().join(" ")
    );
    let value = serde_json::from_str(&finished.out).context("the load said no JSON")?;
    Outcome::from_json(&value).context("the load said something else")
}

fn command(words: &[String]) -> Result<Vec<String>> {
    let own = own()?.into_os_string().into_string().unwrap_or_default();
    Ok([own].into_iter().chain(words.iter().cloned()).collect())
}

fn own() -> Result<PathBuf> {
    env::current_exe().context("where is this program?")
}
