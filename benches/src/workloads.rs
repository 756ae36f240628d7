//! A large mesh, as a file and as resources: pods with an address, an account and a node, as the control plane would
//! tell of them.

use std::{
    fs::File,
    io::{BufWriter, Write as _},
    path::Path,
};

use anyhow::Result;
use mesh_proto::istio::workload::{
    Address, NetworkAddress, Port, PortList, Service, TunnelProtocol, Workload, address::Type,
};

/// The size of each workload in the file, in bytes: the reference was measured so.
pub const BYTES: usize = 433;

/// Pods of a deployment.
pub const REPLICAS: u32 = 10;
/// Deployments of a namespace.
const DEPLOYMENTS: u32 = 20;
/// Pods of a node.
const PODS: u32 = 50;

/// Writes a mesh of so many workloads.
pub fn write(path: &Path, count: u32) -> Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    file.write_all(b"workloads:\n")?;
    for number in 0..count {
        file.write_all(workload(number).as_bytes())?;
    }
    Ok(file.flush()?)
}

/// A resource and its name.
pub type Named = (String, Address);

/// What a pod is called and where it is.
#[derive(Clone, Debug)]
pub struct Place {
    deployment: u32,
    /// Its namespace.
    pub namespace: String,
    /// Its deployment, which is also its account.
    pub app: String,
    /// Its own name.
    pub name: String,
    /// Its node.
    pub node: String,
    /// Its address.
    pub ip: [u8; 4],
}

impl Place {
    /// Of the pod with this number, in this place of the mesh; each number has its own name and address.
    #[must_use]
    pub fn of(place: u32, number: u32) -> Self {
        let deployment = place / REPLICAS;
        let [_, a, b, c] = number.to_be_bytes();
        // The two last parts of a pod's name, as Kubernetes makes them.
        let (hash, tail) =
            (deployment.wrapping_mul(2_654_435_761), number.wrapping_mul(40_503) & 0xf_ffff);
        Self {
            deployment,
            namespace: format!("team-{}", deployment / DEPLOYMENTS),
            app: format!("app-{deployment}"),
            name: format!("app-{deployment}-{hash:08x}-{tail:05x}"),
            node: format!("node-{}.example.com", place / PODS),
            ip: [10, a, b, c],
        }
    }

    /// Its name among the resources.
    #[must_use]
    pub fn uid(&self) -> String {
        format!("Kubernetes//Pod/{}/{}", self.namespace, self.name)
    }

    /// The pod, an endpoint of its deployment's service, as a resource.
    #[must_use]
    pub fn workload(&self, revision: u32) -> Named {
        let ports = PortList { ports: ports() };
        let workload = Workload {
            uid: self.uid(),
            name: self.name.clone(),
            namespace: self.namespace.clone(),
            addresses: vec![self.ip.to_vec().into()],
            tunnel_protocol: TunnelProtocol::Hbone.into(),
            trust_domain: "cluster.local".to_owned(),
            service_account: self.app.clone(),
            node: self.node.clone(),
            canonical_name: self.app.clone(),
            canonical_revision: format!("v{revision}"),
            workload_name: self.app.clone(),
            cluster_id: "Kubernetes".to_owned(),
            services: [(self.key(), ports)].into_iter().collect(),
            ..Workload::default()
        };
        (self.uid(), Address { r#type: Some(Type::Workload(workload)) })
    }

    /// Its deployment's service, as a resource.
    #[must_use]
    pub fn service(&self) -> Named {
        let [_, _, high, low] = self.deployment.to_be_bytes();
        let address = vec![10, 100, high, low].into();
        let service = Service {
            name: self.app.clone(),
            namespace: self.namespace.clone(),
            hostname: self.hostname(),
            addresses: vec![NetworkAddress { address, ..NetworkAddress::default() }],
            ports: ports(),
            canonical: true,
            ..Service::default()
        };
        (self.key(), Address { r#type: Some(Type::Service(service)) })
    }

    fn hostname(&self) -> String {
        format!("{}.{}.svc.cluster.local", self.app, self.namespace)
    }

    fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.hostname())
    }
}

fn ports() -> Vec<Port> {
    vec![Port { service_port: 80, target_port: 8080, ..Port::default() }]
}

/// One of them, exactly [`BYTES`] long: what is missing is a comment, which nobody has to remember.
fn workload(number: u32) -> String {
    let place = Place::of(number, number);
    let Place { namespace, app, name, node, ip: [_, a, b, c], .. } = &place;
    let mut text = format!(
        "- uid: {}\n  name: {name}\n  namespace: {namespace}\n  \
         trustDomain: cluster.local\n  serviceAccount: {app}\n  workloadIps: [10.{a}.{b}.{c}]\n  \
         protocol: HBONE\n  node: {node}\n  network: \"\"\n  workloadName: {app}\n  \
         workloadType: deployment\n  canonicalName: {app}\n  canonicalRevision: v1\n  \
         clusterId: Kubernetes\n  status: Healthy\n",
        place.uid(),
    );
    let missing = BYTES.saturating_sub(text.len());
    if let Some(fill) = missing.checked_sub(4) {
        text.push_str(&format!("  #{}\n", "-".repeat(fill)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_workload_has_the_size_of_the_reference() {
        for number in [0, 1, 9_999, 99_999, 499_999] {
            let text = workload(number);
            assert_eq!(text.len(), BYTES, "{number}: {text}");
        }
    }

    #[test]
    fn names_and_addresses_differ() {
        assert_ne!(workload(1), workload(2));
        assert!(workload(70_000).contains("[10.1.17.112]"));
        let (old, new) = (Place::of(7, 7), Place::of(7, 100_007));
        assert_eq!(old.service(), new.service());
        let (_, workload) = old.workload(1);
        let Some(Type::Workload(workload)) = workload.r#type else { panic!("no workload") };
        assert!(workload.services.contains_key(&old.service().0));
        assert_ne!((old.uid(), old.ip), (new.uid(), new.ip));
    }
}
