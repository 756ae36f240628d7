//! Which pods are served, as a machine without I/O: messages and outcomes in, steps out.
//!
//! ```text
//!  connected ──► collecting the snapshot ──SnapshotSent──► live
//!      ▲                 │ Add, Keep, Del                   │ Add, Del
//!      └────── lost ─────┴──────────────────────────────────┘
//! ```
//!
//! Running pods outlive a connection: they are stopped by `Del`, or by a snapshot that does not name
//! them, and by nothing else.

use super::protocol::Request;
use mesh_platform::netns::NetnsId;
use mesh_state::PodInfo;
use std::collections::{BTreeMap, BTreeSet};

/// What the agent's message asks for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Step {
    /// Nothing is to be done: acknowledge.
    Done,
    /// Start serving this pod, after stopping what ran under its uid in another namespace.
    Start {
        /// The Kubernetes uid of the pod.
        uid: String,
        /// Who it is.
        pod: PodInfo,
    },
    /// Stop serving this one at once, or trying to.
    Stop(String),
    /// Nobody serves this one, but an earlier process captured it: withdraw that.
    Release(String),
    /// The snapshot is complete: stop serving those that are gone, and keep of what earlier processes left
    /// nothing but what is named.
    Settle {
        /// Served, and not named.
        gone: Vec<String>,
        /// All that the agent has.
        named: Vec<String>,
    },
    /// The message makes no sense now; the peer does not speak our protocol.
    Broken(&'static str),
}

/// Which pods are served.
#[derive(Debug, Default)]
pub struct Reconcile {
    running: BTreeMap<String, NetnsId>,
    pending: BTreeSet<String>,
    /// Named by `Keep`, and not served by us: an earlier process may have captured them.
    kept: BTreeSet<String>,
    /// The uids that the snapshot has named so far; `None` once it is complete.
    naming: Option<BTreeSet<String>>,
    connected: bool,
}

impl Reconcile {
    /// A connection is up: a snapshot follows.
    pub fn connected(&mut self) {
        self.connected = true;
        self.naming = Some(BTreeSet::new());
        self.pending.clear();
        self.kept.clear();
    }

    /// The connection is gone. What runs goes on.
    pub fn disconnected(&mut self) {
        self.connected = false;
    }

    /// Whether everything that the agent wants is being served.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.connected && self.naming.is_none() && self.pending.is_empty()
    }

    /// Whether the snapshot of this connection is complete.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        self.connected && self.naming.is_none()
    }

    /// How many pods are waiting to be started again.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Takes a message; `netns` is the namespace that came with an `Add`.
    pub fn message(&mut self, request: Request, netns: Option<NetnsId>) -> Step {
        match request {
            Request::Add { uid, pod } => {
                if let Some(naming) = &mut self.naming {
                    naming.insert(uid.clone());
                }
                if netns.is_some() && self.running.get(&uid) == netns.as_ref() {
                    return Step::Done;
                }
                Step::Start { uid, pod }
            }
            Request::Keep { uid } => match &mut self.naming {
                Some(naming) => {
                    if !self.running.contains_key(&uid) {
                        self.kept.insert(uid.clone());
                    }
                    naming.insert(uid);
                    Step::Done
                }
                None => Step::Broken("KeepWorkload after the snapshot"),
            },
            Request::Del { uid } => self.delete(uid),
            Request::SnapshotSent => match self.naming.take() {
                Some(named) => {
                    let gone =
                        self.running.keys().filter(|uid| !named.contains(*uid)).cloned().collect();
                    Step::Settle { gone, named: named.into_iter().collect() }
                }
                None => Step::Broken("SnapshotSent twice on one connection"),
            },
        }
    }

    fn delete(&mut self, uid: String) -> Step {
        let pending = self.pending.remove(&uid);
        let kept = self.kept.remove(&uid);
        if let Some(naming) = &mut self.naming {
            // What runs, or was captured before us, is taken away at the end of a snapshot that does not name it.
            naming.remove(&uid);
            return if pending { Step::Stop(uid) } else { Step::Done };
        }
        if pending || self.running.contains_key(&uid) {
            Step::Stop(uid)
        } else if kept {
            Step::Release(uid)
        } else {
            Step::Done
        }
    }

    /// The pod is served now.
    pub fn started(&mut self, uid: &str, netns: NetnsId) {
        self.pending.remove(uid);
        self.kept.remove(uid);
        self.running.insert(uid.to_owned(), netns);
    }

    /// The pod could not be served: it is tried again while the connection lasts.
    pub fn failed(&mut self, uid: &str) {
        self.running.remove(uid);
        self.pending.insert(uid.to_owned());
    }

    /// The pod is not served any more.
    pub fn stopped(&mut self, uid: &str) {
        self.running.remove(uid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn netns(ino: u64) -> NetnsId {
        NetnsId { dev: 4, ino }
    }

    fn add(uid: &str) -> Request {
        let pod = PodInfo {
            name: uid.parse().unwrap(),
            namespace: "ns".parse().unwrap(),
            service_account: "sa".parse().unwrap(),
        };
        Request::Add { uid: uid.to_owned(), pod }
    }

    fn del(uid: &str) -> Request {
        Request::Del { uid: uid.to_owned() }
    }

    fn keep(uid: &str) -> Request {
        Request::Keep { uid: uid.to_owned() }
    }

    /// A machine that serves `uids`, each in the namespace of its place in the list.
    fn serving(uids: &[&str]) -> Reconcile {
        let mut machine = Reconcile::default();
        machine.connected();
        for (at, uid) in uids.iter().enumerate() {
            let id = netns(at as u64);
            assert!(matches!(machine.message(add(uid), Some(id)), Step::Start { .. }));
            machine.started(uid, id);
        }
        let named = uids.iter().map(|uid| (*uid).to_owned()).collect();
        assert_eq!(machine.message(Request::SnapshotSent, None), settle(&[], named));
        machine
    }

    fn settle(gone: &[&str], named: Vec<String>) -> Step {
        Step::Settle { gone: gone.iter().map(|uid| (*uid).to_owned()).collect(), named }
    }

    #[test]
    fn a_snapshot_stops_what_it_does_not_name() {
        let mut machine = serving(&["a", "b", "c"]);
        machine.disconnected();
        assert!(!machine.is_settled(), "not while disconnected");
        machine.connected();
        assert_eq!(machine.message(add("a"), Some(netns(0))), Step::Done, "same namespace");
        assert_eq!(machine.message(keep("b"), None), Step::Done);
        assert!(!machine.is_settled(), "not before the snapshot is complete");
        let named = vec!["a".to_owned(), "b".to_owned()];
        assert_eq!(machine.message(Request::SnapshotSent, None), settle(&["c"], named));
        machine.stopped("c");
        assert!(machine.is_settled());
    }

    #[test]
    fn a_deletion_in_the_snapshot_waits_for_its_end() {
        let mut machine = serving(&["a"]);
        machine.connected();
        machine.message(add("a"), Some(netns(0)));
        assert_eq!(machine.message(del("a"), None), Step::Done);
        assert_eq!(machine.message(Request::SnapshotSent, None), settle(&["a"], vec![]));
    }

    #[test]
    fn what_is_kept_for_an_earlier_process_is_released_when_it_is_deleted() {
        let mut machine = serving(&["a"]);
        machine.connected();
        for uid in ["a", "b", "c", "d"] {
            assert_eq!(machine.message(keep(uid), None), Step::Done);
        }
        assert_eq!(machine.message(del("d"), None), Step::Done, "by the snapshot");
        let named = ["a", "b", "c"].map(str::to_owned).into();
        assert_eq!(machine.message(Request::SnapshotSent, None), settle(&[], named));
        assert_eq!(machine.message(del("b"), None), Step::Release("b".to_owned()));
        assert_eq!(machine.message(del("b"), None), Step::Done, "once");
        assert_eq!(machine.message(del("a"), None), Step::Stop("a".to_owned()), "it is served");
        machine.message(add("c"), Some(netns(7)));
        machine.started("c", netns(7));
        assert_eq!(machine.message(del("c"), None), Step::Stop("c".to_owned()), "it is by now");
    }

    #[test]
    fn live_changes() {
        let mut machine = serving(&["a"]);
        assert_eq!(machine.message(add("a"), Some(netns(0))), Step::Done, "again");
        assert!(matches!(machine.message(add("a"), Some(netns(9))), Step::Start { .. }), "moved");
        assert_eq!(machine.message(del("unknown"), None), Step::Done);
        assert_eq!(machine.message(del("a"), None), Step::Stop("a".to_owned()));
        assert!(matches!(machine.message(keep("a"), None), Step::Broken(_)));
        assert!(matches!(machine.message(Request::SnapshotSent, None), Step::Broken(_)));
    }

    #[test]
    fn a_failed_start_is_pending_until_it_works_or_is_deleted() {
        let mut machine = serving(&[]);
        machine.message(add("a"), Some(netns(1)));
        machine.failed("a");
        assert_eq!((machine.is_settled(), machine.pending()), (false, 1));
        machine.started("a", netns(1));
        assert!(machine.is_settled());
        machine.message(add("b"), Some(netns(2)));
        machine.failed("b");
        // Or it would be tried for ever.
        assert_eq!(machine.message(del("b"), None), Step::Stop("b".to_owned()));
        assert!(machine.is_settled());
        machine.connected();
        machine.message(add("b"), Some(netns(2)));
        machine.failed("b");
        assert_eq!(machine.message(del("b"), None), Step::Stop("b".to_owned()), "in a snapshot");
    }
}
