//! What a name stands for in the mesh. Pure: chance comes in as a seed.

use crate::{
    Settings,
    names::{Alias, aliases, wildcards},
};
use mesh_core::{Health, HealthPolicy, IpFamilies, Namespace, Service, ServiceKey, Workload};
use mesh_state::View;
use std::net::IpAddr;

/// Addresses in one answer, at most: more do not fit a message of 64 KiB.
const ADDRESSES: usize = 4096;
/// Endpoints looked at for one answer, at most: readers of the state must be quick.
const ENDPOINTS: usize = 8192;

/// Which addresses are asked for.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Family {
    /// A.
    V4,
    /// AAAA.
    V6,
}

/// What the state says of a name.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Answer {
    /// Nothing: somebody else may know it.
    Forward,
    /// It is a name of the mesh.
    Local(Local),
}

/// An answer from the state.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Local {
    /// What the requested name is an alias of, if so; the addresses are its.
    pub canonical: Option<String>,
    /// The addresses, in the order of the reply. None is an answer, too.
    pub ips: Vec<IpAddr>,
    /// Whether the service, or we, do not have this family at all.
    pub unsupported: bool,
}

impl Family {
    fn has(self, ip: &IpAddr) -> bool {
        match self {
            Self::V4 => ip.is_ipv4(),
            Self::V6 => ip.is_ipv6(),
        }
    }
}

/// What stands behind a name.
enum Target<'a> {
    Service(&'a Service),
    /// The pods of this hostname among the endpoints of a headless service.
    Pods(&'a Service, &'a str),
}

/// What the name means to this client. The name is in lower case, without a final dot.
#[must_use]
pub fn resolve(
    view: &View,
    client: &Workload,
    settings: &Settings,
    (name, family): (&str, Family),
    seed: u64,
) -> Answer {
    let own = &client.identity.namespace;
    for Alias { name, stripped } in aliases(name, own, settings) {
        let Some((target, exact)) = find(view, own, settings, &name) else { continue };
        let mut ips = Vec::new();
        let supported = match &target {
            Target::Service(service) | Target::Pods(service, _) => {
                supports(service, family) && (family == Family::V4 || settings.ipv6)
            }
        };
        if supported {
            let mut random = fastrand::Rng::with_seed(seed);
            ips = addresses(view, client, &target, family, &mut random);
            random.shuffle(&mut ips);
        }
        // An empty answer is the requested name's own.
        let canonical = stripped.filter(|_| exact && !ips.is_empty());
        return Answer::Local(Local { canonical, ips, unsupported: !supported });
    }
    Answer::Forward
}

/// Whether the name is one of the mesh's to this client, whatever the type that is asked for. What falls under
/// a wildcard is not: it may well not exist.
#[must_use]
pub fn is_known(view: &View, client: &Workload, settings: &Settings, name: &str) -> bool {
    let own = &client.identity.namespace;
    let exact =
        |alias: &Alias| find(view, own, settings, &alias.name).is_some_and(|(_, exact)| exact);
    aliases(name, own, settings).iter().any(exact)
}

/// What has this very name, and whether it does so without a wildcard.
fn find<'a>(
    view: &'a View,
    client: &Namespace,
    settings: &Settings,
    name: &'a str,
) -> Option<(Target<'a>, bool)> {
    if let Some(service) = choose(view, client, settings, name) {
        return Some((Target::Service(service), true));
    }
    if let Some((pod, rest)) = name.split_once('.')
        && let Some(service) = choose(view, client, settings, rest)
        && service.vips.is_empty()
        && endpoints(view, service).any(|workload| is_called(workload, pod))
    {
        return Some((Target::Pods(service, pod), true));
    }
    let service = wildcards(name).find_map(|name| choose(view, client, settings, &name))?;
    Some((Target::Service(service), false))
}

/// The service that a client means by a hostname. Headless ones are Kubernetes' business alone: those of
/// others have addresses that only their own resolver knows.
fn choose<'a>(
    view: &'a View,
    client: &Namespace,
    settings: &Settings,
    name: &str,
) -> Option<&'a Service> {
    let kubernetes =
        name.strip_suffix(settings.domain.as_str()).is_some_and(|rest| rest.ends_with(".svc."));
    view.usable_of_host(name, client, |service| kubernetes || !service.vips.is_empty())
}

const fn supports(service: &Service, family: Family) -> bool {
    match (service.ip_families, family) {
        (IpFamilies::Automatic | IpFamilies::Dual, _)
        | (IpFamilies::V4, Family::V4)
        | (IpFamilies::V6, Family::V6) => true,
        (IpFamilies::V4, Family::V6) | (IpFamilies::V6, Family::V4) => false,
    }
}

/// The endpoints that a name may lead to. Kubernetes publishes those that are not ready where the service
/// asks for it, and only there.
fn endpoints<'a>(view: &'a View, service: &Service) -> impl Iterator<Item = &'a Workload> + Clone {
    let all = service.load_balancing.as_ref().is_some_and(|lb| lb.health == HealthPolicy::AllowAll);
    let usable = move |workload: &&Workload| all || workload.health == Health::Healthy;
    let key: &ServiceKey = &service.key;
    view.endpoints(key).iter().take(ENDPOINTS).map(|workload| &**workload).filter(usable)
}

/// By the pod's hostname, which is its name where it has not said otherwise.
fn is_called(workload: &Workload, pod: &str) -> bool {
    let hostname = workload.hostname.as_ref().map_or(workload.name.as_str(), |name| name.as_str());
    hostname.eq_ignore_ascii_case(pod)
}

fn addresses(
    view: &View,
    client: &Workload,
    target: &Target<'_>,
    family: Family,
    random: &mut fastrand::Rng,
) -> Vec<IpAddr> {
    // An address of another network means something else here, or nothing.
    let mut one_each = |service: &Service, pod: Option<&str>| {
        let these = endpoints(view, service).filter(|workload| {
            workload.network == client.network && pod.is_none_or(|pod| is_called(workload, pod))
        });
        let ips = these.filter_map(|workload| workload.ips.iter().find(|ip| family.has(ip)));
        let mut ips: Vec<IpAddr> = ips.copied().collect();
        if ips.len() > ADDRESSES {
            random.shuffle(&mut ips);
            ips.truncate(ADDRESSES);
        }
        ips
    };
    match target {
        Target::Service(service) if service.vips.is_empty() => one_each(service, None),
        Target::Service(service) => {
            let here = service.vips.iter().filter(|vip| vip.network == client.network);
            let ips = here.filter_map(|vip| vip.block.single()).filter(|ip| family.has(ip));
            ips.take(ADDRESSES).collect()
        }
        Target::Pods(service, pod) => one_each(service, Some(pod)),
    }
}

#[cfg(test)]
mod tests;
