//! Services of the local file.

use mesh_proto::istio::workload::{IpFamilies, LoadBalancing, Service, load_balancing, service};

use super::address;
use super::fault::Fault;
use super::tokens::{Kind, Token, Tokens};
use super::value;
use super::workload;

type Result<T> = std::result::Result<T, Box<Fault>>;

/// One item of `services`.
pub(super) fn read(tokens: &mut Tokens<'_>, start: &Token) -> Result<Service> {
    let mut service = Service::default();
    value::map(tokens, start, |tokens, key, name, token| {
        field(&mut service, tokens, (key, name), token)
    })?;
    if service.namespace.is_empty() {
        return Err(value::missing(start, "namespace"));
    }
    if service.hostname.is_empty() {
        return Err(value::missing(start, "hostname"));
    }
    Ok(service)
}

fn field(
    service: &mut Service,
    tokens: &mut Tokens<'_>,
    (key, name): (&Token, &str),
    token: Token,
) -> Result<()> {
    match name {
        "name" => service.name = value::text(token)?,
        "namespace" => service.namespace = value::text(token)?,
        "hostname" => service.hostname = value::text(token)?,
        "vips" => {
            service.addresses.extend(value::each(tokens, &token, |item| address::vip(&item))?)
        }
        "cidrVips" => value::list(tokens, &token, |tokens, item| {
            service.addresses.push(address::cidr_vip(tokens, &item)?);
            Ok(())
        })?,
        "ports" => service.ports = workload::ports(tokens, &token)?,
        "endpoints" => endpoints(tokens, &token)?,
        "subjectAltNames" => service.subject_alt_names = value::each(tokens, &token, value::text)?,
        "waypoint" => service.waypoint = address::gateway(tokens, &token)?,
        "weightedWaypoints" => value::list(tokens, &token, |tokens, item| {
            service.weighted_waypoints.push(address::weighted(tokens, &item)?);
            Ok(())
        })?,
        "loadBalancer" => service.load_balancing = balancing(tokens, &token)?,
        _ if token.is_null() && SCALARS.contains(&name) => {}
        "ipFamilies" => {
            let words = [
                ("Dual", IpFamilies::Dual),
                ("IPv4", IpFamilies::Ipv4Only),
                ("IPv6", IpFamilies::Ipv6Only),
            ];
            service.set_ip_families(value::one_of(&token, &words)?);
        }
        "canonical" => service.canonical = value::flag(&token)?,
        "visibility" => {
            let words = [
                ("Public", service::Visibility::Public),
                ("Namespace", service::Visibility::Namespace),
            ];
            service.set_visibility(value::one_of(&token, &words)?);
        }
        _ => return Err(value::unknown(key)),
    }
    Ok(())
}

const SCALARS: [&str; 3] = ["ipFamilies", "canonical", "visibility"];

/// Upstream's field is where its dump prints what it derived from the workloads. It is read past: a service's
/// endpoints are the workloads that name it, in a file as in xDS.
fn endpoints(tokens: &mut Tokens<'_>, start: &Token) -> Result<()> {
    if !start.is_null() && !matches!(start.kind, Kind::Map) {
        return Err(Fault::new(start.at, "expected a map"));
    }
    value::skip(tokens, start)
}

fn balancing(tokens: &mut Tokens<'_>, start: &Token) -> Result<Option<LoadBalancing>> {
    use load_balancing::{HealthPolicy, Mode, Scope};
    if start.is_null() {
        return Ok(None);
    }
    let mut balancing = LoadBalancing::default();
    value::map(tokens, start, |tokens, key, name, token| {
        match name {
            "routingPreferences" => {
                let words = [
                    ("Region", Scope::Region),
                    ("Zone", Scope::Zone),
                    ("Subzone", Scope::Subzone),
                    ("Node", Scope::Node),
                    ("Cluster", Scope::Cluster),
                    ("Network", Scope::Network),
                ];
                balancing.routing_preference = value::each(tokens, &token, |item| {
                    value::one_of(&item, &words).map(i32::from)
                })?;
            }
            "mode" => {
                let words = [
                    ("Standard", Mode::UnspecifiedMode),
                    ("Strict", Mode::Strict),
                    ("Failover", Mode::Failover),
                    ("Passthrough", Mode::Passthrough),
                ];
                balancing.set_mode(value::one_of(&token, &words)?);
            }
            "healthPolicy" => {
                let words = [
                    ("OnlyHealthy", HealthPolicy::OnlyHealthy),
                    ("AllowAll", HealthPolicy::AllowAll),
                ];
                balancing.set_health_policy(value::one_of(&token, &words)?);
            }
            _ => return Err(value::unknown(key)),
        }
        Ok(())
    })?;
    Ok(Some(balancing))
}
