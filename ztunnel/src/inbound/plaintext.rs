//! Connections that come to a pod outside of any tunnel. Nobody vouches for the client, so that
//! STRICT, which arrives as a policy against flows without an identity, refuses them.

use super::{Both, Down, Ready, Refusal, closed_by_policy};
use crate::{
    connections::{Carrier, Direction, Live, Original},
    outbound::PlanConfig,
    pod::{Pod, Refused},
    policy_watch::{Facts, PolicyWatch},
    telemetry::{Connection, Ends, Identity, Place, Reporter, Source, advise, explain},
};
use mesh_core::{Failure, NetworkAddress, Reason, Side};
use mesh_hbone::Tcp;
use mesh_policy::Permit;
use std::{
    net::{SocketAddr, TcpStream},
    sync::Arc,
};
use tokio::time::Instant;

/// A connection that came to the pod and we took.
#[derive(Debug)]
struct Captured {
    stream: TcpStream,
    peer: SocketAddr,
    destination: SocketAddr,
    began: Instant,
}

/// Takes a connection.
pub(crate) fn accepted(pod: &Arc<Pod>, stream: TcpStream, peer: SocketAddr) {
    let began = Instant::now();
    let destination: SocketAddr = match pod.shared.redirect.original_dst(&stream) {
        Ok(destination) => destination.into(),
        Err(error) => {
            tracing::debug!(%peer, %error, "the connection was gone before it was served");
            return;
        }
    };
    let owner = Arc::clone(pod);
    let captured = Box::new(Captured { stream, peer, destination, began });
    pod.tasks.spawn_on(pod.shared.workers.next(), move |_| async move {
        serve(&owner, captured).await;
    });
}

async fn serve(pod: &Pod, captured: Box<Captured>) {
    // Boxed, as in a tunnel: what is relayed need not hold on to how it was set up.
    let Some(mut ready) = Box::pin(prepare(pod, captured)).await else { return };
    let outcome = ready.forward().await;
    ready.connection.finish(outcome);
}

/// All that comes before the relay; `None` where the connection was refused before it was counted.
async fn prepare(pod: &Pod, captured: Box<Captured>) -> Option<Box<Ready>> {
    let Captured { stream, peer, destination, began } = *captured;
    let refuse = |reason, error: &str| {
        let reporter = Reporter::Destination;
        pod.refuse(&Refused { reporter, source: peer, destination, reason, error });
    };
    if PlanConfig::is_own_port(destination.port()) {
        let why = Refusal::Recursive;
        let text = advise(why.to_string(), Side::Downstream, why.reason());
        refuse(why.word(), &text);
        return None;
    }
    let workload = match pod.workload().await {
        Ok(workload) => workload,
        Err(failure) => {
            refuse(failure.reason.word(), &explain(&failure));
            return None;
        }
    };
    let client = NetworkAddress { network: workload.network.clone(), ip: peer.ip() };
    let (source, service) = pod.shared.state.read(|view| {
        let service = view.service_on_port(&workload, destination.port());
        (view.workload_at(&client), service)
    });
    let ends = Ends {
        reporter: Reporter::Destination,
        source: source.map_or(Source::Unknown, Source::Workload),
        identity: Identity::None,
        destination: Some(workload),
        service,
        mutual_tls: false,
    };
    let place = Place { source: peer, destination, authority: None };
    let connection = Connection::open(&pod.shared.telemetry, ends, place, began);
    let listed = pod.connections.list(Live {
        direction: Direction::Inbound,
        source: peer,
        original: Original::Unknown,
        actual: destination,
        carrier: Carrier::Tcp,
    });
    let facts = Facts::new(peer.ip(), None, destination);
    let mut watch = PolicyWatch::new(pod.enrolment.policies.clone(), facts)
        .telling(pod.shared.config.policy_log);
    let ends = match watch.admit().await {
        Ok(permit) => tokio::select! {
            ends = connect(pod, permit, stream, (peer, destination)) => ends,
            denial = watch.revoked() => Err(closed_by_policy(denial)),
        },
        Err(denial) => Err(pod.denied(denial)),
    };
    Some(Box::new(Ready { connection, watch, ends: ends.map(Some), _listed: listed }))
}

/// Connects to the application.
async fn connect(
    pod: &Pod,
    permit: Permit,
    stream: TcpStream,
    (peer, destination): (SocketAddr, SocketAddr),
) -> Result<Box<Both>, Failure> {
    let up = pod.dial(Some(peer), destination).await?;
    let down = Tcp::new(stream).map_err(|error| Failure::downstream(Reason::Reset, error))?;
    Ok(Box::new(Both { permit, down: Down::Plain(down), up }))
}

/// What the task of a connection holds.
#[cfg(test)]
pub(super) fn held() -> usize {
    fn future<B, F>(_: impl Fn(&'static Pod, B) -> F) -> usize {
        size_of::<F>()
    }
    future(serve)
}
