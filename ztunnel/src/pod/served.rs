//! The pods that are served now: what the manager has of each, and what the dump says of it.

use crate::connections::Connections;
use mesh_platform::redirect;
use mesh_runtime::tasks::Tasks;
use mesh_state::PodInfo;
use serde_json::{Map, Value, json};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// The pods that are served now, for the dump.
#[derive(Clone, Debug)]
pub(crate) struct Served {
    entries: Arc<Mutex<BTreeMap<String, Entry>>>,
    /// Who redirects their traffic.
    by: &'static str,
}

#[derive(Debug)]
pub(super) enum Entry {
    Up(Up),
    Pending { info: PodInfo, why: String },
}

/// A pod that is served. Its owner is here; the pod itself lives with its tasks.
#[derive(Debug)]
pub(super) struct Up {
    pub(super) info: PodInfo,
    pub(super) sockets: redirect::Pod,
    /// Whether its application sees its clients' addresses.
    pub(super) original_source: bool,
    pub(super) connections: Connections,
    pub(super) tasks: Tasks,
    /// Why its connections do not come to us, as far as was seen when it was last looked.
    pub(super) uncaptured: Option<String>,
}

impl Up {
    /// Says why it is not captured, if it is not.
    pub(super) fn warn(&self, uid: &str, why: Option<&str>) {
        if let Some(why) = why {
            tracing::warn!(uid, pod = %self.info, why, "the pod is served and not captured: its connections go past us");
        }
    }
}

/// How many pods are served.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counts {
    pub(super) up: usize,
    /// Of those, how many are not captured.
    pub(super) uncaptured: usize,
}

impl Served {
    /// None yet. `by` is who redirects their traffic.
    pub(crate) fn new(by: &'static str) -> Self {
        Self { entries: Arc::default(), by }
    }

    pub(super) fn entries(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is to be looked at.
    pub(super) fn sockets(&self) -> Vec<redirect::Pod> {
        let entries = self.entries();
        let up = entries.values().filter_map(|entry| match entry {
            Entry::Up(up) => Some(up.sockets.clone()),
            Entry::Pending { .. } => None,
        });
        up.collect()
    }

    /// Notes what was seen, and says what has changed.
    pub(super) fn note(&self, seen: Vec<(redirect::Pod, Option<String>)>) {
        let mut entries = self.entries();
        for (pod, why) in seen {
            let uid = pod.uid();
            // It may have gone meanwhile, and may even have come back.
            let Some(Entry::Up(up)) = entries.get_mut(uid) else { continue };
            if !up.sockets.is(&pod) {
                continue;
            }
            if up.uncaptured.is_some() && why.is_none() {
                tracing::info!(uid, pod = %up.info, "the pod is captured again");
            } else if up.uncaptured.is_none() {
                up.warn(uid, why.as_deref());
            }
            up.uncaptured = why;
        }
    }

    pub(super) fn counts(&self) -> Counts {
        let mut counts = Counts { up: 0, uncaptured: 0 };
        for entry in self.entries().values() {
            if let Entry::Up(up) = entry {
                counts.up += 1;
                counts.uncaptured += usize::from(up.uncaptured.is_some());
            }
        }
        counts
    }

    fn capture(&self, up: &Up) -> Value {
        let state = if up.uncaptured.is_some() { "NotCaptured" } else { "Captured" };
        let mut capture =
            json!({ "by": self.by, "state": state, "originalSource": up.original_source });
        if let (Some(why), Some(capture)) = (&up.uncaptured, capture.as_object_mut()) {
            capture.insert("reason".to_owned(), why.clone().into());
        }
        capture
    }

    /// Istio's `workloadState`, and beside it who captures each pod, and why one is not captured.
    pub(crate) fn dump(&self) -> Value {
        let info = |info: &PodInfo| {
            json!({
                "name": info.name.as_str(),
                "namespace": info.namespace.as_str(),
                "serviceAccount": info.service_account.as_str(),
            })
        };
        let entries = self.entries();
        let dump: Map<_, _> = entries
            .iter()
            .map(|(uid, entry)| {
                let value = match entry {
                    Entry::Up(up) => json!({
                        "state": "Up",
                        "info": info(&up.info),
                        "connections": up.connections.dump(),
                        "capture": self.capture(up),
                    }),
                    Entry::Pending { info: who, why } => {
                        let capture = json!({ "by": self.by, "state": "Failed", "reason": why });
                        json!({ "state": "Pending", "info": info(who), "capture": capture })
                    }
                };
                (uid.clone(), value)
            })
            .collect();
        Value::Object(dump)
    }
}
