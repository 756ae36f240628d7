//! The node proxy at its door, under the rules that istio-cni writes. Real namespaces, real processes.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use mesh_tests::{
    Node, Pod, Scene,
    istio_cni::{Backend, Rules},
};

#[path = "l4/alone.rs"]
mod alone;
#[path = "l4/cases.rs"]
mod cases;
#[path = "l4/rules.rs"]
mod rules;

fn start(settings: &[(&str, &str)]) -> anyhow::Result<Scene> {
    Scene::external(Backend::Iptables, settings)
}

fn enrol(node: &Node, pod: &Pod, account: &str) -> anyhow::Result<()> {
    Rules::new(Backend::Iptables).write(pod)?;
    node.enrol(pod, account)
}
