//! Connections that come to a pod outside of any tunnel. Nobody vouches for the client, so that
//! STRICT, which arrives as a policy against flows without an identity, refuses them.

use super::{Refusal, closed_by_policy, forward};
use crate::{
    connections::{Carrier, Direction, Live},
    outbound::PlanConfig,
    pod::{Pod, Refused},
    policy_watch::{Facts, PolicyWatch},
    telemetry::{Connection, Ends, Place, Reporter, Source, advise, explain},
};
use mesh_core::{Failure, NetworkAddress, Reason, Side};
use mesh_hbone::Tcp;
use std::{
    net::{SocketAddr, TcpStream},
    sync::Arc,
};
use tokio::time::Instant;

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
    pod.tasks.spawn_on(pod.shared.workers.next(), move |_| async move {
        serve(&owner, stream, peer, destination, began).await;
    });
}

async fn serve(
    pod: &Pod,
    stream: TcpStream,
    peer: SocketAddr,
    destination: SocketAddr,
    began: Instant,
) {
    let refuse = |reason, error: &str| {
        let reporter = Reporter::Destination;
        pod.refuse(&Refused { reporter, source: peer, destination, reason, error });
    };
    if PlanConfig::is_own_port(destination.port()) {
        let why = Refusal::Recursive;
        let text = advise(why.to_string(), Side::Downstream, why.reason());
        return refuse(why.word(), &text);
    }
    let workload = match pod.workload().await {
        Ok(workload) => workload,
        Err(failure) => return refuse(failure.reason.word(), &explain(&failure)),
    };
    let client = NetworkAddress { network: workload.network.clone(), ip: peer.ip() };
    let (source, service) = pod.shared.state.read(|view| {
        let service = view.service_on_port(&workload, destination.port());
        (view.workload_at(&client), service)
    });
    let ends = Ends {
        reporter: Reporter::Destination,
        source: source.map_or(Source::Unknown, Source::Workload),
        source_identity: None,
        destination: Some(workload),
        service,
        mutual_tls: false,
    };
    let place = Place { source: peer, destination, authority: None };
    let connection = Connection::open(&pod.shared.telemetry, ends, place, began);
    let _listed = pod.connections.list(Live {
        direction: Direction::Inbound,
        source: peer,
        original: None,
        actual: destination,
        carrier: Carrier::Tcp,
    });
    let facts = Facts::new(peer.ip(), None, destination);
    let mut watch = PolicyWatch::new(pod.enrolment.policies.clone(), facts)
        .telling(pod.shared.config.policy_log);
    let outcome = match watch.admit().await {
        Ok(permit) => {
            let relayed = async {
                let up = pod.dial(Some(peer), destination).await?;
                let down =
                    Tcp::new(stream).map_err(|error| Failure::downstream(Reason::Reset, error))?;
                forward(permit, down, up, connection.meter()).await
            };
            tokio::select! {
                outcome = relayed => outcome,
                denial = watch.revoked() => Err(closed_by_policy(denial)),
            }
        }
        Err(denial) => Err(pod.denied(denial)),
    };
    connection.finish(outcome);
}
