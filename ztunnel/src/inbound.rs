//! From a tunnel to the application: accept, verify, subscribe, decide, dial, relay.

pub mod plaintext;
mod resolve;

pub use resolve::{Ask, Refusal, Target, resolve};

use crate::{
    connections::{Carrier, Direction, Listed, Live, Original},
    handshake::{self, Revoked},
    outbound::{CONNECT_TIMEOUT, baggage},
    pod::{Pod, Refused},
    policy_watch::{Facts, Peer, PolicyWatch},
    telemetry::{Connection, Ends, Identity, Place, Reporter, Source, advise, explain},
};
use mesh_core::{Failure, NetworkAddress, Reason, Side, Workload};
use mesh_hbone::{
    Duplex, Meter, ResponseHead, Stream, Tcp, TunnelRequest, proxy_protocol, relay,
    server::{self, Incoming},
};
use mesh_identity::{
    crl::{self, Tracked},
    verify::peer_identity,
};
use mesh_policy::{Denial, Permit};
use mesh_runtime::tasks::Draining;
use std::{
    fmt, io, mem,
    net::{SocketAddr, TcpStream},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};
use tokio::time::{Instant, timeout};

/// What all streams of one tunnel have in common.
#[derive(Debug)]
struct Tunnel {
    pod: Arc<Pod>,
    workload: Arc<Workload>,
    peer: SocketAddr,
    local: SocketAddr,
    identity: Option<Arc<Peer>>,
    /// Set before the tunnel is closed because of its peer's certificates.
    revoked: AtomicBool,
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
        match Box::pin(handshake(&owner, stream)).await {
            Ok(Shaken { workload, connection, tracked }) => {
                let identity = peer_identity(connection.peer_certificates());
                let identity = identity.map(|identity| Arc::new(Peer::new(identity)));
                let revoked = AtomicBool::new(false);
                let tunnel = Tunnel { pod: owner, workload, peer, local, identity, revoked };
                Box::pin(streams(&Arc::new(tunnel), (connection, tracked), draining)).await;
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

/// A tunnel whose peer is known.
struct Shaken {
    workload: Arc<Workload>,
    connection: server::Connection,
    tracked: Tracked,
}

async fn handshake(pod: &Pod, stream: TcpStream) -> Result<Shaken, Failure> {
    let workload = pod.workload().await?;
    let certificate = pod.certificate(&workload).await?;
    let tls = certificate.server_config();
    let settings = &pod.shared.config.hbone;
    let metrics = &pod.shared.telemetry.metrics;
    let connection = Box::pin(server::handshake(stream, tls, settings))
        .await
        .map_err(|failure| handshake::inbound_failed(metrics, failure))?;
    handshake::done(metrics, Reporter::Destination);
    let chain = connection.peer_certificates();
    let tracked = pod.shared.certificates.track(&certificate, chain, crl::Peer::Client);
    Ok(Shaken { workload, connection, tracked })
}

/// Serves the streams of a tunnel until it ends.
async fn streams(
    tunnel: &Arc<Tunnel>,
    (mut connection, mut tracked): (server::Connection, Tracked),
    draining: Draining,
) {
    let mut stopping = false;
    loop {
        tokio::select! {
            incoming = connection.next() => match incoming {
                Some(Ok(incoming)) => {
                    let served = Arc::clone(tunnel);
                    let incoming = Box::new(incoming);
                    tunnel.pod.tasks.spawn(move |_| async move { served.serve(incoming).await });
                }
                Some(Err(error)) => {
                    tracing::debug!(peer = %tunnel.peer, %error, "the tunnel broke");
                    return;
                }
                None => return,
            },
            () = tracked.revoked(), if !tunnel.is_revoked() => {
                tracing::warn!(peer = %tunnel.peer, "tunnel closed: a certificate of the peer's chain is revoked");
                // Said before its streams fail, so that they can say why.
                tunnel.revoked.store(true, Ordering::Release);
                connection.shutdown_now();
            }
            () = draining.stopping(), if !stopping => {
                stopping = true;
                connection.shutdown_gracefully();
            }
        }
    }
}

impl Tunnel {
    fn is_revoked(&self) -> bool {
        self.revoked.load(Ordering::Acquire)
    }

    async fn serve(&self, incoming: Box<Incoming>) {
        // Boxed, as are the parts of what is ready: a connection that is relayed need not hold on to how it was
        // set up, and what the task of a held connection takes is what a node with many of them takes.
        let Some(mut ready) = Box::pin(self.prepare(incoming)).await else { return };
        let outcome = ready.forward().await;
        let connection = ready.connection;
        if outcome.is_err() && self.is_revoked() {
            return connection.finish(Err(Failure::downstream(Reason::Revoked, Revoked)));
        }
        connection.finish(outcome);
    }

    /// All that comes before the relay; `None` where the stream was refused before it was counted.
    async fn prepare(&self, incoming: Box<Incoming>) -> Option<Box<Ready>> {
        let began = Instant::now();
        let request = match &incoming.request {
            Ok(request) => request.clone(),
            Err(error) => {
                self.refuse(&error.to_string(), "malformed", Reason::Malformed);
                incoming.refuse(400);
                return None;
            }
        };
        let config = &self.pod.shared.config;
        let ask = Ask {
            local: &self.workload,
            address: self.local,
            authority: &request.authority,
            meant: request.forwarded.host.as_ref().map(|host| host.as_str()),
            network: &config.network,
            localhost_tunnel: config.localhost_tunnel,
        };
        match self.pod.shared.state.read(|view| resolve(view, ask)) {
            Ok(target) => Some(self.connect(incoming, &request, &target, began).await),
            Err(refusal) => {
                self.refuse(&refusal.to_string(), refusal.word(), refusal.reason());
                incoming.refuse(refusal.status());
                None
            }
        }
    }

    fn refuse(&self, error: &str, word: &'static str, reason: Reason) {
        self.pod.refuse(&Refused {
            reporter: Reporter::Destination,
            source: self.peer,
            destination: self.local,
            reason: word,
            error: &advise(error.to_owned(), Side::Downstream, reason),
        });
    }

    async fn connect(
        &self,
        incoming: Box<Incoming>,
        request: &TunnelRequest,
        target: &Target,
        began: Instant,
    ) -> Box<Ready> {
        let place = Place {
            source: self.peer,
            destination: self.local,
            authority: Some(request.authority.clone()),
        };
        let ends = self.ends(request, target);
        let connection = Connection::open(&self.pod.shared.telemetry, ends, place, began);
        let listed = self.pod.connections.list(Live {
            direction: Direction::Inbound,
            source: self.peer,
            original: meant(request, target),
            actual: target.address,
            carrier: Carrier::Hbone,
        });
        let facts = Facts::new(self.peer.ip(), self.identity.clone(), target.address);
        let mut watch = PolicyWatch::new(self.pod.enrolment.policies.clone(), facts)
            .telling(self.pod.shared.config.policy_log);
        let ends = match watch.admit().await {
            Ok(permit) => self.answer(incoming, permit, target).await,
            Err(denial) => {
                incoming.refuse(401);
                Err(self.pod.denied(denial))
            }
        };
        let ends = ends.map(Some);
        Box::new(Ready { connection, watch, ends, _listed: listed })
    }

    /// Connects to the application, and says so.
    async fn answer(
        &self,
        incoming: Box<Incoming>,
        permit: Permit,
        target: &Target,
    ) -> Result<Box<Both>, Failure> {
        match self.dial(target).await {
            Ok(up) => {
                let told = self.pod.shared.config.response_baggage;
                let head = ResponseHead { baggage: told.then(|| baggage(&self.workload)) };
                let gone = |error| Failure::downstream(Reason::Reset, error);
                let down = incoming.accept(&head).map_err(gone)?;
                Ok(Box::new(Both { permit, down: Down::Tunnel(down), up }))
            }
            Err(failure) => {
                incoming.refuse(failure.reason.report().status);
                Err(failure)
            }
        }
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
            identity: self.identity.clone().map_or(Identity::None, Identity::Peer),
            destination: Some(Arc::clone(&self.workload)),
            service: target.service.clone(),
            mutual_tls: true,
        }
    }

    async fn dial(&self, target: &Target) -> Result<Tcp, Failure> {
        // On loopback the client's address would not find its way back.
        let client = (!target.address.ip().is_loopback()).then_some(self.peer);
        let mut up = self.pod.dial(client, target.address).await?;
        if let Some(announced) = target.announce {
            let identity = self.identity.as_deref().map(|peer| &peer.identity);
            let header = proxy_protocol::header(self.peer, announced, identity);
            up.preface(&header)
                .await
                .map_err(|error| Failure::upstream(Reason::Connect, ConnectError(error)))?;
        }
        Ok(up)
    }
}

/// What the client says that it meant. A name that the state has, too, is not held twice.
fn meant(request: &TunnelRequest, target: &Target) -> Original {
    let Some(host) = &request.forwarded.host else { return Original::Unknown };
    let known = target.service.as_ref().map(|service| &service.key.hostname);
    Original::Host(known.filter(|known| *known == host).unwrap_or(host).clone())
}

/// A connection that was set up, or could not be: what is left is to relay it, and to report it.
#[derive(Debug)]
struct Ready {
    connection: Connection,
    watch: PolicyWatch,
    /// Both sides, until they are relayed: their place is let go of then.
    ends: Result<Option<Box<Both>>, Failure>,
    _listed: Listed,
}

impl Ready {
    /// Relays, for as long as policy lets it.
    async fn forward(&mut self) -> Result<(), Failure> {
        let Some(both) = mem::replace(&mut self.ends, Ok(None))? else { return Ok(()) };
        tokio::select! {
            outcome = both.forward(self.connection.meter()) => outcome,
            denial = self.watch.revoked() => Err(closed_by_policy(denial)),
        }
    }
}

/// The two sides of a connection, and why they may be one.
#[derive(Debug)]
struct Both {
    permit: Permit,
    down: Down,
    up: Tcp,
}

/// The client's side.
#[derive(Debug)]
enum Down {
    Tunnel(Stream),
    Plain(Tcp),
}

impl Both {
    #[expect(clippy::boxed_local, reason = "by value it would stay in the future of who calls")]
    fn forward<'a>(
        self: Box<Self>,
        meter: &'a impl Meter,
    ) -> Pin<Box<dyn Future<Output = Result<(), Failure>> + Send + 'a>> {
        let Self { permit, down, up } = *self;
        match down {
            Down::Tunnel(down) => Box::pin(forward(permit, down, up, meter)),
            Down::Plain(down) => Box::pin(forward(permit, down, up, meter)),
        }
    }
}

impl Pod {
    /// Connects to the application, which sees the client's address where that can be had.
    async fn dial(&self, client: Option<SocketAddr>, to: SocketAddr) -> Result<Tcp, Failure> {
        let fail = |error| Failure::upstream(Reason::Connect, ConnectError(error));
        let redirect = &self.shared.redirect;
        let connecting = redirect.to_application(&self.sockets, client, to).map_err(fail)?;
        let stream = timeout(CONNECT_TIMEOUT, connecting.established())
            .await
            .map_err(|_elapsed| fail(io::ErrorKind::TimedOut.into()))?
            .map_err(fail)?;
        Ok(Tcp::from(stream))
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
fn forward<'a>(
    permit: Permit,
    down: impl Duplex + Unpin + 'a,
    up: Tcp,
    meter: &'a impl Meter,
) -> impl Future<Output = Result<(), Failure>> + Send + 'a {
    tracing::trace!(policies = permit.version(), "permitted");
    relay(down, up, meter)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn future<A: 'static, B, F>(_: impl Fn(&'static A, B) -> F) -> usize {
        size_of::<F>()
    }

    /// What a connection that is only held takes here; a node has many.
    #[test]
    fn a_held_connection_is_small() {
        for (what, size) in
            [("in a tunnel", future(Tunnel::serve)), ("in plain text", plaintext::held())]
        {
            assert!(size <= 232, "{what}: {size} bytes in its task");
        }
        assert!(size_of::<Ready>() <= 344, "{} bytes beside it", size_of::<Ready>());
    }
}
