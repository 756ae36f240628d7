//! The task that keeps to the CNI agent: the one door through which pods come and go.

use super::{
    Pod, Shared,
    protocol::{self, MAX_PACKET, Reaction},
    reconcile::{Reconcile, Step},
    served::{Entry, Served, Up, why_uncaptured},
};
use mesh_platform::{
    netns::Netns,
    redirect::{self, Redirect},
    uds::Seqpacket,
};
use mesh_runtime::{
    backoff::Backoff,
    ready::Gate,
    tasks::{Draining, Tasks},
};
use mesh_state::PodInfo;
use std::{
    collections::BTreeMap,
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::time::{Instant, interval_at, sleep};

/// How often a pod that could not be served is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// The agent does not speak our protocol.
#[derive(Clone, Debug)]
pub(crate) struct ProtocolBroken(String);

impl fmt::Display for ProtocolBroken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the CNI agent does not speak ZDS version 1 ({}): check that istio-cni fits",
            self.0
        )
    }
}

impl std::error::Error for ProtocolBroken {}

/// Why a session with the agent ended.
#[derive(Debug)]
enum Ended {
    /// The connection is gone: make another.
    Lost(io::Error),
    /// There is no point in another.
    Broken(ProtocolBroken),
    /// We were told to stop.
    Stopping,
}

/// Keeps to the agent until told to stop.
#[derive(Debug)]
pub(crate) struct Manager {
    shared: Shared,
    tasks: Tasks,
    gate: Gate,
    served: Served,
    machine: Reconcile,
    waiting: BTreeMap<String, (PodInfo, Netns)>,
}

impl Manager {
    /// Nothing is served yet. Pods and what they own become children of `tasks`.
    pub(crate) fn new(shared: Shared, tasks: Tasks, gate: Gate, served: Served) -> Self {
        let machine = Reconcile::default();
        Self { shared, tasks, gate, served, machine, waiting: BTreeMap::new() }
    }

    /// Connects, and connects again, until told to stop.
    ///
    /// # Errors
    ///
    /// Returns an error where the agent does not speak our protocol.
    pub(crate) async fn run(
        mut self,
        agent: PathBuf,
        draining: Draining,
    ) -> Result<(), ProtocolBroken> {
        let mut backoff =
            Backoff::new(Duration::from_millis(20), Duration::from_secs(15), 2.0, 0.0);
        if !self.shared.known.is() {
            tracing::info!("pods are taken once the control plane has sent what there is");
        }
        // Nothing is known yet: whoever has the pods meanwhile serves them better, and where nobody has, what they
        // dial waits.
        tokio::select! {
            () = self.shared.known.wait() => {}
            () = draining.stopping() => {
                self.farewell().await;
                return Ok(());
            }
        }
        let (served, shared) = (self.served.clone(), self.shared.clone());
        self.tasks.spawn(move |draining| served.watch(shared, draining));
        loop {
            let ended = match self.connect(&agent, &draining).await {
                Ok(connection) => {
                    tracing::info!(agent = %agent.display(), "connected to the CNI agent");
                    self.machine.connected();
                    self.waiting.clear();
                    self.served.entries().retain(|_, entry| matches!(entry, Entry::Up(_)));
                    self.publish();
                    let ended = self.session(connection, &draining).await;
                    // Not by a connection alone: an agent that hangs up at once would be dialled at once.
                    if self.machine.is_synced() {
                        backoff.reset();
                    }
                    ended
                }
                Err(ended) => ended,
            };
            self.machine.disconnected();
            self.publish();
            match ended {
                Ended::Stopping => {
                    self.farewell().await;
                    return Ok(());
                }
                Ended::Broken(broken) => return Err(broken),
                Ended::Lost(error) => {
                    let delay = backoff.next_delay();
                    tracing::warn!(agent = %agent.display(), %error, ?delay, "no connection to the CNI agent: pods stay as they are");
                    tokio::select! {
                        () = sleep(delay) => {}
                        () = draining.stopping() => {
                            self.farewell().await;
                            return Ok(());
                        }
                    }
                }
            }
        }
    }

    /// Waits for what the pods have open. Whoever owns us says for how long.
    async fn farewell(self) {
        let served = std::mem::take(&mut *self.served.entries());
        for entry in served.into_values() {
            if let Entry::Up(up) = entry {
                up.tasks.finished().await;
            }
        }
        self.tasks.finished().await;
    }

    async fn connect(&self, agent: &Path, draining: &Draining) -> Result<Seqpacket, Ended> {
        tokio::select! {
            connection = Seqpacket::connect(agent) => connection.map_err(Ended::Lost),
            () = draining.stopping() => Err(Ended::Stopping),
        }
    }

    async fn session(&mut self, connection: Seqpacket, draining: &Draining) -> Ended {
        if let Err(error) = connection.send(&protocol::hello()).await {
            return Ended::Lost(error);
        }
        let mut retry = interval_at(Instant::now() + RETRY, RETRY);
        let mut packet = [0; MAX_PACKET];
        loop {
            tokio::select! {
                biased;
                () = draining.stopping() => return Ended::Stopping,
                received = connection.recv(&mut packet) => {
                    let ended = match received {
                        Ok((0, _)) => Some(Ended::Lost(io::ErrorKind::UnexpectedEof.into())),
                        Ok((length, netns)) => {
                            let bytes = packet.get(..length).unwrap_or_default();
                            self.packet(&connection, bytes, netns).await.err()
                        }
                        Err(error) => {
                            let text = format!("failure to read message : {error}");
                            let _lost = connection.send(&protocol::ack(&text)).await;
                            Some(Ended::Lost(error))
                        }
                    };
                    if let Some(ended) = ended {
                        return ended;
                    }
                }
                _ = retry.tick() => self.retry().await,
            }
            self.publish();
        }
    }

    /// Does what a packet asks for, and acknowledges it.
    async fn packet(
        &mut self,
        connection: &Seqpacket,
        bytes: &[u8],
        netns: Option<std::os::fd::OwnedFd>,
    ) -> Result<(), Ended> {
        let request = match protocol::parse(bytes, netns.is_some()) {
            Ok(request) => request,
            Err(invalid) => {
                tracing::error!(error = %invalid, "a packet of the CNI agent is refused");
                connection.send(&protocol::ack(&invalid.answer())).await.map_err(Ended::Lost)?;
                return match invalid.reaction() {
                    Reaction::GoOn => Ok(()),
                    Reaction::Reconnect => {
                        Err(Ended::Lost(io::Error::new(io::ErrorKind::InvalidData, invalid)))
                    }
                    Reaction::GiveUp => Err(Ended::Broken(ProtocolBroken(invalid.to_string()))),
                };
            }
        };
        tracing::debug!(?request, "message of the CNI agent");
        let netns = match netns.map(Netns::from_fd).transpose() {
            Ok(netns) => netns,
            Err(error) => {
                let text = format!("failure to start proxy : {error}");
                return connection.send(&protocol::ack(&text)).await.map_err(Ended::Lost);
            }
        };
        let error = match self.machine.message(request, netns.as_ref().map(Netns::id)) {
            Step::Done => String::new(),
            Step::Stop(uid) => {
                self.stop(&uid).await;
                String::new()
            }
            Step::Release(uid) => {
                self.release(&uid).await;
                String::new()
            }
            Step::Settle { gone, named } => {
                for uid in gone {
                    self.stop(&uid).await;
                }
                self.prune(named).await;
                String::new()
            }
            Step::Start { uid, pod } => match netns {
                Some(netns) => {
                    let started = self.start(&uid, pod, netns).await;
                    started
                        .err()
                        .map(|why| format!("failure to start proxy : {why}"))
                        .unwrap_or_default()
                }
                None => String::new(),
            },
            Step::Broken(what) => {
                let text = format!("failure to process message : {what}");
                connection.send(&protocol::ack(&text)).await.map_err(Ended::Lost)?;
                return Err(Ended::Broken(ProtocolBroken(what.to_owned())));
            }
        };
        connection.send(&protocol::ack(&error)).await.map_err(Ended::Lost)
    }

    async fn start(&mut self, uid: &str, info: PodInfo, netns: Netns) -> Result<(), String> {
        // The same pod in another namespace: its sandbox was made anew.
        self.stop(uid).await;
        let tasks = self.tasks.child();
        let (shared, key, who, place) =
            (self.shared.clone(), uid.to_owned(), info.clone(), netns.clone());
        let began = Instant::now();
        // The kernel takes milliseconds: not on this thread.
        let start = move || {
            let started = Pod::start(&shared, &key, who.clone(), &place, &tasks);
            started.map(|(sockets, connections)| {
                let original_source = shared.redirect.original_source(&sockets);
                let uncaptured = why_uncaptured(&*shared.redirect, &sockets);
                Up { info: who, sockets, original_source, connections, tasks, uncaptured }
            })
        };
        let why = match tokio::task::spawn_blocking(start).await {
            Ok(Ok(up)) => {
                tracing::info!(uid, pod = %info, took = ?began.elapsed(), "serving the pod");
                up.warn(uid, up.uncaptured.as_deref());
                self.machine.started(uid, netns.id());
                self.waiting.remove(uid);
                self.shared.telemetry.metrics.pods.started.increment(1);
                self.served.entries().insert(uid.to_owned(), Entry::Up(up));
                return Ok(());
            }
            Ok(Err(error)) => chain(&error),
            Err(stopped) => stopped.to_string(),
        };
        tracing::error!(uid, pod = %info, error = %why, "the pod cannot be served, and is tried again");
        self.machine.failed(uid);
        let entry = Entry::Pending { info: info.clone(), why: why.clone() };
        self.served.entries().insert(uid.to_owned(), entry);
        self.waiting.insert(uid.to_owned(), (info, netns));
        Err(why)
    }

    /// Stops serving a pod. What it has open goes on for as long as the settings say.
    async fn stop(&mut self, uid: &str) {
        self.waiting.remove(uid);
        self.machine.stopped(uid);
        let Some(Entry::Up(up)) = self.served.entries().remove(uid) else { return };
        self.shared.telemetry.metrics.pods.stopped.increment(1);
        let Up { info, sockets, tasks, .. } = up;
        tracing::info!(uid, pod = %info, "the pod is served no more");
        let (redirect, pod) = (Arc::clone(&self.shared.redirect), sockets.clone());
        withdraw(&info, move || redirect.remove(&pod)).await;
        let farewell = self.shared.config.farewell;
        if farewell.is_zero() {
            tasks.cancel();
        }
        let redirect = Arc::clone(&self.shared.redirect);
        self.tasks.spawn(move |_| async move {
            // Dropped, the drain ends what is left: nothing gets to or from a namespace without devices, and our
            // sockets would keep it.
            tokio::select! {
                _ = tasks.drain(farewell) => {}
                () = deserted(&sockets) => {}
            }
            finish(&info, &redirect, &sockets).await;
        });
    }

    /// Withdraws the capture of a pod that an earlier process served.
    async fn release(&self, uid: &str) {
        let (redirect, pod) = (Arc::clone(&self.shared.redirect), uid.to_owned());
        let act = move || match redirect.release(Some(&pod)) {
            Err(redirect::CaptureError::UnknownPod) => Ok(()),
            result => result.map(drop),
        };
        withdraw(&uid, act).await;
    }

    /// Withdraws what earlier processes captured, but for these.
    async fn prune(&self, named: Vec<String>) {
        let redirect = Arc::clone(&self.shared.redirect);
        withdraw(&"of an earlier process", move || redirect.prune(&named)).await;
    }

    async fn retry(&mut self) {
        let waiting: Vec<_> = self
            .waiting
            .iter()
            .map(|(uid, (info, netns))| (uid.clone(), info.clone(), netns.clone()))
            .collect();
        for (uid, info, netns) in waiting {
            // The reason is in the log and in the dump.
            let _still_failing = self.start(&uid, info, netns).await;
        }
    }

    fn publish(&self) {
        self.gate.set(self.machine.is_settled());
        let pods = &self.shared.telemetry.metrics.pods;
        self.served.count(pods);
        pods.pending.set(number(self.machine.pending()));
    }
}

/// Takes away what was left for the pod's connections: ours are over, those of another node proxy may not be.
async fn finish(pod: &PodInfo, redirect: &Arc<dyn Redirect>, sockets: &redirect::Pod) {
    let mut again = Backoff::new(Duration::from_millis(50), Duration::from_secs(10), 2.0, 0.0);
    loop {
        let (redirect, sockets) = (Arc::clone(redirect), sockets.clone());
        match withdraw(pod, move || redirect.finish(&sockets)).await {
            Some(false) => sleep(again.next_delay()).await,
            Some(true) | None => return,
        }
    }
}

/// Ends when nothing leads to the pod or from it any more: it is gone, and not only out of the mesh.
async fn deserted(sockets: &redirect::Pod) {
    let mut look = interval_at(Instant::now(), Duration::from_secs(1));
    while !sockets.is_deserted() {
        look.tick().await;
    }
}

async fn withdraw<T: Send + 'static>(
    pod: &(dyn fmt::Display + Sync),
    act: impl FnOnce() -> Result<T, redirect::CaptureError> + Send + 'static,
) -> Option<T> {
    let why = match tokio::task::spawn_blocking(act).await {
        Ok(Ok(done)) => return Some(done),
        Ok(Err(error)) => chain(&error),
        Err(stopped) => stopped.to_string(),
    };
    tracing::warn!(%pod, error = %why, "the pod's capture could not be withdrawn");
    None
}

/// An error and its causes, outermost first.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// A count as a gauge takes it.
pub(super) fn number(count: usize) -> f64 {
    u32::try_from(count).map_or(f64::INFINITY, f64::from)
}
