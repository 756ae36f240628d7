//! From a tunnel to the application: accept, verify, subscribe, decide, dial, relay.

pub mod plaintext;
mod resolve;

pub use resolve::{Refusal, Target, resolve};

use crate::{
    connections::{Carrier, Direction, Live},
    outbound::{CONNECT_TIMEOUT, baggage},
    pod::{Pod, Refused},
    policy_watch::{Facts, PolicyWatch},
    telemetry::{Connection, Ends, Place, Reporter, Source, explain},
};
use mesh_core::{Failure, NetworkAddress, Reason, SpiffeId, Workload};
use mesh_hbone::{
    Duplex, Meter, ResponseHead, Tcp, TunnelRequest, relay,
    server::{self, Incoming},
};
use mesh_identity::verify::peer_identity;
use mesh_policy::{Denial, Permit};
use mesh_runtime::tasks::Draining;
use std::{
    fmt, io,
    net::{SocketAddr, TcpStream},
    sync::Arc,
};
use tokio::time::{Instant, timeout};

/// What all streams of one tunnel have in common.
#[derive(Debug)]
struct Tunnel {
    pod: Arc<Pod>,
    workload: Arc<Workload>,
    peer: SocketAddr,
    local: SocketAddr,
    identity: Option<SpiffeId>,
}

/// Takes a tunnel. It stays, with all its streams, on one worker.
pub(crate) fn accepted(pod: &Arc<Pod>, stream: TcpStream, peer: SocketAddr) {
    let owner = Arc::clone(pod);
    let worker = pod.shared.workers.next();
    pod.tasks.spawn_on(worker, move |draining| async move {
        let local = match owner.shared.redirect.original_dst(&stream) {
            Ok(local) => local.into(),
            Err(error) => {
                tracing::debug!(%peer, %error, "the tunnel was gone before it was served");
                return;
            }
        };
        match handshake(&owner, stream).await {
            Ok((workload, connection)) => {
                let identity = peer_identity(connection.peer_certificates());
                let tunnel = Arc::new(Tunnel { pod: owner, workload, peer, local, identity });
                streams(&tunnel, connection, draining).await;
            }
            Err(failure) => owner.refuse(&Refused {
                reporter: Reporter::Destination,
                source: peer,
                destination: local,
                reason: failure.reason.word(),
                error: &explain(&failure),
            }),
        }
    });
}

async fn handshake(
    pod: &Pod,
    stream: TcpStream,
) -> Result<(Arc<Workload>, server::Connection), Failure> {
    let workload = pod.workload().await?;
    let certificate = pod.certificate(&workload).await?;
    let tls = certificate.server_config();
    let connection = server::handshake(stream, tls, &pod.shared.config.hbone).await?;
    Ok((workload, connection))
}

/// Serves the streams of a tunnel until it ends.
async fn streams(tunnel: &Arc<Tunnel>, mut connection: server::Connection, draining: Draining) {
    let mut stopping = false;
    loop {
        tokio::select! {
            incoming = connection.next() => match incoming {
                Some(Ok(incoming)) => {
                    let served = Arc::clone(tunnel);
                    tunnel.pod.tasks.spawn(move |_| async move { served.serve(incoming).await });
                }
                Some(Err(error)) => {
                    tracing::debug!(peer = %tunnel.peer, %error, "the tunnel broke");
                    return;
                }
                None => return,
            },
            () = draining.stopping(), if !stopping => {
                stopping = true;
                connection.shutdown_gracefully();
            }
        }
    }
}

impl Tunnel {
    async fn serve(&self, incoming: Incoming) {
        let began = Instant::now();
        let request = match &incoming.request {
            Ok(request) => request.clone(),
            Err(error) => {
                self.refuse(&error.to_string(), "malformed");
                incoming.refuse(400);
                return;
            }
        };
        let target = self.pod.shared.state.read(|view| {
            resolve(view, &self.pod.shared.config.inbound, &self.workload, self.local, &request)
        });
        match target {
            Ok(target) => self.connect(incoming, request, target, began).await,
            Err(refusal) => {
                self.refuse(&refusal.to_string(), refusal.word());
                incoming.refuse(refusal.status());
            }
        }
    }

    fn refuse(&self, error: &str, reason: &'static str) {
        self.pod.refuse(&Refused {
            reporter: Reporter::Destination,
            source: self.peer,
            destination: self.local,
            reason,
            error,
        });
    }

    async fn connect(
        &self,
        incoming: Incoming,
        request: TunnelRequest,
        target: Target,
        began: Instant,
    ) {
        let ends = self.ends(&request, &target);
        let place = Place {
            source: self.peer,
            destination: self.local,
            authority: Some(request.authority.to_string().into()),
        };
        let connection = Connection::open(&self.pod.shared.telemetry, ends, place, began);
        let _listed = self.pod.connections.list(Live {
            direction: Direction::Inbound,
            source: self.peer,
            original: request.forwarded.host.as_ref().map(|host| host.as_str().into()),
            actual: target.address,
            carrier: Carrier::Hbone,
        });
        let facts = Facts::new(self.peer.ip(), self.identity.clone(), target.address);
        let mut watch = PolicyWatch::new(self.pod.enrolment.policies.clone(), facts);
        let outcome = match watch.admit().await {
            Ok(permit) => {
                let up = self.dial(&target);
                let relayed = async {
                    let up = match up.await {
                        Ok(up) => up,
                        Err(failure) => {
                            incoming.refuse(failure.reason.report().status);
                            return Err(failure);
                        }
                    };
                    let down = incoming
                        .accept(&self.answer())
                        .map_err(|error| Failure::downstream(Reason::Reset, error))?;
                    forward(permit, down, up, connection.meter()).await
                };
                tokio::select! {
                    outcome = relayed => outcome,
                    denial = watch.revoked() => Err(closed_by_policy(denial)),
                }
            }
            Err(denial) => {
                incoming.refuse(401);
                Err(self.pod.denied(denial))
            }
        };
        connection.finish(outcome);
    }

    fn ends(&self, request: &TunnelRequest, target: &Target) -> Ends {
        let network = self.workload.network.clone();
        let foreign = request
            .forwarded_network
            .as_ref()
            .is_some_and(|theirs| !theirs.as_str().eq_ignore_ascii_case(network.as_str()));
        let known = if foreign {
            None
        } else {
            let address = NetworkAddress { network, ip: self.peer.ip() };
            self.pod.shared.state.read(|view| view.workload_at(&address))
        };
        let source = match (known, &request.baggage) {
            (Some(workload), _) => Source::Workload(workload),
            (None, Some(baggage)) => Source::Told(Box::new(baggage.clone())),
            (None, None) => Source::Unknown,
        };
        Ends {
            reporter: Reporter::Destination,
            source,
            source_identity: self.identity.clone(),
            destination: Some(Arc::clone(&self.workload)),
            service: target.service.clone(),
            mutual_tls: true,
        }
    }

    fn answer(&self) -> ResponseHead {
        let told = self.pod.shared.config.response_baggage;
        ResponseHead { baggage: told.then(|| baggage(&self.workload)) }
    }

    async fn dial(&self, target: &Target) -> Result<Tcp, Failure> {
        self.pod.dial(self.peer, target.address).await
    }
}

impl Pod {
    /// Connects to the application, which sees the client's address where that can be had.
    async fn dial(&self, client: SocketAddr, to: SocketAddr) -> Result<Tcp, Failure> {
        let fail = |error| Failure::upstream(Reason::Connect, ConnectError(error));
        let connect = self.shared.redirect.to_application(&self.sockets, Some(client), to);
        let stream = timeout(CONNECT_TIMEOUT, connect)
            .await
            .map_err(|_elapsed| fail(io::ErrorKind::TimedOut.into()))?
            .map_err(fail)?;
        Tcp::new(stream).map_err(fail)
    }

    /// A refusal by policy, counted where it is for want of one.
    fn denied(&self, denial: Denial) -> Failure {
        let metrics = &self.shared.telemetry.metrics;
        match &denial {
            Denial::Missing(policy) => metrics.policy_unavailable(policy.as_str(), "missing"),
            Denial::Rejected(policy) => metrics.policy_unavailable(policy.as_str(), "rejected"),
            Denial::Denied(_) | Denial::NotAllowed => {}
        }
        Failure::downstream(Reason::Denied, PolicyRejection(denial))
    }
}

/// The flow may proceed: only the permit says so.
async fn forward(
    permit: Permit,
    down: impl Duplex,
    up: Tcp,
    meter: &impl Meter,
) -> Result<(), Failure> {
    tracing::trace!(policies = permit.version(), "permitted");
    relay(down, up, meter).await
}

fn closed_by_policy(denial: Denial) -> Failure {
    Failure::local_because(Reason::Denied, PolicyChange(denial))
}

/// In Istio's words, with ours behind them.
#[derive(Debug)]
struct PolicyRejection(Denial);

impl fmt::Display for PolicyRejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "connection closed due to policy rejection: {}", self.0)
    }
}

impl std::error::Error for PolicyRejection {}

/// In Istio's words, with ours behind them.
#[derive(Debug)]
struct PolicyChange(Denial);

impl fmt::Display for PolicyChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "connection closed due to policy change: {}", self.0)
    }
}

impl std::error::Error for PolicyChange {}

/// In Istio's words.
#[derive(Debug)]
struct ConnectError(io::Error);

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "connection failed: {}", self.0)
    }
}

impl std::error::Error for ConnectError {}
