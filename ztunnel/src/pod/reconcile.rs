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
    /// Stop serving these at once.
    Stop(Vec<String>),
    /// The message makes no sense now; the peer does not speak our protocol.
    Broken(&'static str),
}

/// Which pods are served.
#[derive(Debug, Default)]
pub struct Reconcile {
    running: BTreeMap<String, NetnsId>,
    pending: BTreeSet<String>,
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
                    naming.insert(uid);
                    Step::Done
                }
                None => Step::Broken("KeepWorkload after the snapshot"),
            },
            Request::Del { uid } => {
                self.pending.remove(&uid);
                match &mut self.naming {
                    // What runs is stopped by the snapshot that does not name it.
                    Some(naming) => {
                        naming.remove(&uid);
                        Step::Done
                    }
                    None if self.running.contains_key(&uid) => Step::Stop(vec![uid]),
                    None => Step::Done,
                }
            }
            Request::SnapshotSent => match self.naming.take() {
                Some(named) => {
                    let gone: Vec<_> =
                        self.running.keys().filter(|uid| !named.contains(*uid)).cloned().collect();
                    if gone.is_empty() { Step::Done } else { Step::Stop(gone) }
                }
                None => Step::Broken("SnapshotSent twice on one connection"),
            },
        }
    }

    /// The pod is served now.
    pub fn started(&mut self, uid: &str, netns: NetnsId) {
        self.pending.remove(uid);
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
        assert_eq!(machine.message(Request::SnapshotSent, None), Step::Done);
        machine
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
        assert_eq!(machine.message(Request::SnapshotSent, None), Step::Stop(vec!["c".to_owned()]));
        machine.stopped("c");
        assert!(machine.is_settled());
    }

    #[test]
    fn a_deletion_in_the_snapshot_waits_for_its_end() {
        let mut machine = serving(&["a"]);
        machine.connected();
        machine.message(add("a"), Some(netns(0)));
        assert_eq!(machine.message(del("a"), None), Step::Done);
        assert_eq!(machine.message(Request::SnapshotSent, None), Step::Stop(vec!["a".to_owned()]));
    }

    #[test]
    fn live_changes() {
        let mut machine = serving(&["a"]);
        assert_eq!(machine.message(add("a"), Some(netns(0))), Step::Done, "again");
        assert!(matches!(machine.message(add("a"), Some(netns(9))), Step::Start { .. }), "moved");
        assert_eq!(machine.message(del("unknown"), None), Step::Done);
        assert_eq!(machine.message(del("a"), None), Step::Stop(vec!["a".to_owned()]));
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
        machine.message(del("b"), None);
        assert!(machine.is_settled());
    }
}
