//! The node proxy at its door, with capture of our own (eBPF). Real namespaces, real processes.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use mesh_tests::{Node, Pod, Scene};

#[path = "l4/cases.rs"]
mod cases;
#[path = "l4/itself.rs"]
mod itself;

fn start(settings: &[(&str, &str)]) -> anyhow::Result<Scene> {
    Scene::start(settings)
}

fn enrol(node: &Node, pod: &Pod, account: &str) -> anyhow::Result<()> {
    node.enrol(pod, account)
}
