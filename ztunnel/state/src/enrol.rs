//! The pods that this node serves, as far as the state concerns them: which workload each is, and which
//! policies apply to it. Kept up by the writer, watched by connections.

use crate::{Handle, View, view::Reach};
use mesh_core::{Namespace, PolicyName, ServiceAccount, Text, Workload};
use mesh_policy::{Entry, PolicySet};
use std::{
    collections::{BTreeSet, HashMap},
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
    /// The policies that its workload names, or named last: a workload that is gone for a moment does not
    /// lift what the pod's connections are held to.
    selected: Mutex<Selected>,
}

/// Names of policies.
type Selected = Box<[PolicyName]>;

/// The sets that were made for other pods: many have the same.
type Made = HashMap<(Namespace, Selected), Arc<PolicySet>>;

/// All served pods.
#[derive(Debug, Default)]
pub(crate) struct Roster {
    pods: Mutex<Vec<Weak<Enrolled>>>,
    version: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Roster {
    /// The roster is locked before the view is read: an update that is not in the view yet is told to all that are
    /// in the roster once it is.
    pub(crate) fn enrol(&self, pod: PodInfo, state: &Handle) -> Enrolment {
        let mut pods = lock(&self.pods);
        let (found, selected, set) = state.read(|view| {
            let found = view.workloads.local(&pod).cloned();
            let selected = found.as_ref().map(|w| w.policies.clone()).unwrap_or_default();
            let set = self.policies(&pod.namespace, &selected, view);
            (found, selected, set)
        });
        let (workload, workload_seen) = watch::channel(found);
        let (policies, policies_seen) = watch::channel(Arc::new(set));
        let selected = Mutex::new(selected);
        let entry = Arc::new(Enrolled { pod, workload, policies, selected });
        pods.retain(|pod| pod.strong_count() > 0);
        pods.push(Arc::downgrade(&entry));
        Enrolment { workload: workload_seen, policies: policies_seen, _entry: entry }
    }

    /// Tells the pods what has changed for them in what is shown.
    pub(crate) fn refresh(&self, state: &Handle) {
        let pods: Vec<_> = lock(&self.pods).iter().filter_map(Weak::upgrade).collect();
        state.read(|view| self.tell(&pods, view));
    }

    fn tell(&self, pods: &[Arc<Enrolled>], view: &View) {
        let mut made = Made::new();
        for pod in pods {
            let found = view.workloads.local(&pod.pod).cloned();
            let mut selected = lock(&pod.selected);
            if let Some(found) = &found {
                selected.clone_from(&found.policies);
            }
            let key = (pod.pod.namespace.clone(), selected.clone());
            let set = made.entry(key).or_insert_with_key(|(namespace, selected)| {
                Arc::new(self.policies(namespace, selected, view))
            });
            // The policies first: whoever sees the workload sees all that it is held to. They are compared before
            // they are sent, for which connections would wait: nobody else sends.
            if pod.policies.borrow().entries() != set.entries() {
                pod.policies.send_replace(Arc::clone(set));
            }
            if *pod.workload.borrow() != found {
                pod.workload.send_replace(found);
            }
        }
    }

    /// Those of all, those of the namespace, and those that the workload names.
    fn policies(&self, namespace: &Namespace, selected: &[PolicyName], view: &View) -> PolicySet {
        let none = BTreeSet::new();
        let scope = |reach: Reach| view.scoped.get(&reach).unwrap_or(&none);
        let mut names: BTreeSet<&PolicyName> = scope(None).iter().collect();
        names.extend(scope(Some(namespace.clone())));
        names.extend(selected);
        let entry = |name: &PolicyName| match view.policies.get(name) {
            Some(known) => Entry::Known(Arc::clone(&known.policy)),
            None if view.rejected.contains_key(name) => Entry::Rejected(name.clone()),
            None => Entry::Missing(name.clone()),
        };
        let entries = names.into_iter().map(entry).collect();
        PolicySet::new(self.version.fetch_add(1, Ordering::Relaxed) + 1, entries)
    }
}

#[cfg(test)]
mod tests;
