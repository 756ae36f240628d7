//! A node proxy, as a process on its node.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    http,
    log::{Line, Log},
    metrics::Metrics,
    netns::Namespace,
    program::{Finished, Program, Start},
    topology::Node,
    wait::{self, SOON},
};

const ADMIN: u16 = 15000;
const METRICS: u16 = 15020;
const READY: u16 = 15021;

/// A running node proxy, killed when this is dropped.
#[derive(Debug)]
pub struct Proxy {
    program: Program,
    doors: Doors,
}

/// What a node proxy shows, whoever runs it: its ports and its log.
#[derive(Clone, Debug)]
pub struct Doors {
    namespace: Namespace,
    log: PathBuf,
}

impl std::ops::Deref for Proxy {
    type Target = Doors;
    fn deref(&self) -> &Doors {
        &self.doors
    }
}

impl Proxy {
    /// Starts it with the lab's settings, those given over them; an empty one is left out.
    pub(crate) fn start(node: &Node, settings: &[(&str, &str)]) -> Result<Self> {
        Self::start_in(node, node.namespace(), settings)
    }

    /// The same, in another namespace of the node.
    pub(crate) fn start_in(
        node: &Node,
        namespace: &Namespace,
        settings: &[(&str, &str)],
    ) -> Result<Self> {
        let variables = variables(node, settings)?;
        let log = log_of(&node.lab.root, node.name());
        let command = [node.lab.ztunnel.as_os_str(), "proxy".as_ref(), "ztunnel".as_ref()];
        let start = Start::new(namespace, &node.lab.root, command);
        let program = start.environment(variables).log(&log).spawn()?;
        Ok(Self { program, doors: Doors::new(namespace, log) })
    }

    /// Runs the node proxy's executable with these arguments, to its end.
    pub(crate) fn command(node: &Node, arguments: &[&str]) -> Result<Finished> {
        let program = node.lab.ztunnel.to_string_lossy();
        let words = [program.as_ref()].into_iter().chain(arguments.iter().copied());
        Start::new(node.namespace(), &node.lab.root, words)
            .environment(variables(node, &[])?)
            .run(SOON)
    }

    /// Waits until it says that it is ready; fails at once where it ends instead.
    pub fn wait_ready(&self, deadline: Duration) -> Result<()> {
        let path = format!("/proc/{}/stat", self.program.id());
        let mut last = String::from("does not answer");
        let ready = wait::until("readiness", deadline, || {
            if let Ok(answer) = http::get(&self.namespace, READY, "/healthz/ready") {
                if answer.status == 200 {
                    return Ok(Some(()));
                }
                last = answer.body;
            }
            let state = std::fs::read_to_string(&path).unwrap_or_default();
            if state.is_empty() || state.contains(") Z ") {
                bail!("it ended: {}", self.log().tail(5));
            }
            Ok(None)
        });
        let who = self.log.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        ready.map_err(|why| why.context(format!("node proxy of {who}: {}", last.trim())))
    }

    /// The process.
    pub fn program(&mut self) -> &mut Program {
        &mut self.program
    }

    /// SIGTERM, and the exit code.
    pub fn terminate(&mut self, deadline: Duration) -> Result<i32> {
        self.program.signal(Signal::SIGTERM)?;
        self.program.wait(deadline)
    }
}

impl Doors {
    /// Of the node proxy in this namespace, whose log is there.
    #[must_use]
    pub fn new(namespace: &Namespace, log: PathBuf) -> Self {
        Self { namespace: namespace.clone(), log }
    }

    /// What readiness says now: the status and the body.
    pub fn readiness(&self) -> Result<http::Answer> {
        http::get(&self.namespace, READY, "/healthz/ready")
    }

    /// Asks the admin port.
    pub fn admin(&self, method: &str, path: &str) -> Result<http::Answer> {
        http::request(&self.namespace, method, ADMIN, path)
    }

    /// What it knows.
    pub fn config_dump(&self) -> Result<Value> {
        let answer = self.admin("GET", "/config_dump")?;
        serde_json::from_str(&answer.body).context("the dump is no JSON")
    }

    /// Waits until the dump answers this.
    pub fn wait_dump(&self, what: &str, mut ask: impl FnMut(&Value) -> bool) -> Result<()> {
        wait::until(what, SOON, || Ok(ask(&self.config_dump()?).then_some(())))
    }

    /// Waits until it has, or no longer has, the policy.
    pub fn wait_policy(&self, name: &str, there: bool) -> Result<()> {
        self.wait_dump(&format!("policy {name}: {there}"), |dump| {
            let policies = dump.get("policies").and_then(Value::as_array);
            let has = |policy: &Value| policy.get("name").and_then(Value::as_str) == Some(name);
            policies.is_some_and(|policies| policies.iter().any(has)) == there
        })
    }

    /// Its metrics.
    pub fn metrics(&self) -> Result<Metrics> {
        Metrics::parse(&self.metrics_text()?)
    }

    /// Its metrics as they come.
    pub fn metrics_text(&self) -> Result<String> {
        let answer = http::get(&self.namespace, METRICS, "/metrics")?;
        if answer.status != 200 {
            bail!("metrics: {}", answer.status);
        }
        Ok(answer.body)
    }

    /// Its log, from the node's first proxy on.
    #[must_use]
    pub fn log(&self) -> Log {
        Log::new(&self.log)
    }

    /// Waits for a line of its access log that is after the mark and answers this.
    pub fn wait_access(
        &self,
        mark: u64,
        what: &str,
        mut is: impl FnMut(&Line) -> bool,
    ) -> Result<Line> {
        let log = self.log();
        wait::until(&format!("a log line: {what}"), SOON, || {
            Ok(log.access_since(mark).into_iter().find(|line| is(line)))
        })
        .map_err(|why| why.context(log.tail(6)))
    }
}

/// The lab's settings, with those given over them.
fn variables(node: &Node, settings: &[(&str, &str)]) -> Result<Vec<(String, String)>> {
    let root = &node.lab.root;
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let pins = root.join("pins").join(node.name());
    std::fs::create_dir_all(&pins)?;
    let mut variables: Vec<(String, String)> = [
        ("CAPTURE", "ebpf".to_owned()),
        ("CAPTURE_PIN_DIR", text(&pins)),
        ("INPOD_UDS", text(&root.join(format!("{}.sock", node.name())))),
        ("NODE_NAME", node.name().to_owned()),
        ("LOCAL_XDS_PATH", text(&root.join("mesh.yaml"))),
        ("LOCAL_CA_DIR", text(&root.join("ca"))),
        ("XDS_ADDRESS", String::new()),
        ("NETWORK", String::new()),
        ("IPV6_ENABLED", "true".to_owned()),
        ("ZTUNNEL_WORKER_THREADS", "2".to_owned()),
        ("RUST_LOG", "info".to_owned()),
        ("RUST_BACKTRACE", "1".to_owned()),
        ("TERMINATION_GRACE_PERIOD_SECONDS", "5".to_owned()),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into();
    for (key, value) in settings {
        variables.retain(|(known, _)| known != key);
        variables.push(((*key).to_owned(), (*value).to_owned()));
    }
    Ok(variables)
}

/// Where the log of a node's proxies is.
#[must_use]
pub fn log_of(root: &Path, node: &str) -> PathBuf {
    root.join(format!("{node}.log"))
}
