//! istiod: where resources come from, and who signs certificates.

use crate::{
    config::{Config, Remote},
    demand::Demand,
    resources::Sources,
};
use anyhow::Context as _;
use mesh_identity::{
    ca::{CertificateAuthority, istio},
    tls::Options,
    token::Token,
};
use mesh_runtime::{
    control_plane::{ControlPlane, Roots, Tls},
    metrics::Registry,
    ready::Readiness,
    tasks::Tasks,
};
use mesh_xds::{
    Known,
    client::{self, Client},
};
use std::{sync::Arc, time::Duration};
use tokio::runtime::Handle;

fn plane(remote: &Remote, options: Options, tasks: &Tasks) -> anyhow::Result<ControlPlane> {
    let also_named = remote.also_named.clone().map(TryInto::try_into).transpose();
    let tls = Tls {
        roots: Roots::from_setting(&remote.root),
        also_named: also_named.context("the alternative name of the control plane is no name")?,
        provider: Arc::new(options.provider()),
        versions: options.versions(),
    };
    ControlPlane::new(&remote.address, tls, tasks)
        .with_context(|| format!("use the control plane at {}", remote.address))
}

/// Has the control plane's resources applied from now on, on this runtime. Returns whom to ask for those that do not
/// come by themselves, and when the others have come.
///
/// # Errors
///
/// Returns what is wrong with the settings; a control plane that is not there is waited for.
pub(crate) fn follow(
    config: &Config,
    remote: &Remote,
    sources: Sources,
    (registry, readiness): (&Registry, &Readiness),
    (tasks, runtime): (&Tasks, &Handle),
) -> anyhow::Result<(Demand, Known)> {
    let Config { control_plane: settings, node, .. } = config;
    let plane = plane(remote, config.tls.options, tasks)?;
    let on_demand = settings.on_demand;
    let token = Token::from_setting(settings.token.as_deref());
    let settings = client::Settings {
        node: mesh_xds::Node {
            ip: settings.ip.clone(),
            name: settings.pod.clone(),
            namespace: settings.namespace.clone(),
            node: node.name.to_string(),
            metadata: settings.metadata.clone(),
            json_metadata: settings.json_metadata.clone(),
        },
        cluster: node.cluster.to_string(),
        on_demand,
        headers: remote.headers.clone(),
        token: Arc::new(move || Ok(token.read()?)),
    };
    let (client, demand) = Client::new(settings, plane, sources, (registry, readiness))?;
    let known = client.known();
    tasks.spawn_on(runtime, |draining| client.run(draining));
    Ok((if on_demand { Demand::of(demand) } else { Demand::default() }, known))
}

/// The CA behind this address.
///
/// # Errors
///
/// Returns what is wrong with the settings.
pub(crate) fn authority(
    config: &Config,
    remote: &Remote,
    (validity, impersonate): (Duration, bool),
    tasks: &Tasks,
) -> anyhow::Result<Arc<dyn CertificateAuthority>> {
    let Config { control_plane: settings, node, .. } = config;
    let root = match Roots::from_setting(&remote.root) {
        Roots::File(path) => Some(path),
        Roots::Pem(_) | Roots::System => None,
    };
    let plane = plane(remote, config.tls.options, tasks)?;
    let settings = istio::Settings {
        impersonate,
        validity,
        cluster: node.cluster.to_string(),
        token: Token::from_setting(settings.token.as_deref()),
        headers: remote.headers.clone(),
        root,
    };
    let connect = move || {
        let plane = plane.clone();
        async move { Ok(plane.connect().await?.0) }
    };
    Ok(Arc::new(istio::IstioCa::new(connect, settings)?))
}
