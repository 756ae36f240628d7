//! A large mesh as a file: pods with an address, an account and a node, as the control plane would tell of them.

use std::{
    fs::File,
    io::{BufWriter, Write as _},
    path::Path,
};

use anyhow::Result;

/// The size of each workload in the file, in bytes: the reference was measured so.
pub const BYTES: usize = 433;

/// Pods of a deployment.
const REPLICAS: u32 = 10;
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

/// One of them, exactly [`BYTES`] long: what is missing is a comment, which nobody has to remember.
fn workload(number: u32) -> String {
    let deployment = number / REPLICAS;
    let namespace = deployment / DEPLOYMENTS;
    let node = number / PODS;
    let [_, a, b, c] = number.to_be_bytes();
    // The two last parts of a pod's name, as Kubernetes makes them.
    let (hash, tail) =
        (deployment.wrapping_mul(2_654_435_761), number.wrapping_mul(40_503) & 0xf_ffff);
    let name = format!("app-{deployment}-{hash:08x}-{tail:05x}");
    let mut text = format!(
        "- uid: Kubernetes//Pod/team-{namespace}/{name}\n  name: {name}\n  namespace: team-{namespace}\n  \
         trustDomain: cluster.local\n  serviceAccount: app-{deployment}\n  workloadIps: [10.{a}.{b}.{c}]\n  \
         protocol: HBONE\n  node: node-{node}.example.com\n  network: \"\"\n  workloadName: app-{deployment}\n  \
         workloadType: deployment\n  canonicalName: app-{deployment}\n  canonicalRevision: v1\n  \
         clusterId: Kubernetes\n  status: Healthy\n"
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
    }
}
