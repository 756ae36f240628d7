//! From the resources of a source to the state: the one writer, behind two handlers.

use mesh_runtime::{admin::Dump, tasks::Tasks};
use mesh_state::{
    Update as Change, Writer,
    wire::{self, Address, Authorization},
};
use mesh_xds::{
    Handler, Rejected, Update,
    file::{self, Source},
};
use serde_json::{Value, json};
use std::{
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};
use tokio::runtime::Handle;

/// The writer of the state, behind the handlers of its sources.
#[derive(Debug)]
pub(crate) struct Sources(Mutex<Writer>);

fn lock(writer: &Mutex<Writer>) -> MutexGuard<'_, Writer> {
    writer.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sources {
    /// Nothing is known yet. What becomes known is dumped.
    pub(crate) fn new(writer: Writer, dump: &Dump) -> Self {
        let state = writer.handle();
        let section = |name, of: fn(&mesh_state::Handle) -> Value| {
            let state = state.clone();
            dump.register(name, move || of(&state));
        };
        section("workloads", mesh_state::dump::workloads);
        section("services", mesh_state::dump::services);
        section("policies", mesh_state::dump::policies);
        section("stagedServices", mesh_state::dump::staged_services);
        Self(Mutex::new(writer))
    }

    /// Shows what a local file or text holds, under Istio's name for it. Nothing else fills the state then, so that
    /// the state is what it holds.
    pub(crate) fn show_static(&self, dump: &Dump, is_local: bool) {
        let state = lock(&self.0).handle();
        dump.register("staticConfig", move || {
            use mesh_state::dump;
            let of = |list: fn(&mesh_state::Handle) -> Value| {
                if is_local { list(&state) } else { Value::Array(Vec::new()) }
            };
            json!({
                "policies": of(dump::policies),
                "services": of(dump::services),
                "workloads": of(dump::workloads),
            })
        });
    }
}

/// Those that were taken are in effect, whatever was rejected.
fn outcome(rejected: Vec<Rejected>) -> Result<(), Vec<Rejected>> {
    if rejected.is_empty() { Ok(()) } else { Err(rejected) }
}

impl Handler<Address> for Sources {
    fn handle(&mut self, updates: Vec<Update<Address>>) -> Result<(), Vec<Rejected>> {
        let mut writer = lock(&self.0);
        let mut changes = Vec::with_capacity(updates.len());
        let mut rejected = Vec::new();
        for update in updates {
            match update {
                Update::Upsert { name, resource } => match writer.decode(&resource) {
                    Ok(Some(change)) => changes.push(change),
                    Ok(None) => {
                        let reason = "type: neither a workload nor a service".to_owned();
                        rejected.push(Rejected { name, reason });
                    }
                    Err(error) => rejected.push(Rejected { name, reason: error.to_string() }),
                },
                // Its last good version stays.
                Update::Unreadable { .. } => {}
                Update::Remove { name } => changes.extend(writer.removal(&name)),
            }
        }
        writer.apply(changes);
        outcome(rejected)
    }

    fn check(&self, resource: &Address) -> Result<(), String> {
        let decoded = lock(&self.0).decode(resource);
        decoded.map(drop).map_err(|error| error.to_string())
    }
}

impl Handler<Authorization> for Sources {
    fn handle(&mut self, updates: Vec<Update<Authorization>>) -> Result<(), Vec<Rejected>> {
        let mut writer = lock(&self.0);
        let mut changes = Vec::with_capacity(updates.len());
        let mut rejected = Vec::new();
        for update in updates {
            match update {
                Update::Upsert { name, resource } => match writer.decode_policy(resource) {
                    Ok(change) => changes.push(change),
                    Err(error) => {
                        // Those that it applies to must know that it cannot be enforced.
                        changes.extend(Writer::rejection(&name, error.scope()));
                        rejected.push(Rejected { name, reason: error.to_string() });
                    }
                },
                Update::Unreadable { name, bytes } => {
                    changes.extend(Writer::rejection(&name, wire::scope_of_unreadable(&bytes)));
                }
                Update::Remove { name } => {
                    changes.extend(name.parse().ok().map(Change::RemovePolicy));
                }
            }
        }
        writer.apply(changes);
        outcome(rejected)
    }

    fn check(&self, resource: &Authorization) -> Result<(), String> {
        let decoded = lock(&self.0).decode_policy(resource.clone());
        decoded.map(drop).map_err(|error| error.to_string())
    }
}

/// Reads a file now, and again on this runtime when it changes.
///
/// # Errors
///
/// Returns what is wrong with it.
pub(crate) fn watch(
    path: &Path,
    mut sources: Sources,
    (tasks, runtime): (&Tasks, &Handle),
) -> anyhow::Result<()> {
    let path = path.to_owned();
    let (loaded, report) = file::load(&Source::Path(path.clone()), &mut sources)?;
    tracing::info!(path = %path.display(), ?report, "the local file is loaded");
    tasks.spawn_on(runtime, move |draining| file::watch(path, loaded, sources, draining));
    Ok(())
}

/// Reads a text.
///
/// # Errors
///
/// Returns what is wrong with it.
pub(crate) fn inline(text: &str, mut sources: Sources) -> anyhow::Result<()> {
    file::load(&Source::Inline(text.to_owned()), &mut sources)?;
    Ok(())
}
