//! The settings of the DNS proxy.

use super::{Resources, keys};
use mesh_dns::{ResolvConf, Settings};
use mesh_platform::redirect::DnsAddress;
use mesh_runtime::config::Reader;

/// Where a process is told whom to ask.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// How names are answered, and where.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Dns {
    /// Where the proxy listens in each pod.
    pub address: DnsAddress,
    /// What it answers.
    pub settings: Settings,
}

/// Istio's rules: on, unless something other than `true` was written. `dedicated` is dedicated mode.
pub(super) fn dns(reader: &mut Reader<'_>, dedicated: bool) -> Option<Dns> {
    let address = address(reader);
    let domain = reader.text(&keys::CLUSTER_DOMAIN);
    if !reader.text(&keys::DNS_CAPTURE).eq_ignore_ascii_case("true") {
        return None;
    }
    // A file that is not there is an empty one.
    let resolv = ResolvConf::parse(&std::fs::read_to_string(RESOLV_CONF).unwrap_or_default());
    let settings = Settings {
        domain: domain.trim_matches('.').to_ascii_lowercase(),
        ipv6: reader.toggle(&keys::IPV6_ENABLED),
        search: dedicated.then_some(resolv.search),
        servers: resolv.servers,
    };
    Some(Dns { address, settings })
}

/// Names are answered from what is known, which on demand is nothing: as in Istio, one or the other.
pub(super) fn without_demand(
    reader: &mut Reader<'_>,
    dns: Option<Dns>,
    resources: &Resources,
) -> Option<Dns> {
    let on_demand =
        reader.toggle(&keys::XDS_ON_DEMAND) && matches!(resources, Resources::ControlPlane(_));
    if dns.is_none() || !on_demand {
        return dns;
    }
    if reader.source().get(keys::DNS_CAPTURE.name).is_some() {
        let advice = "set it to false, or XDS_ON_DEMAND: DNS needs to know all services";
        reader.invalid(&keys::DNS_CAPTURE, advice);
    } else {
        tracing::warn!("names are not answered: with XDS_ON_DEMAND not all services are known");
    }
    None
}

fn address(reader: &mut Reader<'_>) -> DnsAddress {
    let text = reader.text(&keys::DNS_PROXY_ADDR);
    let port = |text: &str| text.parse().ok().filter(|port| *port != 0).map(DnsAddress::Localhost);
    let parsed = match text.strip_prefix("localhost:") {
        Some(text) => port(text),
        None => text.parse().ok().map(DnsAddress::At),
    };
    parsed.unwrap_or_else(|| {
        reader.invalid(&keys::DNS_PROXY_ADDR, "write localhost:<port>, or an address and a port");
        DnsAddress::Localhost(0)
    })
}
