//! The index of services, and of their endpoints. Endpoints may come before their service: they wait
//! here for it. An endpoint is its workload, held once more; nothing else is kept of it.

use crate::{table::Table, workloads::PARTS};
use hashbrown::DefaultHashBuilder;
use mesh_core::{Cidr, Namespace, NetworkAddress, NetworkId, Service, ServiceKey, Workload};
use std::{cmp::Reverse, collections::BTreeMap, hash::BuildHasher, net::IpAddr, sync::Arc};

/// A service, the endpoints that name it, or both.
#[derive(Debug)]
pub(crate) struct Group {
    key: ServiceKey,
    service: Option<Arc<Service>>,
    endpoints: Vec<Arc<Workload>>,
    /// No endpoint has a larger capacity; it may be that none has this one any more.
    heaviest: u32,
    /// Which service came first.
    age: Age,
}

/// Grows with each new service.
type Age = u32;

/// A VIP of a service.
#[derive(Debug)]
struct Place {
    service: Arc<Service>,
    at: usize,
    age: Age,
}

/// The index.
#[derive(Debug)]
pub(crate) struct Services {
    groups: Table<Group>,
    vips: Table<Place>,
    hosts: Table<(Arc<Service>, Age)>,
    /// How many VIPs are blocks of this many bits, of IPv4 (`true`) or IPv6.
    lengths: BTreeMap<(bool, u8), usize>,
    ages: Age,
    hashes: Hashes,
    /// Whose service a hostname means where nothing else decides.
    preferred: Option<Namespace>,
}

#[derive(Clone, Debug)]
struct Hashes(DefaultHashBuilder);

impl Hashes {
    fn key(&self, key: &ServiceKey) -> u64 {
        self.0.hash_one(key)
    }

    fn host(&self, host: &str) -> u64 {
        self.0.hash_one(host)
    }

    fn vip(&self, network: &NetworkId, block: Cidr) -> u64 {
        self.0.hash_one((network, block.masked()))
    }

    fn place(&self, place: &Place) -> u64 {
        place.vip().map_or(0, |(network, block)| self.vip(network, block))
    }
}

impl Place {
    fn vip(&self) -> Option<(&NetworkId, Cidr)> {
        self.service.vips.get(self.at).map(|vip| (&vip.network, vip.block))
    }

    fn is_at(&self, network: &NetworkId, block: Cidr) -> bool {
        self.vip().is_some_and(|(n, b)| n == network && b.masked() == block.masked())
    }
}

/// The client's own namespace, then canonical, then the namespace that is preferred where there is one, then
/// whoever came first. Istio's rule.
fn preferred<'a>(
    candidates: impl Iterator<Item = (&'a Arc<Service>, Age)>,
    client: &Namespace,
    namespace: Option<&Namespace>,
) -> Option<&'a Arc<Service>> {
    let rank = |Service { key, canonical, .. }: &Service| {
        (key.namespace == *client, *canonical, Some(&key.namespace) == namespace)
    };
    let visible = candidates.filter(|(service, _)| service.is_visible_to(client));
    visible.max_by_key(|(service, age)| (rank(service), Reverse(*age))).map(|(service, _)| service)
}

impl Group {
    pub(crate) const fn key(&self) -> &ServiceKey {
        &self.key
    }

    /// `None` where its endpoints are waiting for it.
    pub(crate) const fn service(&self) -> Option<&Arc<Service>> {
        self.service.as_ref()
    }

    pub(crate) fn endpoints(&self) -> &[Arc<Workload>] {
        &self.endpoints
    }

    /// No endpoint has a larger capacity.
    pub(crate) const fn heaviest(&self) -> u32 {
        self.heaviest
    }
}

impl Services {
    pub(crate) fn hashed_by(hasher: DefaultHashBuilder) -> Self {
        Self {
            groups: Table::in_parts(PARTS),
            vips: Table::in_parts(PARTS),
            hosts: Table::in_parts(PARTS),
            lengths: BTreeMap::new(),
            ages: 0,
            hashes: Hashes(hasher),
            preferred: None,
        }
    }

    pub(crate) fn prefer(&mut self, namespace: Namespace) {
        self.preferred = Some(namespace);
    }

    pub(crate) fn of_part(&self, part: usize) -> Option<impl Iterator<Item = &Group>> {
        self.groups.of_part(part)
    }

    pub(crate) fn group(&self, key: &ServiceKey) -> Option<&Group> {
        self.groups.find(self.hashes.key(key), |group| group.key == *key)
    }

    pub(crate) fn get(&self, key: &ServiceKey) -> Option<&Arc<Service>> {
        self.group(key)?.service()
    }

    /// Whether anybody has this address.
    pub(crate) fn has(&self, address: &NetworkAddress) -> bool {
        self.exact(address).next().is_some() || self.around(address).next().is_some()
    }

    fn places<'a>(
        &'a self,
        network: NetworkId,
        block: Cidr,
    ) -> impl Iterator<Item = &'a Place> + use<'a> {
        let places = self.vips.find_all(self.hashes.vip(&network, block));
        places.filter(move |place| place.is_at(&network, block))
    }

    /// The services with just this VIP, in any namespace.
    pub(crate) fn exact<'a>(
        &'a self,
        address: &NetworkAddress,
    ) -> impl Iterator<Item = &'a Arc<Service>> + use<'a> {
        self.places(address.network.clone(), Cidr::host(address.ip)).map(|place| &place.service)
    }

    /// The services with a block that the address is in.
    fn around<'a>(
        &'a self,
        address: &NetworkAddress,
    ) -> impl Iterator<Item = (&'a Place, u8)> + use<'a> {
        let NetworkAddress { network, ip } = address.clone();
        let lengths = self.lengths.keys().filter(move |(v4, _)| *v4 == ip.is_ipv4());
        lengths.flat_map(move |&(_, length)| {
            let block = Cidr::new(ip, length).ok();
            let network = network.clone();
            let places = block.into_iter().flat_map(move |b| self.places(network.clone(), b));
            places.map(move |place| (place, length))
        })
    }

    /// Exact VIPs first; then, in the client's own namespace, the longest block; then elsewhere.
    pub(crate) fn at(&self, address: &NetworkAddress, client: &Namespace) -> Option<&Arc<Service>> {
        let exact = self.places(address.network.clone(), Cidr::host(address.ip));
        preferred(exact.map(|place| (&place.service, place.age)), client, None).or_else(|| {
            self.around(address)
                .filter(|(place, _)| place.service.is_visible_to(client))
                .max_by_key(|(place, length)| {
                    let Service { key, canonical, .. } = &*place.service;
                    (key.namespace == *client, *length, *canonical, Reverse(place.age))
                })
                .map(|(place, _)| &place.service)
        })
    }

    pub(crate) fn of_host(
        &self,
        host: &str,
        client: &Namespace,
        usable: impl Fn(&Service) -> bool,
    ) -> Option<&Arc<Service>> {
        let all = self.hosts.find_all(self.hashes.host(host));
        let these =
            all.filter(|(service, _)| service.key.hostname.as_str() == host && usable(service));
        preferred(these.map(|(service, age)| (service, *age)), client, self.preferred.as_ref())
    }

    fn group_mut(&mut self, key: &ServiceKey) -> Option<&mut Group> {
        let hash = self.hashes.key(key);
        if self.group(key).is_none() {
            let key = key.clone();
            let group = Group { key, service: None, endpoints: Vec::new(), heaviest: 0, age: 0 };
            let hashes = &self.hashes;
            self.groups.insert(hash, group, |group| hashes.key(&group.key));
        }
        self.groups.find_mut(hash, |group| group.key == *key)
    }

    fn tidy(&mut self, key: &ServiceKey) {
        if self.group(key).is_some_and(|g| g.service.is_none() && g.endpoints.is_empty()) {
            let hashes = &self.hashes;
            let is_it = |group: &Group| group.key == *key;
            self.groups.remove(hashes.key(key), is_it, |group| hashes.key(&group.key));
        }
    }

    /// Adds or replaces.
    pub(crate) fn insert(&mut self, service: Arc<Service>) {
        let age = match self.group(&service.key) {
            Some(Group { service: Some(_), age, .. }) => *age,
            Some(_) | None => {
                self.ages = self.ages.saturating_add(1);
                self.ages
            }
        };
        self.take(&service.key);
        let hashes = self.hashes.clone();
        for (at, vip) in service.vips.iter().enumerate() {
            if vip.block.single().is_none() {
                *self.lengths.entry(length(vip.block)).or_default() += 1;
            }
            let place = Place { service: Arc::clone(&service), at, age };
            let hash = hashes.vip(&vip.network, vip.block);
            self.vips.insert(hash, place, |place| hashes.place(place));
        }
        let host = hashes.host(service.key.hostname.as_str());
        let rehash =
            |(service, _): &(Arc<Service>, Age)| hashes.host(service.key.hostname.as_str());
        self.hosts.insert(host, (Arc::clone(&service), age), rehash);
        if let Some(group) = self.group_mut(&service.key) {
            group.service = Some(service);
            group.age = age;
        }
    }

    /// Its endpoints stay, waiting for it.
    pub(crate) fn remove(&mut self, key: &ServiceKey) -> Option<Arc<Service>> {
        let old = self.take(key);
        self.tidy(key);
        old
    }

    fn take(&mut self, key: &ServiceKey) -> Option<Arc<Service>> {
        let hash = self.hashes.key(key);
        let old = self.groups.find_mut(hash, |group| group.key == *key)?.service.take()?;
        let hashes = &self.hashes;
        for (at, vip) in old.vips.iter().enumerate() {
            if vip.block.single().is_none()
                && let Some(count) = self.lengths.get_mut(&length(vip.block))
            {
                *count -= 1;
                if *count == 0 {
                    self.lengths.remove(&length(vip.block));
                }
            }
            let is_it = |place: &Place| place.at == at && Arc::ptr_eq(&place.service, &old);
            let hash = hashes.vip(&vip.network, vip.block);
            self.vips.remove(hash, is_it, |place| hashes.place(place));
        }
        let is_it = |(service, _): &(Arc<Service>, Age)| Arc::ptr_eq(service, &old);
        let rehash =
            |(service, _): &(Arc<Service>, Age)| hashes.host(service.key.hostname.as_str());
        self.hosts.remove(hashes.host(key.hostname.as_str()), is_it, rehash);
        Some(old)
    }

    pub(crate) fn join(&mut self, workload: &Arc<Workload>) {
        for member in &workload.services {
            let Some(group) = self.group_mut(&member.service) else { continue };
            group.endpoints.push(Arc::clone(workload));
            group.heaviest = group.heaviest.max(workload.capacity);
        }
    }

    pub(crate) fn leave(&mut self, workload: &Arc<Workload>) {
        for member in &workload.services {
            let hash = self.hashes.key(&member.service);
            let Some(group) = self.groups.find_mut(hash, |g| g.key == member.service) else {
                continue;
            };
            // Pointers side by side: a hundred thousand take less than 100 µs.
            let at = group.endpoints.iter().position(|known| Arc::ptr_eq(known, workload));
            if let Some(at) = at {
                group.endpoints.swap_remove(at);
            }
            if group.endpoints.is_empty() {
                self.tidy(&member.service);
            }
        }
    }
}

fn length(block: Cidr) -> (bool, u8) {
    (matches!(block.ip(), IpAddr::V4(_)), block.prefix_len())
}
