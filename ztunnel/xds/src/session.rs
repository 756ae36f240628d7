//! The incremental protocol of xDS as a state machine without a socket.
//!
//! ```text
//!              connect()                    receive(response)            next(), handled() …
//! disconnected ─────────► subscribed ──────────────────────────► Round ─────────┐
//!      ▲                   ▲   │ demand(name): one more subscription            │
//!      │ connection lost   │   └──────────► request                             │ finish()
//!      └───────────────────┴────────────────────────────────────────────────────┘ ACK or NACK
//! ```
//!
//! What was accepted is remembered by name and version for as long as the process lives, so that a new connection
//! claims it: the control plane then leaves out what we have and names what is gone.

mod known;
mod round;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};

use mesh_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use mesh_proto::google::rpc::Status;

use crate::{Node, Rejected};
use known::Known;
pub use round::{Chunk, Round};

/// A type of resource that we ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Workloads and services, in one stream.
    Address,
    /// L4 policies.
    Authorization,
}

impl Kind {
    /// In the order in which they are asked for.
    pub const ALL: [Self; 2] = [Self::Address, Self::Authorization];

    /// The type URL.
    #[must_use]
    pub const fn url(self) -> &'static str {
        match self {
            Self::Address => "type.googleapis.com/istio.workload.Address",
            Self::Authorization => "type.googleapis.com/istio.security.Authorization",
        }
    }

    /// The type of a URL.
    #[must_use]
    pub fn from_url(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.url() == url)
    }
}

/// What to send after a response was handled, and what follows from it.
#[derive(Debug)]
pub struct Answer {
    /// The acknowledgement, or the refusal that names what was not taken.
    pub request: DeltaDiscoveryRequest,
    /// The type, if this was its first response that was taken as a whole.
    pub first: Option<Kind>,
    /// Names that somebody asked for and that are now answered for, whether they exist or not.
    pub answered: Vec<String>,
    /// What was not taken.
    pub rejected: Vec<Rejected>,
    /// Sent after it: leaves names that were answered long ago.
    pub leave: Option<DeltaDiscoveryRequest>,
}

fn leave(names: Vec<String>) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: Kind::Address.url().to_owned(),
        resource_names_unsubscribe: names,
        ..DeltaDiscoveryRequest::default()
    }
}

/// One client's side of the protocol, over all its connections.
#[derive(Debug)]
pub struct Session {
    node: Node,
    on_demand: bool,
    addresses: Subscription,
    policies: Subscription,
    /// Names that were asked for and not answered yet.
    asked: HashSet<String>,
    /// Names that were asked for on this connection, and answered.
    followed: HashSet<String>,
}

/// How many answered names stay subscribed to: a pod may connect to any address of the world, and each is asked
/// for. Beyond, those that are not the name of a resource are left.
const MOST_FOLLOWED: usize = 4096;

/// One type's part.
#[derive(Debug, Default)]
struct Subscription {
    known: Known,
    acknowledged: bool,
}

impl Session {
    /// A client that has nothing yet. On demand, addresses are sent only when their names were asked for.
    #[must_use]
    pub fn new(node: Node, on_demand: bool) -> Self {
        Self {
            node,
            on_demand,
            addresses: Subscription::default(),
            policies: Subscription::default(),
            asked: HashSet::new(),
            followed: HashSet::new(),
        }
    }

    fn subscription(&mut self, kind: Kind) -> &mut Subscription {
        match kind {
            Kind::Address => &mut self.addresses,
            Kind::Authorization => &mut self.policies,
        }
    }

    /// The requests that open a connection: one per type, all sent before any answer.
    pub fn connect(&mut self) -> Vec<DeltaDiscoveryRequest> {
        self.followed.clear();
        Kind::ALL
            .into_iter()
            .map(|kind| {
                // To subscribe to everything and to leave it again in one message is to say: by name, none yet.
                let explicit = self.on_demand && kind == Kind::Address;
                let star = if explicit { vec!["*".to_owned()] } else { Vec::new() };
                let mut versions = self.subscription(kind).known.versions();
                if explicit {
                    // Claimed without a version, they are what subscribes to them again.
                    versions.extend(self.asked.iter().map(|name| (name.clone(), String::new())));
                }
                DeltaDiscoveryRequest {
                    node: Some(self.node.message()),
                    type_url: kind.url().to_owned(),
                    resource_names_subscribe: star.clone(),
                    resource_names_unsubscribe: star,
                    initial_resource_versions: versions,
                    ..DeltaDiscoveryRequest::default()
                }
            })
            .collect()
    }

    /// Asks for an address by name, on demand. Nothing to send if it is asked for already, or if everything is
    /// subscribed to and will come by itself.
    ///
    /// istiod answers a subscription only if it is new, and does not always say when an address that it had
    /// answered for gets another owner. So a name that was answered before is first left, and asked for anew.
    pub fn demand(&mut self, name: &str) -> Vec<DeltaDiscoveryRequest> {
        if !self.on_demand || !self.asked.insert(name.to_owned()) {
            return Vec::new();
        }
        let subscribe = DeltaDiscoveryRequest {
            type_url: Kind::Address.url().to_owned(),
            resource_names_subscribe: vec![name.to_owned()],
            ..DeltaDiscoveryRequest::default()
        };
        if self.followed.remove(name) {
            vec![leave(vec![name.to_owned()]), subscribe]
        } else {
            vec![subscribe]
        }
    }

    /// Takes note that a name was answered. Returns what is to be left, when there are too many.
    fn follow(&mut self, names: &[String]) -> Option<DeltaDiscoveryRequest> {
        self.followed.extend(names.iter().cloned());
        if self.followed.len() <= MOST_FOLLOWED {
            return None;
        }
        let known = &self.addresses.known;
        // By the name of a resource, its changes are told.
        let left: Vec<_> = self.followed.extract_if(|name| !known.has(name)).collect();
        (!left.is_empty()).then(|| leave(left))
    }

    /// Begins to take a response. Its chunks are to be handled in order, and then [`Session::finish`]ed.
    #[must_use]
    pub fn receive(&self, response: DeltaDiscoveryResponse) -> Round {
        Round::new(response, self.on_demand)
    }

    /// The next resources of a round to hand over, if any. What is unchanged is passed over.
    pub fn next(&self, round: &mut Round) -> Option<Chunk> {
        round.next(|kind, name, print| match kind {
            Kind::Address => self.addresses.known.is(name, print),
            Kind::Authorization => self.policies.known.is(name, print),
        })
    }

    /// Takes note of a round all of whose chunks were handled, and says what to answer.
    pub fn finish(&mut self, round: Round) -> Answer {
        let outcome = round.finish();
        let mut answer = Answer {
            request: DeltaDiscoveryRequest {
                type_url: outcome.type_url,
                response_nonce: outcome.nonce,
                ..DeltaDiscoveryRequest::default()
            },
            first: None,
            answered: Vec::new(),
            rejected: outcome.rejected,
            leave: None,
        };
        if let Some(kind) = outcome.kind {
            let subscription = self.subscription(kind);
            for name in &outcome.removed {
                subscription.known.remove(name);
            }
            for (name, version, print) in outcome.accepted {
                subscription.known.accept(name, &version, print);
            }
            for bad in &answer.rejected {
                subscription.known.reject(&bad.name);
            }
            let clean = answer.rejected.is_empty();
            if clean && !std::mem::replace(&mut subscription.acknowledged, true) {
                answer.first = Some(kind);
            }
            if kind == Kind::Address && !self.asked.is_empty() {
                // What was rejected is answered too: who waits must look, and find nothing.
                let names = outcome.seen.into_iter().chain(outcome.removed);
                answer.answered = names.filter(|name| self.asked.remove(name)).collect();
                answer.leave = self.follow(&answer.answered);
            }
        }
        if !answer.rejected.is_empty() {
            let each =
                answer.rejected.iter().map(|Rejected { name, reason }| format!("{name}: {reason}"));
            let message = each.collect::<Vec<_>>().join("; ");
            answer.request.error_detail = Some(Status { code: 0, message, details: Vec::new() });
        }
        answer
    }

    /// How many resources of a type are in effect.
    #[must_use]
    pub fn known(&self, kind: Kind) -> usize {
        match kind {
            Kind::Address => self.addresses.known.len(),
            Kind::Authorization => self.policies.known.len(),
        }
    }
}

/// Names to versions, as a request carries them.
type Versions = HashMap<String, String>;
