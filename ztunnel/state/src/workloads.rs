//! The index of workloads: by uid, by address, by hostname, and those of our own node by the name of their
//! pod. A workload is held once; no key is copied.

use crate::{PodInfo, table::Table};
use hashbrown::DefaultHashBuilder;
use mesh_core::{
    Hostname, Namespace, NetworkAddress, NetworkId, NetworkMode, ServiceAccount, Text,
    TunnelProtocol, Workload, WorkloadUid,
};
use std::{cmp::Reverse, hash::BuildHasher, net::IpAddr, sync::Arc};

/// Parts of a table that grows with the mesh: half a million workloads make 500 each.
pub(crate) const PARTS: usize = 1024;
/// Parts of a table that stays small.
const FEW_PARTS: usize = 16;

/// An address of a workload that is not its first.
#[derive(Debug)]
struct Place {
    workload: Arc<Workload>,
    at: usize,
}

/// The index.
#[derive(Debug)]
pub(crate) struct Workloads {
    by_uid: Table<Arc<Workload>>,
    /// By the first address. May hold several with one.
    by_ip: Table<Arc<Workload>>,
    /// By each further address. May hold several with one.
    by_other_ip: Table<Place>,
    /// Those that have a hostname.
    by_host: Table<Arc<Workload>>,
    /// Those of our own node, by pod.
    local: Table<Arc<Workload>>,
    node: Text,
    hashes: Hashes,
}

/// How each key is hashed.
#[derive(Clone, Debug)]
struct Hashes(DefaultHashBuilder);

impl Hashes {
    fn uid(&self, uid: &WorkloadUid) -> u64 {
        self.0.hash_one(uid)
    }

    fn ip(&self, network: &NetworkId, ip: Option<&IpAddr>) -> u64 {
        self.0.hash_one((network, ip))
    }

    fn host(&self, namespace: &Namespace, host: Option<&Hostname>) -> u64 {
        self.0.hash_one((namespace, host))
    }

    fn pod(&self, name: &Text, namespace: &Namespace, account: &ServiceAccount) -> u64 {
        self.0.hash_one((name, namespace, account))
    }

    fn uid_of(&self, workload: &Workload) -> u64 {
        self.uid(&workload.uid)
    }

    fn first_ip_of(&self, workload: &Workload) -> u64 {
        self.ip(&workload.network, workload.ips.first())
    }

    fn place(&self, place: &Place) -> u64 {
        self.ip(&place.workload.network, place.workload.ips.get(place.at))
    }

    fn host_of(&self, workload: &Workload) -> u64 {
        self.host(&workload.identity.namespace, workload.hostname.as_ref())
    }

    fn pod_of(&self, workload: &Workload) -> u64 {
        let id = &workload.identity;
        self.pod(&workload.name, &id.namespace, &id.service_account)
    }
}

/// Which of several workloads is meant: pods that take tunnels, then pods, then what takes tunnels. Istio's
/// rule; and always the same one.
fn rank(workload: &Workload) -> (u8, Reverse<&str>) {
    let uid = workload.uid.as_str();
    let pod = u8::from(uid.contains("//Pod/"));
    let tunnel = u8::from(workload.protocol == TunnelProtocol::Hbone);
    (pod * 2 + tunnel, Reverse(uid))
}

fn is(this: &Arc<Workload>) -> impl Fn(&Arc<Workload>) -> bool {
    |other| Arc::ptr_eq(this, other)
}

impl Workloads {
    /// Where the node has no name, any workload may be a pod of ours.
    pub(crate) fn of_node(node: Text, hasher: DefaultHashBuilder) -> Self {
        Self {
            by_uid: Table::in_parts(PARTS),
            by_ip: Table::in_parts(PARTS),
            by_other_ip: Table::in_parts(PARTS),
            by_host: Table::in_parts(FEW_PARTS),
            local: Table::in_parts(FEW_PARTS),
            node,
            hashes: Hashes(hasher),
        }
    }

    /// Whether it may be a pod of ours.
    pub(crate) fn is_local(&self, workload: &Workload) -> bool {
        self.node.as_str().is_empty() || workload.node == self.node
    }

    /// The workload of a pod of our own node.
    pub(crate) fn local(&self, pod: &PodInfo) -> Option<&Arc<Workload>> {
        let PodInfo { name, namespace, service_account } = pod;
        let is_it = |workload: &&Arc<Workload>| {
            let id = &workload.identity;
            workload.name == *name
                && id.namespace == *namespace
                && id.service_account == *service_account
        };
        let hash = self.hashes.pod(name, namespace, service_account);
        self.local.find_all(hash).filter(is_it).max_by_key(|workload| rank(workload))
    }

    pub(crate) fn len(&self) -> usize {
        self.by_uid.len()
    }

    #[cfg(test)]
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.by_uid.iter()
    }

    pub(crate) fn of_part(&self, part: usize) -> Option<impl Iterator<Item = &Arc<Workload>>> {
        self.by_uid.of_part(part)
    }

    pub(crate) fn get(&self, uid: &WorkloadUid) -> Option<&Arc<Workload>> {
        self.by_uid.find(self.hashes.uid(uid), |workload| workload.uid == *uid)
    }

    pub(crate) fn at(&self, address: &NetworkAddress) -> Option<&Arc<Workload>> {
        let NetworkAddress { network, ip } = address;
        let hash = self.hashes.ip(network, Some(ip));
        let is_it =
            |workload: &&Arc<Workload>| workload.network == *network && workload.ips.contains(ip);
        let others = self.by_other_ip.find_all(hash).map(|place| &place.workload);
        self.by_ip.find_all(hash).chain(others).filter(is_it).max_by_key(|w| rank(w))
    }

    pub(crate) fn of_host(&self, namespace: &Namespace, host: &Hostname) -> Option<&Arc<Workload>> {
        let is_it = |workload: &&Arc<Workload>| {
            workload.identity.namespace == *namespace && workload.hostname.as_ref() == Some(host)
        };
        let hash = self.hashes.host(namespace, Some(host));
        self.by_host.find_all(hash).filter(is_it).max_by_key(|workload| rank(workload))
    }

    /// Adds or replaces.
    pub(crate) fn insert(&mut self, workload: Arc<Workload>) {
        self.remove(&workload.uid);
        let hashes = &self.hashes;
        if workload.network_mode == NetworkMode::Standard {
            if !workload.ips.is_empty() {
                let hash = hashes.first_ip_of(&workload);
                self.by_ip.insert(hash, Arc::clone(&workload), |w| hashes.first_ip_of(w));
            }
            for at in 1..workload.ips.len() {
                let place = Place { workload: Arc::clone(&workload), at };
                self.by_other_ip.insert(hashes.place(&place), place, |place| hashes.place(place));
            }
        }
        if workload.hostname.is_some() {
            let hash = hashes.host_of(&workload);
            self.by_host.insert(hash, Arc::clone(&workload), |w| hashes.host_of(w));
        }
        if self.is_local(&workload) {
            let hash = hashes.pod_of(&workload);
            self.local.insert(hash, Arc::clone(&workload), |w| hashes.pod_of(w));
        }
        let hash = hashes.uid_of(&workload);
        self.by_uid.insert(hash, workload, |w| hashes.uid_of(w));
    }

    pub(crate) fn remove(&mut self, uid: &WorkloadUid) -> Option<Arc<Workload>> {
        let hashes = &self.hashes;
        let is_it = |workload: &Arc<Workload>| workload.uid == *uid;
        let old = self.by_uid.remove(hashes.uid(uid), is_it, |w| hashes.uid_of(w))?;
        if old.network_mode == NetworkMode::Standard {
            if !old.ips.is_empty() {
                self.by_ip.remove(hashes.first_ip_of(&old), is(&old), |w| hashes.first_ip_of(w));
            }
            for at in 1..old.ips.len() {
                let hash = hashes.ip(&old.network, old.ips.get(at));
                let is_it = |p: &Place| p.at == at && Arc::ptr_eq(&p.workload, &old);
                self.by_other_ip.remove(hash, is_it, |place| hashes.place(place));
            }
        }
        if old.hostname.is_some() {
            self.by_host.remove(hashes.host_of(&old), is(&old), |w| hashes.host_of(w));
        }
        self.local.remove(hashes.pod_of(&old), is(&old), |w| hashes.pod_of(w));
        Some(old)
    }
}
