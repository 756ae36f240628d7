//! One response, taken in chunks.

use std::collections::HashSet;
use std::hash::Hasher;
use std::net::IpAddr;

use mesh_proto::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Resource};
use mesh_proto::istio::security::Authorization;
use mesh_proto::istio::workload::{Address, address::Type};
use prost::Message;

use super::Kind;
use crate::{Rejected, Update};

/// Resources handed over at once. The task gives others their turn between two chunks.
const CHUNK: usize = 512;

/// Some updates of one type.
#[derive(Debug)]
pub enum Chunk {
    /// Of workloads and services.
    Addresses(Vec<Update<Address>>),
    /// Of policies.
    Policies(Vec<Update<Authorization>>),
}

/// A response on its way through the handlers.
#[derive(Debug)]
pub struct Round {
    kind: Option<Kind>,
    type_url: String,
    nonce: String,
    removals: std::vec::IntoIter<String>,
    resources: std::vec::IntoIter<Resource>,
    on_demand: bool,
    /// Of the chunk that is being handled.
    handing: Vec<(String, String, u64)>,
    /// Removed by this response.
    gone: HashSet<String>,
    outcome: Outcome,
    bytes: usize,
}

/// What became of a response.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) kind: Option<Kind>,
    pub(super) type_url: String,
    pub(super) nonce: String,
    pub(super) accepted: Vec<(String, String, u64)>,
    pub(super) removed: HashSet<String>,
    pub(super) rejected: Vec<Rejected>,
    /// On demand: every name under which something came.
    pub(super) seen: Vec<String>,
}

impl Round {
    pub(super) fn new(response: DeltaDiscoveryResponse, on_demand: bool) -> Self {
        let DeltaDiscoveryResponse { resources, type_url, nonce, removed_resources, .. } = response;
        let kind = Kind::from_url(&type_url);
        if kind.is_none() {
            tracing::error!(%type_url, "the control plane sent a type that we did not ask for");
        }
        let bytes = resources.iter().filter_map(|resource| resource.resource.as_ref());
        let bytes = bytes.map(|any| any.value.len()).sum();
        // Of a type that we do not know, nothing is taken, and it is acknowledged.
        let (resources, removals) =
            if kind.is_some() { (resources, removed_resources) } else { (Vec::new(), Vec::new()) };
        Self {
            kind,
            type_url,
            nonce,
            removals: removals.into_iter(),
            resources: resources.into_iter(),
            on_demand,
            handing: Vec::new(),
            gone: HashSet::new(),
            outcome: Outcome::default(),
            bytes,
        }
    }

    /// The type URL as it came.
    #[must_use]
    pub fn type_url(&self) -> &str {
        &self.type_url
    }

    /// The payloads of all resources.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Removals come first: what replaces something else may have its address.
    pub(super) fn next(&mut self, unchanged: impl Fn(Kind, &str, u64) -> bool) -> Option<Chunk> {
        let kind = self.kind?;
        self.settle(&[]);
        if self.removals.len() > 0 {
            let names: Vec<String> = self.removals.by_ref().take(CHUNK).collect();
            self.gone.extend(names.iter().cloned());
            return Some(match kind {
                Kind::Address => Chunk::Addresses(removals(names)),
                Kind::Authorization => Chunk::Policies(removals(names)),
            });
        }
        let chunk = match kind {
            Kind::Address => {
                let updates = self.decode::<Address>(kind, &unchanged, aliases);
                (!updates.is_empty()).then_some(Chunk::Addresses(updates))
            }
            Kind::Authorization => {
                let updates = self.decode::<Authorization>(kind, &unchanged, |_, _| {});
                (!updates.is_empty()).then_some(Chunk::Policies(updates))
            }
        };
        // With many unchanged resources a chunk can be small; it is empty only at the end.
        chunk
    }

    fn decode<T: Message + Default>(
        &mut self,
        kind: Kind,
        unchanged: &impl Fn(Kind, &str, u64) -> bool,
        aliases: impl Fn(&T, &mut Vec<String>),
    ) -> Vec<Update<T>> {
        let mut updates = Vec::new();
        while updates.len() < CHUNK {
            let Some(Resource { version, resource, name, aliases: given }) = self.resources.next()
            else {
                break;
            };
            let value = match resource {
                Some(any) if any.type_url == kind.url() => Ok(any.value),
                Some(any) => Err(format!("resource: is of type {}", any.type_url)),
                None => Err("resource: is not there".to_owned()),
            };
            let value = match value {
                Ok(value) => value,
                Err(reason) => {
                    updates.push(self.bad(name, reason, Vec::new()));
                    continue;
                }
            };
            let print = fingerprint(&value);
            // What was removed a moment ago is new.
            let same = unchanged(kind, &name, print) && !self.gone.contains(&name);
            if same && !self.on_demand {
                self.outcome.accepted.push((name, version, print));
                continue;
            }
            match T::decode(value.as_slice()) {
                Ok(resource) => {
                    if self.on_demand {
                        self.outcome.seen.push(name.clone());
                        self.outcome.seen.extend(given);
                        aliases(&resource, &mut self.outcome.seen);
                    }
                    if same {
                        self.outcome.accepted.push((name, version, print));
                    } else {
                        self.handing.push((name.clone(), version, print));
                        updates.push(Update::Upsert { name, resource });
                    }
                }
                Err(error) => {
                    if self.on_demand {
                        self.outcome.seen.extend(given);
                    }
                    updates.push(self.bad(name, error.to_string(), value));
                }
            }
        }
        updates
    }

    /// The handler is told as well: what a policy that cannot be read applies to is denied.
    fn bad<T>(&mut self, name: String, reason: String, bytes: Vec<u8>) -> Update<T> {
        if self.on_demand {
            self.outcome.seen.push(name.clone());
        }
        self.outcome.rejected.push(Rejected { name: name.clone(), reason });
        Update::Unreadable { name, bytes }
    }

    /// Takes the handler's word for the chunk before.
    pub fn handled(&mut self, result: Result<(), Vec<Rejected>>) {
        let rejected = result.err().unwrap_or_default();
        self.settle(&rejected);
        self.outcome.rejected.extend(rejected);
    }

    fn settle(&mut self, rejected: &[Rejected]) {
        let refused: HashSet<&str> =
            rejected.iter().map(|rejected| rejected.name.as_str()).collect();
        let accepted = self.handing.drain(..).filter(|(name, ..)| !refused.contains(name.as_str()));
        self.outcome.accepted.extend(accepted);
    }

    pub(super) fn finish(mut self) -> Outcome {
        self.settle(&[]);
        Outcome {
            kind: self.kind,
            type_url: self.type_url,
            nonce: self.nonce,
            removed: self.gone,
            ..self.outcome
        }
    }
}

fn removals<T>(names: Vec<String>) -> Vec<Update<T>> {
    names.into_iter().map(|name| Update::Remove { name }).collect()
}

/// Never that of nothing, which is zero.
fn fingerprint(bytes: &[u8]) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish().max(1)
}

/// The other names by which an address can be asked for. istiod 1.29 does not send them along.
fn aliases(address: &Address, names: &mut Vec<String>) {
    match &address.r#type {
        Some(Type::Workload(workload)) => {
            for bytes in &workload.addresses {
                names.extend(network_address(&workload.network, bytes));
            }
        }
        Some(Type::Service(service)) => {
            names.push(format!("{}/{}", service.namespace, service.hostname));
            for address in &service.addresses {
                names.extend(network_address(&address.network, &address.address));
            }
        }
        None => {}
    }
}

fn network_address(network: &str, bytes: &[u8]) -> Option<String> {
    let ip = match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        16 => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?),
        _ => return None,
    };
    Some(format!("{network}/{ip}"))
}
