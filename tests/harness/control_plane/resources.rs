//! What the scripted control plane has: the mesh of the suites, as resources with names and versions.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hasher as _},
    net::IpAddr,
};

use anyhow::Result;
use mesh_proto::{
    envoy::service::discovery::v3::Resource,
    istio::{
        security::Authorization,
        workload::{Address, address::Type},
    },
};
use mesh_xds::{
    Handler, Rejected, Update,
    file::{self, Source},
    session::Kind,
};
use prost::Message;
use prost_types::Any;

use crate::Mesh;

/// Resources of one type by name.
pub(super) type Named = BTreeMap<String, Resource>;

/// All of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Resources {
    addresses: Named,
    policies: Named,
    /// By each other name, the resources that are meant: a service's with its endpoints.
    aliases: BTreeMap<String, BTreeSet<String>>,
    /// The names of what is on each node.
    local: BTreeMap<String, BTreeSet<String>>,
}

/// A resource as it is sent, with a version that is its content's.
pub(super) fn resource(kind: Kind, name: &str, value: Vec<u8>) -> Resource {
    let mut hasher = DefaultHasher::new();
    hasher.write(&value);
    Resource {
        name: name.to_owned(),
        version: format!("{:016x}", hasher.finish()),
        resource: Some(Any { type_url: kind.url().to_owned(), value }),
        aliases: Vec::new(),
    }
}

impl Resources {
    /// Of this mesh.
    pub(super) fn of(mesh: &Mesh) -> Result<Self> {
        let mut resources = Self::default();
        let text = mesh.yaml();
        if !text.is_empty() {
            file::load(&Source::Inline(text), &mut resources)?;
        }
        Ok(resources)
    }

    /// Besides what is of the mesh, this: a name, and the bytes of a message.
    pub(super) fn put(&mut self, kind: Kind, name: &str, value: Vec<u8>) {
        let named = match kind {
            Kind::Address => &mut self.addresses,
            Kind::Authorization => &mut self.policies,
        };
        named.insert(name.to_owned(), resource(kind, name, value));
    }

    pub(super) fn all(&self, kind: Kind) -> &Named {
        match kind {
            Kind::Address => &self.addresses,
            Kind::Authorization => &self.policies,
        }
    }

    /// The addresses that are meant by a name, if any.
    pub(super) fn find(&self, name: &str) -> BTreeSet<String> {
        let mut found = self.aliases.get(name).cloned().unwrap_or_default();
        if self.addresses.contains_key(name) {
            found.insert(name.to_owned());
        }
        found
    }

    /// The names of what is on a node.
    pub(super) fn local(&self, node: &str) -> BTreeSet<String> {
        self.local.get(node).cloned().unwrap_or_default()
    }

    fn alias(&mut self, alias: String, name: &str) {
        self.aliases.entry(alias).or_default().insert(name.to_owned());
    }

    fn add(&mut self, name: &str, address: &Address) {
        match &address.r#type {
            Some(Type::Workload(workload)) => {
                for bytes in &workload.addresses {
                    self.alias(network_address(&workload.network, bytes), name);
                }
                for service in workload.services.keys() {
                    self.alias(service.clone(), name);
                }
                self.local.entry(workload.node.clone()).or_default().insert(name.to_owned());
            }
            Some(Type::Service(service)) => {
                for vip in &service.addresses {
                    self.alias(network_address(&vip.network, &vip.address), name);
                    // Whoever asks for the address gets the endpoints too.
                    let endpoints = self.aliases.get(name).cloned().unwrap_or_default();
                    for endpoint in endpoints {
                        self.alias(network_address(&vip.network, &vip.address), &endpoint);
                    }
                }
            }
            None => {}
        }
        let value = address.encode_to_vec();
        self.addresses.insert(name.to_owned(), resource(Kind::Address, name, value));
    }
}

fn network_address(network: &str, bytes: &[u8]) -> String {
    let ip = match (<[u8; 4]>::try_from(bytes), <[u8; 16]>::try_from(bytes)) {
        (Ok(v4), _) => IpAddr::from(v4),
        (_, Ok(v6)) => IpAddr::from(v6),
        (Err(_), Err(_)) => return String::new(),
    };
    format!("{network}/{ip}")
}

impl Handler<Address> for Resources {
    fn handle(&mut self, updates: Vec<Update<Address>>) -> Result<(), Vec<Rejected>> {
        for update in updates {
            if let Update::Upsert { name, resource } = update {
                self.add(&name, &resource);
            }
        }
        Ok(())
    }
}

impl Handler<Authorization> for Resources {
    fn handle(&mut self, updates: Vec<Update<Authorization>>) -> Result<(), Vec<Rejected>> {
        for update in updates {
            if let Update::Upsert { name, resource: policy } = update {
                let sent = resource(Kind::Authorization, &name, policy.encode_to_vec());
                self.policies.insert(name, sent);
            }
        }
        Ok(())
    }
}
