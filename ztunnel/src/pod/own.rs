//! Ourselves as a workload: in shared mode, a door for tunnels in our own network namespace, for who scrapes
//! the node proxy through the mesh. Nobody captures us, so there are no other doors, no marks, and the
//! applications, which are our own ports, see us as the client.

use super::{Pod, Shared};
use crate::inbound;
use anyhow::Context as _;
use mesh_platform::redirect::{Door, External, ExternalSettings, OriginalSource};
use mesh_runtime::tasks::Tasks;
use mesh_state::PodInfo;
use std::sync::Arc;

/// Serves tunnels to the node proxy itself.
///
/// # Errors
///
/// Returns why its port cannot be had.
pub(crate) fn serve(
    shared: &Shared,
    info: PodInfo,
    ipv6: bool,
    tasks: &Tasks,
) -> anyhow::Result<()> {
    let door = External::new(ExternalSettings {
        ipv6,
        port_reuse: false,
        original_source: OriginalSource::Never,
        mark: None,
        ..ExternalSettings::default()
    });
    let (sockets, listener) = door.own("ztunnel").context(
        "open port 15008 for tunnels to the node proxy itself (unset POD_NAME if it has none)",
    )?;
    let shared = Shared { redirect: Arc::new(door), ..shared.clone() };
    let pod = Pod::assemble(&shared, sockets, info, tasks);
    let warmed = Arc::clone(&pod);
    pod.tasks
        .spawn_on(shared.workers.next(), |draining| async move { warmed.warm(draining).await });
    pod.accept(Door::Hbone, listener, inbound::accepted);
    Ok(())
}
