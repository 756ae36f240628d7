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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::load;
    use mesh_runtime::config::ConfigErrors;
    use std::collections::BTreeMap;

    const PROXY_METADATA: &str =
        "proxyMetadata: {DNS_CAPTURE: \"false\", DNS_PROXY_ADDR: \"localhost:5353\"}";

    fn settings(pairs: &[(&str, &str)]) -> Result<Option<Dns>, ConfigErrors> {
        let map: BTreeMap<String, String> =
            pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        load(&map).map(|config| config.dns)
    }

    #[test]
    fn it_is_on_unless_told_otherwise() {
        let dns = settings(&[]).unwrap().unwrap();
        assert_eq!(dns.address, DnsAddress::Localhost(15053));
        assert_eq!((&*dns.settings.domain, dns.settings.search), ("cluster.local", None));
        for (name, value, on) in [
            ("ISTIO_META_DNS_CAPTURE", "TRUE", true),
            ("ISTIO_META_DNS_CAPTURE", "false", false),
            ("ISTIO_META_DNS_CAPTURE", "yes", false),
            ("PROXY_CONFIG", PROXY_METADATA, false),
        ] {
            assert_eq!(settings(&[(name, value)]).unwrap().is_some(), on, "{name}={value}");
        }
        let both = [("PROXY_CONFIG", PROXY_METADATA), ("ISTIO_META_DNS_CAPTURE", "true")];
        assert_eq!(settings(&both).unwrap().unwrap().address, DnsAddress::Localhost(5353));
    }

    #[test]
    fn where_and_for_which_cluster() {
        let dns = settings(&[
            ("ISTIO_META_DNS_PROXY_ADDR", "[::1]:53"),
            ("CLUSTER_DOMAIN", "Corp.Example."),
            ("IPV6_ENABLED", "false"),
        ]);
        let Dns { address, settings: found } = dns.unwrap().unwrap();
        assert_eq!(address, DnsAddress::At("[::1]:53".parse().unwrap()));
        assert_eq!((&*found.domain, found.ipv6), ("corp.example", false));
        for bad in ["localhost", "localhost:0", "localhost:99999", "example.com:53", ""] {
            settings(&[("ISTIO_META_DNS_PROXY_ADDR", bad)]).unwrap_err();
        }
        let one = [("PROXY_MODE", "dedicated"), ("PROXY_WORKLOAD_INFO", "ns/name/sa")];
        assert!(settings(&one).unwrap().unwrap().settings.search.is_some(), "resolv.conf's");
    }

    #[test]
    fn not_where_services_are_asked_for_one_by_one() {
        let on_demand = ("XDS_ON_DEMAND", "true");
        assert_eq!(settings(&[on_demand]).unwrap(), None);
        assert_eq!(settings(&[on_demand, ("ISTIO_META_DNS_CAPTURE", "false")]).unwrap(), None);
        settings(&[on_demand, ("ISTIO_META_DNS_CAPTURE", "true")]).unwrap_err();
        let file = [on_demand, ("LOCAL_XDS_PATH", "/x")];
        assert!(settings(&file).unwrap().is_some(), "a file has everything");
    }
}
