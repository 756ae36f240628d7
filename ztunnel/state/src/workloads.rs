//! The index of workloads: by uid and by address. A workload is held once; no key is copied.

use crate::PodInfo;
use hashbrown::{DefaultHashBuilder, HashTable, hash_table::Entry};
use mesh_core::{
    NetworkAddress, NetworkId, NetworkMode, Text, TunnelProtocol, Workload, WorkloadUid,
};
use std::{hash::BuildHasher, net::IpAddr, sync::Arc};

/// One address of a workload.
#[derive(Debug)]
struct Place {
    ip: IpAddr,
    workload: Arc<Workload>,
}

/// The index.
#[derive(Debug, Default)]
pub(crate) struct Workloads {
    by_uid: HashTable<Arc<Workload>>,
    /// May hold several with one address.
    by_address: HashTable<Place>,
    /// Those of our own node.
    local: Vec<Arc<Workload>>,
    node: Text,
    hasher: DefaultHashBuilder,
}

/// Which of several workloads with one address is meant: pods that take tunnels, then pods, then what
/// takes tunnels. Istio's rule.
fn rank(workload: &Workload) -> u8 {
    let pod = u8::from(workload.uid.as_str().contains("//Pod/"));
    let tunnel = u8::from(workload.protocol == TunnelProtocol::Hbone);
    pod * 2 + tunnel
}

impl Workloads {
    pub(crate) fn of_node(node: Text) -> Self {
        Self { node, ..Self::default() }
    }

    /// The workload of a pod of our own node.
    pub(crate) fn local(&self, pod: &PodInfo) -> Option<&Arc<Workload>> {
        self.local.iter().find(|workload| {
            workload.name == pod.name
                && workload.identity.namespace == pod.namespace
                && workload.identity.service_account == pod.service_account
        })
    }

    fn hash_uid(&self, uid: &WorkloadUid) -> u64 {
        self.hasher.hash_one(uid)
    }

    fn hash_place(hasher: &DefaultHashBuilder, network: &NetworkId, ip: IpAddr) -> u64 {
        hasher.hash_one((network, ip))
    }

    pub(crate) fn len(&self) -> usize {
        self.by_uid.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.by_uid.iter()
    }

    pub(crate) fn get(&self, uid: &WorkloadUid) -> Option<&Arc<Workload>> {
        self.by_uid.find(self.hash_uid(uid), |workload| workload.uid == *uid)
    }

    pub(crate) fn at(&self, address: &NetworkAddress) -> Option<&Arc<Workload>> {
        let hash = Self::hash_place(&self.hasher, &address.network, address.ip);
        let ip = address.ip;
        self.by_address
            .iter_hash(hash)
            .filter(|place| place.ip == ip && place.workload.network == address.network)
            .map(|place| &place.workload)
            .max_by_key(|workload| (rank(workload), std::cmp::Reverse(workload.uid.as_str())))
    }

    /// Returns what it replaced.
    pub(crate) fn insert(&mut self, workload: Arc<Workload>) -> Option<Arc<Workload>> {
        let old = self.remove(&workload.uid);
        if workload.network_mode == NetworkMode::Standard {
            for &ip in &workload.ips {
                let hash = Self::hash_place(&self.hasher, &workload.network, ip);
                let place = Place { ip, workload: Arc::clone(&workload) };
                let hasher = &self.hasher;
                self.by_address.insert_unique(hash, place, |place| {
                    Self::hash_place(hasher, &place.workload.network, place.ip)
                });
            }
        }
        if workload.node == self.node {
            self.local.push(Arc::clone(&workload));
        }
        let hash = self.hash_uid(&workload.uid);
        let hasher = &self.hasher;
        self.by_uid.insert_unique(hash, workload, |workload| hasher.hash_one(&workload.uid));
        old
    }

    pub(crate) fn remove(&mut self, uid: &WorkloadUid) -> Option<Arc<Workload>> {
        let hash = self.hash_uid(uid);
        let hasher = &self.hasher;
        let entry =
            self.by_uid.entry(hash, |w| w.uid == *uid, |workload| hasher.hash_one(&workload.uid));
        let Entry::Occupied(entry) = entry else { return None };
        let (old, _) = entry.remove();
        self.local.retain(|workload| !Arc::ptr_eq(workload, &old));
        for &ip in &old.ips {
            let hash = Self::hash_place(&self.hasher, &old.network, ip);
            let is_it = |place: &Place| place.ip == ip && Arc::ptr_eq(&place.workload, &old);
            if let Ok(place) = self.by_address.find_entry(hash, is_it) {
                place.remove();
            }
        }
        Some(old)
    }
}
