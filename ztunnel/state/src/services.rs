//! The index of services, and of their endpoints. Endpoints may come before their service: they wait
//! here for it.

use mesh_core::{
    Cidr, Hostname, Namespace, NetworkAddress, NetworkId, Service, ServiceKey, Workload,
    WorkloadUid,
};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

/// The index.
#[derive(Debug, Default)]
pub(crate) struct Services {
    by_key: BTreeMap<ServiceKey, Arc<Service>>,
    by_vip: HashMap<(NetworkId, IpAddr), Vec<Arc<Service>>>,
    blocks: Vec<(NetworkId, Cidr, Arc<Service>)>,
    by_host: HashMap<Hostname, Vec<Arc<Service>>>,
    endpoints: HashMap<ServiceKey, HashSet<WorkloadUid>>,
}

fn forget(list: &mut Vec<Arc<Service>>, key: &ServiceKey) -> bool {
    list.retain(|service| service.key != *key);
    list.is_empty()
}

/// The client's own namespace, then canonical, then whoever came first. Istio's rule.
fn preferred<'a>(
    candidates: impl Iterator<Item = &'a Arc<Service>>,
    client: &Namespace,
) -> Option<&'a Arc<Service>> {
    let rank = |service: &Service| {
        if service.key.namespace == *client { 2 } else { u8::from(service.canonical) }
    };
    let mut best: Option<&Arc<Service>> = None;
    for service in candidates.filter(|service| service.is_visible_to(client)) {
        if best.is_none_or(|best| rank(service) > rank(best)) {
            best = Some(service);
        }
    }
    best
}

impl Services {
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.by_key.values()
    }

    pub(crate) fn get(&self, key: &ServiceKey) -> Option<&Arc<Service>> {
        self.by_key.get(key)
    }

    pub(crate) fn has(&self, address: &NetworkAddress) -> bool {
        self.by_vip.contains_key(&(address.network.clone(), address.ip))
    }

    /// The services with just this VIP, in any namespace.
    pub(crate) fn exact<'a>(
        &'a self,
        address: &NetworkAddress,
    ) -> impl Iterator<Item = &'a Arc<Service>> + use<'a> {
        self.by_vip.get(&(address.network.clone(), address.ip)).into_iter().flatten()
    }

    /// Exact VIPs first; then, in the client's own namespace, the longest block; then elsewhere.
    pub(crate) fn at(&self, address: &NetworkAddress, client: &Namespace) -> Option<&Arc<Service>> {
        let exact = self.by_vip.get(&(address.network.clone(), address.ip));
        let exact = preferred(exact.into_iter().flatten(), client);
        exact.or_else(|| {
            self.blocks
                .iter()
                .filter(|(network, block, service)| {
                    *network == address.network
                        && block.contains(address.ip)
                        && service.is_visible_to(client)
                })
                .max_by_key(|(_, block, service)| {
                    (service.key.namespace == *client, block.prefix_len(), service.canonical)
                })
                .map(|(_, _, service)| service)
        })
    }

    pub(crate) fn of_host(&self, host: &Hostname, client: &Namespace) -> Option<&Arc<Service>> {
        preferred(self.by_host.get(host).into_iter().flatten(), client)
    }

    pub(crate) fn endpoints(&self, key: &ServiceKey) -> impl Iterator<Item = &WorkloadUid> {
        self.endpoints.get(key).into_iter().flatten()
    }

    /// Endpoints whose service is not there.
    pub(crate) fn staged(&self) -> impl Iterator<Item = (&ServiceKey, &HashSet<WorkloadUid>)> {
        self.endpoints.iter().filter(|(key, _)| !self.by_key.contains_key(*key))
    }

    /// Returns what it replaced.
    pub(crate) fn insert(&mut self, service: Arc<Service>) -> Option<Arc<Service>> {
        let old = self.remove(&service.key);
        for vip in &service.vips {
            match vip.block.single() {
                Some(ip) => {
                    let place = (vip.network.clone(), ip);
                    self.by_vip.entry(place).or_default().push(Arc::clone(&service));
                }
                None => self.blocks.push((vip.network.clone(), vip.block, Arc::clone(&service))),
            }
        }
        let host = service.key.hostname.clone();
        self.by_host.entry(host).or_default().push(Arc::clone(&service));
        self.by_key.insert(service.key.clone(), service);
        old
    }

    /// Its endpoints stay, waiting for it.
    pub(crate) fn remove(&mut self, key: &ServiceKey) -> Option<Arc<Service>> {
        let old = self.by_key.remove(key)?;
        for vip in &old.vips {
            let Some(ip) = vip.block.single() else { continue };
            let place = (vip.network.clone(), ip);
            if self.by_vip.get_mut(&place).is_some_and(|list| forget(list, key)) {
                self.by_vip.remove(&place);
            }
        }
        self.blocks.retain(|(_, _, service)| service.key != *key);
        if self.by_host.get_mut(&key.hostname).is_some_and(|list| forget(list, key)) {
            self.by_host.remove(&key.hostname);
        }
        Some(old)
    }

    pub(crate) fn join(&mut self, workload: &Workload) {
        for member in &workload.services {
            let endpoints = self.endpoints.entry(member.service.clone()).or_default();
            endpoints.insert(workload.uid.clone());
        }
    }

    pub(crate) fn leave(&mut self, workload: &Workload) {
        for member in &workload.services {
            let Some(endpoints) = self.endpoints.get_mut(&member.service) else { continue };
            endpoints.remove(&workload.uid);
            if endpoints.is_empty() {
                self.endpoints.remove(&member.service);
            }
        }
    }
}
