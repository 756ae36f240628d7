//! From a message to its reply.

use crate::{
    Dial, Metrics, Settings, Transport,
    forward::forward,
    message::{Parsed, Query, outcome, parse},
    metrics::labels,
    resolve::{Answer, Local, is_known, resolve},
};
use hickory_proto::op::ResponseCode;
use mesh_core::Workload;
use mesh_state::Handle;
use std::{net::SocketAddr, slice, sync::Arc};
use tokio::time::Instant;

/// Answers for all pods.
#[derive(Debug)]
pub struct Resolver {
    settings: Settings,
    state: Handle,
    metrics: Metrics,
}

/// What is to be done about a message.
#[derive(Debug)]
pub enum Step {
    /// Send this.
    Reply(Vec<u8>),
    /// Somebody else may know: [`Resolver::forward`] it.
    Forward(Box<Unanswered>),
    /// Nothing: it is noise.
    Ignore,
}

/// A query that is not ours to answer.
#[derive(Debug)]
pub struct Unanswered {
    query: Query,
    message: Vec<u8>,
    client: Arc<Workload>,
    /// It has addresses from us.
    known: bool,
}

impl Unanswered {
    /// The reply where nobody can be asked.
    #[must_use]
    pub fn failure(&self) -> Vec<u8> {
        self.query.failure()
    }
}

impl Resolver {
    /// With these settings.
    #[must_use]
    pub const fn new(settings: Settings, state: Handle, metrics: Metrics) -> Self {
        Self { settings, state, metrics }
    }

    /// Answers a message from this client, if we can; an unknown client is not answered.
    #[must_use]
    pub fn ask(
        &self,
        message: &[u8],
        transport: Transport,
        client: Option<&Arc<Workload>>,
    ) -> Step {
        let query = match parse(message, transport) {
            Parsed::Query(query) => query,
            Parsed::Refused(reply) => return Step::Reply(reply),
            Parsed::Noise => return Step::Ignore,
        };
        let Some(client) = client else { return Step::Reply(query.failure()) };
        self.metrics.asked(&labels(&query.kind(), transport, client));
        let local = match query.family() {
            Some(family) => {
                let (settings, seed) = (&self.settings, fastrand::u64(..));
                let asked = (query.name.as_str(), family);
                self.state.read(|view| resolve(view, client, settings, asked, seed))
            }
            None => Answer::Forward,
        };
        match local {
            Answer::Local(local) => {
                log(&query, client, what(&local), local.ips.len());
                Step::Reply(query.local(&local))
            }
            Answer::Forward => {
                let known = query.family().is_none() && self.is_known(&query, client);
                let (message, client) = (message.to_vec(), Arc::clone(client));
                Step::Forward(Box::new(Unanswered { query, message, client, known }))
            }
        }
    }

    fn is_known(&self, query: &Query, client: &Workload) -> bool {
        self.state.read(|view| is_known(view, client, &self.settings, &query.name))
    }

    /// Has the server that was asked, or those of the settings, answer. There is always a reply.
    ///
    /// # Cancel safety
    ///
    /// Dropping it gives the query up.
    pub async fn forward(
        &self,
        unanswered: &Unanswered,
        asked: Option<SocketAddr>,
        dial: &impl Dial,
    ) -> Vec<u8> {
        let Unanswered { query, message, client, known } = unanswered;
        let servers = asked.as_ref().map_or(&*self.settings.servers, slice::from_ref);
        let began = Instant::now();
        let result = forward(query, message, servers, dial).await;
        let outcome = result.as_ref().ok().and_then(|reply| outcome(reply));
        let brought = outcome.is_some_and(|it| it.code == ResponseCode::NoError && it.answers > 0);
        let labels = labels(&query.kind(), query.transport, client);
        self.metrics.forwarded(&labels, began.elapsed(), brought);
        match result {
            Ok(reply) => {
                let answers = outcome.map_or(0, |outcome| usize::from(outcome.answers));
                log(query, client, "forwarded", answers);
                let missing = outcome.is_some_and(|it| it.code == ResponseCode::NXDomain);
                if missing && *known { query.empty() } else { query.forwarded(reply) }
            }
            Err(error) => {
                log(query, client, &format!("forwarding failed ({error})"), 0);
                query.failure()
            }
        }
    }
}

fn what(local: &Local) -> &'static str {
    match local {
        Local { unsupported: true, .. } => "the address family is not supported",
        Local { ips, .. } if ips.is_empty() => "no records",
        Local { .. } => "success",
    }
}

fn log(query: &Query, client: &Workload, result: &str, endpoints: usize) {
    tracing::event!(
        target: "dns",
        tracing::Level::DEBUG,
        src.workload = client.name.as_str(),
        src.namespace = client.identity.namespace.as_str(),
        query = query.kind(),
        domain = query.name,
        result,
        endpoints,
    );
}

#[cfg(test)]
mod tests;
