//! The pods that this node serves, as far as the state concerns them: which workload each is, and which
//! policies apply to it. Kept up by the writer, watched by connections.

use crate::View;
use mesh_core::{Namespace, PolicyName, ServiceAccount, Text, Workload};
use mesh_policy::{Entry, PolicySet, wire::Authorization};
use std::{
    collections::BTreeSet,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::sync::watch;

/// How the CNI agent names a pod. With the node it is enough to find its workload.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct PodInfo {
    /// The pod's name.
    pub name: Text,
    /// Its namespace.
    pub namespace: Namespace,
    /// Its service account.
    pub service_account: ServiceAccount,
}

impl fmt::Display for PodInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// What is known of a served pod, watched. Ends with its last clone.
#[derive(Clone, Debug)]
pub struct Enrolment {
    /// Its workload, once the control plane has sent it.
    pub workload: watch::Receiver<Option<Arc<Workload>>>,
    /// The policies that apply to it.
    pub policies: watch::Receiver<Arc<PolicySet>>,
    _entry: Arc<Enrolled>,
}

#[derive(Debug)]
struct Enrolled {
    pod: PodInfo,
    workload: watch::Sender<Option<Arc<Workload>>>,
    policies: watch::Sender<Arc<PolicySet>>,
}

/// All served pods.
#[derive(Debug, Default)]
pub(crate) struct Roster {
    pods: Mutex<Vec<Weak<Enrolled>>>,
    version: AtomicU64,
}

impl Roster {
    fn pods(&self) -> MutexGuard<'_, Vec<Weak<Enrolled>>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn enrol(&self, pod: PodInfo, view: &View) -> Enrolment {
        let found = Self::find(&pod, view);
        let set = self.policies(&pod, found.as_deref(), view);
        let (workload, workload_seen) = watch::channel(found);
        let (policies, policies_seen) = watch::channel(Arc::new(set));
        let entry = Arc::new(Enrolled { pod, workload, policies });
        let mut pods = self.pods();
        pods.retain(|pod| pod.strong_count() > 0);
        pods.push(Arc::downgrade(&entry));
        Enrolment { workload: workload_seen, policies: policies_seen, _entry: entry }
    }

    /// Tells the pods what has changed for them.
    pub(crate) fn refresh(&self, view: &View) {
        let pods: Vec<_> = self.pods().iter().filter_map(Weak::upgrade).collect();
        for pod in pods {
            let found = Self::find(&pod.pod, view);
            let set = self.policies(&pod.pod, found.as_deref(), view);
            pod.workload.send_if_modified(|known| {
                let changed = *known != found;
                if changed {
                    *known = found;
                }
                changed
            });
            pod.policies.send_if_modified(|known| {
                let changed = known.entries() != set.entries();
                if changed {
                    *known = Arc::new(set);
                }
                changed
            });
        }
    }

    fn find(pod: &PodInfo, view: &View) -> Option<Arc<Workload>> {
        view.workloads.local(pod).cloned()
    }

    /// Those of all, those of its namespace, and those that it names. Before its workload is known,
    /// nothing is decided for it.
    fn policies(&self, pod: &PodInfo, workload: Option<&Workload>, view: &View) -> PolicySet {
        let none = BTreeSet::new();
        let scope = |key: Option<Namespace>| view.scoped.get(&key).unwrap_or(&none);
        let mut names: BTreeSet<&PolicyName> = scope(None).iter().collect();
        names.extend(scope(Some(pod.namespace.clone())));
        if let Some(workload) = workload {
            names.extend(workload.policies.iter());
        }
        let entry = |name: &PolicyName| match view.policies.get(name) {
            Some(known) => Entry::Known(Arc::clone(&known.policy)),
            None if view.rejected.contains(name) => Entry::Rejected(name.clone()),
            None => Entry::Missing(name.clone()),
        };
        let entries = names.into_iter().map(entry).collect();
        PolicySet::new(self.version.fetch_add(1, Ordering::Relaxed) + 1, entries)
    }
}

/// The namespace whose pods a policy applies to by its scope: `Some(None)` is all.
pub(crate) fn scope_of(policy: &Authorization) -> Option<Option<Namespace>> {
    use mesh_policy::wire::Scope;
    match policy.scope {
        Scope::Global => Some(None),
        Scope::Namespace => Some(Some(policy.namespace.clone())),
        Scope::WorkloadSelector => None,
    }
}
