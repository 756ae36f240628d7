//! Authorization of one flow, now and for as long as it lives.
//!
//! Subscribe, then decide, then decide again on each change: so no change is ever missed, and there
//! is no registry of connections to search.

use mesh_core::SpiffeId;
use mesh_policy::{Attributes, Denial, Permit, PolicySet, decide, findings};
use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::{sync::watch, time::timeout};
use tracing::Level;

/// How long a connection waits for a policy that applies and has not arrived. Istio's proxy waits as
/// long for a workload.
const PATIENCE: Duration = Duration::from_secs(5);

/// Whom a tunnel's certificate is of. All connections in it share it.
#[derive(Debug)]
pub(crate) struct Peer {
    /// Verified.
    pub(crate) identity: SpiffeId,
    /// The same as policies have it.
    principal: Box<str>,
}

impl Peer {
    /// Of this identity.
    pub(crate) fn new(identity: SpiffeId) -> Self {
        let text = identity.to_string();
        let principal = text.strip_prefix("spiffe://").unwrap_or(&text).into();
        Self { identity, principal }
    }
}

/// What a policy may ask about a connection.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    peer: Option<Arc<Peer>>,
    source_ip: IpAddr,
    destination: SocketAddr,
}

impl Facts {
    /// A connection from `source`, with this verified identity if any, to the application at
    /// `destination`.
    pub(crate) const fn new(
        source: IpAddr,
        peer: Option<Arc<Peer>>,
        destination: SocketAddr,
    ) -> Self {
        Self { peer, source_ip: source, destination }
    }
}

impl Attributes for Facts {
    fn source(&self) -> Option<&SpiffeId> {
        self.peer.as_deref().map(|peer| &peer.identity)
    }

    fn principal(&self) -> Option<&str> {
        self.peer.as_deref().map(|peer| &*peer.principal)
    }

    fn source_ip(&self) -> IpAddr {
        self.source_ip
    }

    fn destination_ip(&self) -> IpAddr {
        self.destination.ip()
    }

    fn destination_port(&self) -> u16 {
        self.destination.port()
    }
}

/// The policies of a pod, watched on behalf of one flow.
#[derive(Debug)]
pub(crate) struct PolicyWatch {
    policies: watch::Receiver<Arc<PolicySet>>,
    facts: Facts,
    level: Level,
}

impl PolicyWatch {
    /// Watches from the next decision on.
    pub(crate) fn new(policies: watch::Receiver<Arc<PolicySet>>, facts: Facts) -> Self {
        Self { policies, facts, level: Level::DEBUG }
    }

    /// Logs at this level what each policy says when the flow is let in or is not.
    pub(crate) fn telling(mut self, level: Level) -> Self {
        self.level = level;
        self
    }

    /// Above all what the policies on trial would do.
    fn tell(&self, set: &PolicySet) {
        let is_wanted = match self.level {
            Level::INFO => tracing::enabled!(Level::INFO),
            _ => tracing::enabled!(Level::DEBUG),
        };
        if !is_wanted {
            return;
        }
        let Facts { source_ip, destination, .. } = &self.facts;
        let principal = self.facts.principal();
        for finding in findings(set, &self.facts) {
            let (policy, peer) = (finding.policy(), principal.unwrap_or("unknown"));
            match self.level {
                Level::INFO => {
                    tracing::info!(%policy, source = %source_ip, peer, %destination, "{finding}");
                }
                _ => tracing::debug!(%policy, source = %source_ip, peer, %destination, "{finding}"),
            }
        }
    }

    fn decide(&mut self) -> (Arc<PolicySet>, Result<Permit, Denial>) {
        let set = Arc::clone(&self.policies.borrow_and_update());
        let answer = decide(&set, &self.facts);
        (set, answer)
    }

    /// Decides; a policy that has not arrived is waited for, for 5 s at most.
    ///
    /// # Errors
    ///
    /// Returns the refusal. [`Denial::Missing`] means that the wait was in vain.
    pub(crate) async fn admit(&mut self) -> Result<Permit, Denial> {
        let (mut set, mut answer) = self.decide();
        if !matches!(answer, Err(Denial::Missing(_))) {
            self.tell(&set);
            return answer;
        }
        let wait = async {
            while self.policies.changed().await.is_ok() {
                (set, answer) = self.decide();
                if !matches!(answer, Err(Denial::Missing(_))) {
                    return;
                }
            }
        };
        // Out of time: the last answer stands, and it is a refusal.
        let _elapsed = timeout(PATIENCE, wait).await;
        self.tell(&set);
        answer
    }

    /// Waits until a policy ends the flow. What is missing or was rejected does not.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: a change that was seen is decided upon before the next wait.
    pub(crate) async fn revoked(&mut self) -> Denial {
        while self.policies.changed().await.is_ok() {
            if let (_, Err(denial)) = self.decide()
                && denial.closes_established()
            {
                return denial;
            }
        }
        // The pod is being removed; its tasks are ended by their owner.
        std::future::pending().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_policy::{Action, Entry, Policy, Predicate};

    fn set(version: u64, entries: Vec<Entry>) -> Arc<PolicySet> {
        Arc::new(PolicySet::new(version, entries))
    }

    fn deny() -> Entry {
        let when = Predicate::All(vec![]);
        let name = "ns/no".parse().unwrap();
        Entry::Known(Arc::new(Policy { name, action: Action::Deny, dry_run: false, when }))
    }

    fn watching(first: Arc<PolicySet>) -> (watch::Sender<Arc<PolicySet>>, PolicyWatch) {
        let (sender, receiver) = watch::channel(first);
        let facts = Facts::new([10, 0, 0, 1].into(), None, ([10, 0, 0, 2], 80).into());
        (sender, PolicyWatch::new(receiver, facts))
    }

    fn missing() -> Entry {
        Entry::Missing("ns/later".parse().unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn waits_for_a_missing_policy_and_then_denies() {
        let (_sender, mut watch) = watching(set(1, vec![missing()]));
        let begin = tokio::time::Instant::now();
        assert_eq!(watch.admit().await.unwrap_err(), Denial::Missing("ns/later".parse().unwrap()));
        assert_eq!(begin.elapsed(), PATIENCE);
    }

    #[tokio::test(start_paused = true)]
    async fn admits_when_the_missing_policy_arrives() {
        let (sender, mut watch) = watching(set(1, vec![missing()]));
        let (answer, ()) = tokio::join!(watch.admit(), async {
            sender.send_replace(set(2, vec![]));
        });
        assert_eq!(answer.unwrap().version(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn only_a_real_denial_ends_a_live_flow() {
        let (sender, mut watch) = watching(set(1, vec![]));
        let _permit = watch.admit().await.unwrap();
        sender.send_replace(set(2, vec![missing()]));
        let second = Duration::from_secs(1);
        assert!(timeout(second, watch.revoked()).await.is_err(), "missing does not");
        sender.send_replace(set(3, vec![deny()]));
        assert_eq!(watch.revoked().await, Denial::Denied("ns/no".parse().unwrap()));
    }
}
