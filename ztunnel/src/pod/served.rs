//! The pods that are served now: what the manager has of each, and what the dump says of it.

use super::{
    Shared,
    manager::{chain, number},
};
use crate::{connections::Connections, metrics::Pods};
use mesh_platform::redirect::{self, Redirect};
use mesh_runtime::tasks::{Draining, Tasks};
use mesh_state::PodInfo;
use serde_json::{Map, Value, json};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::{Instant, interval_at};

/// How often it is looked whether the pods' connections still come to us.
const LOOK: Duration = Duration::from_secs(10);

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
            tracing::warn!(uid, pod = %self.info, why, "the pod is served and not captured: its connections do not come to us");
        }
    }
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
    fn sockets(&self) -> Vec<redirect::Pod> {
        let entries = self.entries();
        let up = entries.values().filter_map(|entry| match entry {
            Entry::Up(up) => Some(up.sockets.clone()),
            Entry::Pending { .. } => None,
        });
        up.collect()
    }

    /// Notes what was seen, and says what has changed.
    fn note(&self, seen: Vec<(redirect::Pod, Option<String>)>) {
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

    /// Counts them for the metrics.
    pub(super) fn count(&self, pods: &Pods) {
        let (mut up, mut uncaptured) = (0, 0);
        for entry in self.entries().values() {
            if let Entry::Up(one) = entry {
                up += 1;
                uncaptured += usize::from(one.uncaptured.is_some());
            }
        }
        pods.active.set(number(up));
        pods.uncaptured.set(number(uncaptured));
    }

    /// Looks, again and again, whether the pods' connections still come to us.
    pub(super) async fn watch(self, shared: Shared, draining: Draining) {
        let mut turn = interval_at(Instant::now() + LOOK, LOOK);
        loop {
            tokio::select! {
                _ = turn.tick() => {}
                () = draining.stopping() => return,
            }
            let (pods, redirect) = (self.sockets(), Arc::clone(&shared.redirect));
            // The kernel takes a tenth of a millisecond for each.
            let looked = move || {
                let one = |sockets: redirect::Pod| {
                    let why = why_uncaptured(&*redirect, &sockets);
                    (sockets, why)
                };
                pods.into_iter().map(one).collect::<Vec<_>>()
            };
            let Ok(found) = tokio::task::spawn_blocking(looked).await else { continue };
            self.note(found);
            self.count(&shared.telemetry.metrics.pods);
        }
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

/// Why a pod is not captured, as far as can be seen. What was written in its namespace may be taken away by anybody.
pub(super) fn why_uncaptured(redirect: &dyn Redirect, sockets: &redirect::Pod) -> Option<String> {
    redirect.uncaptured(sockets).unwrap_or_else(|error| {
        tracing::debug!(uid = sockets.uid(), error = %chain(&error), "a pod's capture cannot be seen");
        None
    })
}
