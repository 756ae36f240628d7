//! Addresses, networks and gateways in the spellings of the local file.

use std::net::IpAddr;

use mesh_proto::istio::security;
use mesh_proto::istio::workload::{
    GatewayAddress, NamespacedHostname, NetworkAddress, WeightedWaypoint,
    gateway_address::Destination,
};

use super::fault::Fault;
use super::tokens::{Kind, Token, Tokens};
use super::value;

type Result<T> = std::result::Result<T, Box<Fault>>;

/// HBONE's port, where a gateway names none.
const HBONE: u32 = 15_008;

/// An address as the messages hold it.
pub(super) fn octets<B: From<Vec<u8>>>(ip: IpAddr) -> B {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec().into(),
        IpAddr::V6(ip) => ip.octets().to_vec().into(),
    }
}

fn width(ip: IpAddr) -> u32 {
    if ip.is_ipv4() { 32 } else { 128 }
}

/// `10.0.0.0/8`, or one address.
fn block(text: &str) -> Option<(IpAddr, u32)> {
    let (ip, length) = match text.split_once('/') {
        Some((ip, length)) => (ip.parse().ok()?, Some(length.parse().ok()?)),
        None => (text.parse().ok()?, None),
    };
    let length = length.unwrap_or(width(ip));
    (length <= width(ip)).then_some((ip, length))
}

/// A policy's address block.
pub(super) fn cidr(token: &Token) -> Result<security::Address> {
    value::with(token, "an address block such as 10.0.0.0/8", |text| {
        let (ip, length) = block(text)?;
        Some(security::Address { address: octets(ip), length })
    })
}

/// `network/ip`, where the network may be empty; a block of addresses where a prefix length follows.
fn network_address(text: &str) -> Option<NetworkAddress> {
    let (network, address) = text.split_once('/')?;
    let (ip, length) = block(address)?;
    let length = (length < width(ip)).then_some(length);
    Some(NetworkAddress { network: network.to_owned(), address: octets(ip), length })
}

/// A service's address.
pub(super) fn vip(token: &Token) -> Result<NetworkAddress> {
    value::with(token, "network/ip, where the network may be empty", network_address)
}

/// A service's block of addresses: `{network, cidr}`, as the dump prints it, or `network/cidr`.
pub(super) fn cidr_vip(tokens: &mut Tokens<'_>, start: &Token) -> Result<NetworkAddress> {
    if !matches!(start.kind, Kind::Map) {
        return vip(start);
    }
    let mut network = String::new();
    let mut found = None;
    value::map(tokens, start, |_, key, name, token| {
        match name {
            "network" => network = value::text(token)?,
            "cidr" => found = Some(cidr(&token)?),
            _ => return Err(value::unknown(key)),
        }
        Ok(())
    })?;
    let found = found.ok_or_else(|| value::missing(start, "cidr"))?;
    let full = u32::try_from(found.address.len() * 8).unwrap_or(u32::MAX);
    let length = (found.length < full).then_some(found.length);
    Ok(NetworkAddress { network, address: found.address.into(), length })
}

fn single(address: NetworkAddress) -> Option<NetworkAddress> {
    address.length.is_none().then_some(address)
}

fn hostname(text: &str) -> Option<NamespacedHostname> {
    let (namespace, hostname) = text.split_once('/')?;
    (!hostname.is_empty() && !hostname.contains('/')).then(|| NamespacedHostname {
        namespace: namespace.to_owned(),
        hostname: hostname.to_owned(),
    })
}

/// `network/ip` or `namespace/hostname`. What reads as an address is one.
fn destination(text: &str) -> Option<Destination> {
    match network_address(text) {
        Some(address) => single(address).map(Destination::Address),
        None => hostname(text).map(Destination::Hostname),
    }
}

/// A waypoint or a network gateway; `None` for null.
pub(super) fn gateway(tokens: &mut Tokens<'_>, start: &Token) -> Result<Option<GatewayAddress>> {
    if start.is_null() {
        return Ok(None);
    }
    let mut found = None;
    let mut port = HBONE;
    value::map(tokens, start, |tokens, key, name, token| {
        match name {
            "destination" => found = Some(gateway_destination(tokens, &token)?),
            "hboneMtlsPort" => port = u32::from(value::parsed::<u16>(&token, "a port")?),
            _ => return Err(value::unknown(key)),
        }
        Ok(())
    })?;
    let destination = Some(found.ok_or_else(|| value::missing(start, "destination"))?);
    Ok(Some(GatewayAddress { destination, hbone_mtls_port: port }))
}

/// A destination as one text, or in parts: `{hostname: {namespace, hostname}}`, `{address: {network, address}}`,
/// each also without its outer name.
fn gateway_destination(tokens: &mut Tokens<'_>, start: &Token) -> Result<Destination> {
    if !matches!(start.kind, Kind::Map) {
        return value::with(start, "network/ip or namespace/hostname", destination);
    }
    let mut whole = None;
    let (mut namespace, mut network, mut host, mut address) = (None, None, None, None);
    value::map(tokens, start, |tokens, key, name, token| {
        match (name, &token.kind) {
            ("hostname" | "address", Kind::Map) => {
                whole = Some(gateway_destination(tokens, &token)?)
            }
            ("hostname", _) => host = Some(value::text(token)?),
            ("address", Kind::Scalar { text, .. }) if text.contains('/') => {
                whole = Some(value::with(&token, "network/ip", |text| {
                    network_address(text).and_then(single).map(Destination::Address)
                })?);
            }
            ("address", _) => address = Some(value::parsed::<IpAddr>(&token, "an address")?),
            ("namespace", _) => namespace = Some(value::text(token)?),
            ("network", _) => network = Some(value::text(token)?),
            _ => return Err(value::unknown(key)),
        }
        Ok(())
    })?;
    let parts = namespace.is_some() || network.is_some();
    match (whole, host, address) {
        (Some(whole), None, None) if !parts => Ok(whole),
        (None, Some(hostname), None) if network.is_none() => {
            let namespace = namespace.ok_or_else(|| value::missing(start, "namespace"))?;
            Ok(Destination::Hostname(NamespacedHostname { namespace, hostname }))
        }
        (None, None, Some(ip)) if namespace.is_none() => Ok(Destination::Address(NetworkAddress {
            network: network.unwrap_or_default(),
            address: octets(ip),
            length: None,
        })),
        _ => Err(Fault::new(start.at, "expected one of hostname (with namespace) and address")),
    }
}

/// One of several waypoints, and its share.
pub(super) fn weighted(tokens: &mut Tokens<'_>, start: &Token) -> Result<WeightedWaypoint> {
    let mut found = None;
    let mut weight = 0;
    let mut port = HBONE;
    value::map(tokens, start, |tokens, key, name, token| {
        match name {
            // A gateway of its own, or its destination alone with the port beside it.
            "destination" | "waypoint" if matches!(token.kind, Kind::Map) => {
                found = gateway(tokens, &token)?;
            }
            "destination" => {
                let destination = Some(gateway_destination(tokens, &token)?);
                found = Some(GatewayAddress { destination, hbone_mtls_port: 0 });
            }
            "hboneMtlsPort" => port = u32::from(value::parsed::<u16>(&token, "a port")?),
            "weight" => weight = value::parsed(&token, "a weight")?,
            _ => return Err(value::unknown(key)),
        }
        Ok(())
    })?;
    let mut destination = found.ok_or_else(|| value::missing(start, "destination"))?;
    if destination.hbone_mtls_port == 0 {
        destination.hbone_mtls_port = port;
    }
    Ok(WeightedWaypoint { destination: Some(destination), weight })
}
