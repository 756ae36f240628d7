//! The pods that this node proxy serves: how they come and go, and what each one owns.

pub mod manager;
pub(crate) mod own;
pub mod protocol;
pub mod reconcile;
pub(crate) mod served;

use crate::{
    connections::Connections,
    demand::Demand,
    inbound,
    names::Names,
    outbound::{self, PlanConfig},
    telemetry::{Reporter, Telemetry},
};
use mesh_core::{Failure, NetworkId, PeerAddr, Reason, SpiffeId, Workload};
use mesh_hbone::{Pool, Settings};
use mesh_identity::{Certificates, Held, WorkloadCertificate};
use mesh_platform::{
    netns::Netns,
    redirect::{self, CaptureError, Door, Redirect},
};
use mesh_runtime::{
    net::{Listener, accept_until},
    tasks::{Draining, Tasks},
    threads::Workers,
};
use mesh_state::{Enrolment, Handle, PodInfo};
use mesh_xds::Known;
use std::{
    fmt,
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{sync::watch, time::timeout};
use tokio_util::sync::CancellationToken;
use tracing::Level;

/// How long a connection waits for the control plane to say who its pod is.
const PATIENCE: Duration = Duration::from_secs(5);

/// The settings of every pod's data path.
#[derive(Clone, Debug)]
pub struct DataPath {
    /// How tunnels are set up.
    pub hbone: Settings,
    /// What outbound planning knows.
    pub plan: PlanConfig,
    /// The network of this node.
    pub network: NetworkId,
    /// Whether answers describe the workload that took the tunnel.
    pub response_baggage: bool,
    /// Whether applications that take the PROXY protocol are reached on loopback.
    pub localhost_tunnel: bool,
    /// At which level it is logged what each policy says of a connection.
    pub policy_log: Level,
    /// How long the open connections of a pod that has left the mesh go on.
    pub farewell: Duration,
    /// How long a process that is told to stop goes on accepting for one that takes over.
    pub patience: Duration,
}

/// What all pods share.
#[derive(Clone, Debug)]
pub(crate) struct Shared {
    pub(crate) config: Arc<DataPath>,
    pub(crate) state: Handle,
    pub(crate) certificates: Certificates,
    pub(crate) redirect: Arc<dyn Redirect>,
    pub(crate) workers: Workers,
    pub(crate) names: Names,
    pub(crate) demand: Demand,
    /// No pod is taken before, and no connection of one is planned or let in: see [`Known`].
    pub(crate) known: Known,
    pub(crate) telemetry: Telemetry,
    /// Answers names, if that is wanted.
    pub(crate) dns: Option<crate::dns::Names>,
}

/// A pod that is served. What belongs to it ends with it: its listeners, tunnels and connections.
pub(crate) struct Pod {
    pub(crate) shared: Shared,
    pub(crate) info: PodInfo,
    pub(crate) sockets: redirect::Pod,
    pub(crate) enrolment: Enrolment,
    pub(crate) pool: Pool,
    pub(crate) connections: Connections,
    pub(crate) tasks: Tasks,
    /// Who the pod is. Goes with the last connection: until then, there may be another tunnel.
    held: Mutex<Option<Held>>,
}

impl fmt::Debug for Pod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pod").field("info", &self.info).finish_non_exhaustive()
    }
}

/// The control plane has not said who the pod is.
#[derive(Clone, Debug)]
pub(crate) struct UnknownPod(PodInfo);

impl fmt::Display for UnknownPod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PodInfo { name, namespace, service_account } = &self.0;
        write!(
            f,
            "the control plane has not sent the workload of this pod ({namespace}/{name}, service \
             account {service_account}) within {} s: check that it is connected and knows the pod",
            PATIENCE.as_secs(),
        )
    }
}

impl std::error::Error for UnknownPod {}

impl Pod {
    /// Captures the pod and serves it from now on. Blocks for as long as the kernel takes.
    ///
    /// # Errors
    ///
    /// Returns why the pod cannot be captured.
    pub(crate) fn start(
        shared: &Shared,
        uid: &str,
        info: PodInfo,
        netns: &Netns,
        tasks: &Tasks,
    ) -> Result<(redirect::Pod, Connections), CaptureError> {
        let sockets = shared.redirect.enrol(uid, netns)?;
        let pod = Self::assemble(shared, sockets.clone(), info, tasks);
        pod.listen();
        Ok((sockets, pod.connections.clone()))
    }

    fn assemble(
        shared: &Shared,
        sockets: redirect::Pod,
        info: PodInfo,
        tasks: &Tasks,
    ) -> Arc<Self> {
        Arc::new(Self {
            enrolment: shared.state.enrol(info.clone()),
            shared: shared.clone(),
            info,
            sockets,
            pool: Pool::new(shared.config.hbone.clone(), tasks.child()),
            connections: Connections::default(),
            tasks: tasks.child(),
            held: Mutex::default(),
        })
    }

    fn listen(self: &Arc<Self>) {
        let Some(listeners) = self.sockets.take_listeners() else { return };
        let worker = self.shared.workers.next();
        let follow = self.sockets.follow();
        self.tasks.spawn_on(worker, |draining| async move {
            tokio::select! {
                () = follow => {}
                () = draining.stopping() => {}
            }
        });
        let pod = Arc::clone(self);
        self.tasks.spawn_on(worker, |draining| async move { pod.warm(draining).await });
        // What is queued at a listener is lost when it is closed: the drain closes them once a successor has
        // taken the pod over, and nobody is queued any more.
        let closing = CancellationToken::new();
        let (yielded, close) =
            (self.sockets.yielded(self.shared.config.patience), closing.clone().drop_guard());
        self.tasks.spawn_on(worker, |draining| async move {
            draining.stopping().await;
            yielded.await;
            drop(close);
        });
        if let (Some(names), Some(dns)) = (&self.shared.dns, self.sockets.take_dns()) {
            crate::dns::serve(self, names, dns, &closing);
        }
        self.accept_until(Door::Outbound, (listeners.outbound, &closing), outbound::accepted);
        self.accept_until(
            Door::Inbound,
            (listeners.inbound, &closing),
            inbound::plaintext::accepted,
        );
        self.accept_until(Door::Hbone, (listeners.hbone, &closing), inbound::accepted);
    }

    /// Has the certificate ready before the first connection wants it.
    async fn warm(&self, draining: Draining) {
        let mut workload = self.enrolment.workload.clone();
        loop {
            let identity = workload.borrow_and_update().as_ref().map(|w| w.identity.clone());
            self.hold(identity);
            tokio::select! {
                changed = workload.changed() => if changed.is_err() { return },
                () = draining.stopping() => return,
            }
        }
    }

    /// Keeps the certificate of this identity, and not that of the one before.
    fn hold(&self, identity: Option<SpiffeId>) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if held.as_ref().map(Held::identity) != identity.as_ref() {
            *held = identity.map(|identity| self.shared.certificates.hold(identity));
        }
    }

    /// Accepts until the drain begins.
    fn accept(
        self: &Arc<Self>,
        door: Door,
        listener: TcpListener,
        serve: fn(&Arc<Self>, std::net::TcpStream, SocketAddr),
    ) {
        let closing = CancellationToken::new();
        let close = closing.clone().drop_guard();
        self.tasks.spawn_on(self.shared.workers.next(), |draining| async move {
            draining.stopping().await;
            drop(close);
        });
        self.accept_until(door, (listener, &closing), serve);
    }

    fn accept_until(
        self: &Arc<Self>,
        door: Door,
        (listener, closing): (TcpListener, &CancellationToken),
        serve: fn(&Arc<Self>, std::net::TcpStream, SocketAddr),
    ) {
        let pod = Arc::clone(self);
        let worker = self.shared.workers.next();
        let closing = closing.clone();
        self.tasks.spawn_on(worker, move |_| async move {
            let taken = |stream: std::net::TcpStream, peer: SocketAddr| {
                serve(&pod, stream, PeerAddr::from(peer).into());
            };
            let accepted = match Listener::from_socket(listener) {
                Ok(listener) => accept_until(listener, || closing.cancelled(), taken).await,
                Err(error) => Err(error),
            };
            if let Err(error) = accepted {
                tracing::error!(pod = %pod.info, ?door, %error, "a listener of the pod failed");
            }
        });
    }

    /// The workload of this pod, if the control plane has sent it, and all that there is besides.
    pub(crate) fn workload_now(&self) -> Option<Arc<Workload>> {
        if !self.shared.known.is() {
            return None;
        }
        self.enrolment.workload.borrow().clone()
    }

    /// The workload of this pod; the control plane is given 5 s to send it, and all that there is besides.
    ///
    /// # Errors
    ///
    /// Returns a failure once they are over.
    pub(crate) async fn workload(&self) -> Result<Arc<Workload>, Failure> {
        let mut workload: watch::Receiver<_> = self.enrolment.workload.clone();
        let wait = async {
            self.shared.known.wait().await;
            workload.wait_for(Option::is_some).await.ok()?.clone()
        };
        match timeout(PATIENCE, wait).await {
            Ok(Some(workload)) => Ok(workload),
            Ok(None) | Err(_) => Err(Failure {
                side: mesh_core::Side::Local,
                reason: Reason::NoUpstream,
                source: Some(Box::new(UnknownPod(self.info.clone()))),
            }),
        }
    }

    /// The certificate of this pod.
    ///
    /// # Errors
    ///
    /// Returns a failure where it is not to be had.
    pub(crate) async fn certificate(
        &self,
        workload: &Workload,
    ) -> Result<Arc<WorkloadCertificate>, Failure> {
        self.shared.certificates.get(&workload.identity).await.map_err(|error| Failure {
            side: mesh_core::Side::Local,
            reason: Reason::Identity,
            source: Some(Box::new(error)),
        })
    }

    /// Reports a connection that is refused before it is counted.
    pub(crate) fn refuse(&self, refused: &Refused<'_>) {
        let telemetry = &self.shared.telemetry;
        telemetry.metrics.refused(refused.reporter, refused.reason);
        if telemetry.log.enabled(Level::WARN) {
            telemetry.log.line(Level::WARN, "connection failed", |fields| {
                fields.addr("src.addr", refused.source);
                fields.addr("dst.addr", refused.destination);
                fields.str(
                    "direction",
                    match refused.reporter {
                        Reporter::Source => "outbound",
                        Reporter::Destination => "inbound",
                    },
                );
                fields.str("error", refused.error);
            });
        }
    }
}

/// A connection that is refused before it is counted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Refused<'a> {
    pub(crate) reporter: Reporter,
    pub(crate) source: SocketAddr,
    pub(crate) destination: SocketAddr,
    /// A word for the metric.
    pub(crate) reason: &'static str,
    /// A sentence for the log.
    pub(crate) error: &'a str,
}

/// Serves the one workload of dedicated mode, whose network namespace is ours.
///
/// # Errors
///
/// Returns why it cannot be served.
pub(crate) fn dedicated(shared: &Shared, info: PodInfo, tasks: &Tasks) -> anyhow::Result<()> {
    let netns = Netns::current()?;
    let uid = info.to_string().replace('/', "-");
    Pod::start(shared, &uid, info, &netns, tasks)?;
    Ok(())
}
