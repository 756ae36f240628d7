//! From the resources of a source to the state: the one writer, behind two handlers.

use mesh_runtime::{admin::Dump, tasks::Tasks};
use mesh_state::{
    Update as Change, Writer,
    wire::{Address, Authorization},
};
use mesh_xds::{Handler, Rejected, Update, file};
use std::{
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// The writer of the state, behind its two doors.
#[derive(Debug)]
pub(crate) struct Sources {
    addresses: Addresses,
    policies: Authorizations,
}

/// Takes workloads and services.
#[derive(Debug)]
pub(crate) struct Addresses(Arc<Mutex<Writer>>);

/// Takes policies.
#[derive(Debug)]
pub(crate) struct Authorizations(Arc<Mutex<Writer>>);

fn lock(writer: &Mutex<Writer>) -> MutexGuard<'_, Writer> {
    writer.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sources {
    /// Nothing is known yet. What becomes known is dumped.
    pub(crate) fn new(writer: Writer, dump: &Dump) -> Self {
        let state = writer.handle();
        let section = |name, of: fn(&mesh_state::Handle) -> serde_json::Value| {
            let state = state.clone();
            dump.register(name, move || of(&state));
        };
        section("workloads", mesh_state::dump::workloads);
        section("services", mesh_state::dump::services);
        section("policies", mesh_state::dump::policies);
        section("stagedServices", mesh_state::dump::staged_services);
        let writer = Arc::new(Mutex::new(writer));
        Self { addresses: Addresses(Arc::clone(&writer)), policies: Authorizations(writer) }
    }
}

impl file::Sink for Sources {
    type Addresses = Addresses;
    type Policies = Authorizations;

    fn addresses(&mut self) -> &mut Addresses {
        &mut self.addresses
    }

    fn policies(&mut self) -> &mut Authorizations {
        &mut self.policies
    }
}

/// Those that were taken are in effect, whatever was rejected.
fn outcome(rejected: Vec<Rejected>) -> Result<(), Vec<Rejected>> {
    if rejected.is_empty() { Ok(()) } else { Err(rejected) }
}

impl Handler<Address> for Addresses {
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

    fn each_name(&self, say: &mut dyn FnMut(&str)) {
        lock(&self.0).handle().read(|view| view.each_address_name(say));
    }
}

impl Handler<Authorization> for Authorizations {
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
                        changes.extend(name.parse().ok().map(Change::RejectPolicy));
                        rejected.push(Rejected { name, reason: error.to_string() });
                    }
                },
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

    fn each_name(&self, say: &mut dyn FnMut(&str)) {
        lock(&self.0).handle().read(|view| view.each_policy_name(say));
    }
}

/// Reads a file now, and again when it changes.
///
/// # Errors
///
/// Returns what is wrong with it.
pub(crate) fn watch(path: &Path, sources: Sources, tasks: &Tasks) -> anyhow::Result<()> {
    Ok(file::watch(path, sources, tasks)?)
}

/// Reads a text.
///
/// # Errors
///
/// Returns what is wrong with it.
pub(crate) fn inline(text: &str, mut sources: Sources) -> anyhow::Result<()> {
    file::load(text.as_bytes(), &mut sources).map_err(|fault| anyhow::anyhow!("LOCAL_XDS: {fault}"))
}
