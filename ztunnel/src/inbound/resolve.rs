//! What the CONNECT of a tunnel asks for, and whether it may ask that here. Pure.

use crate::outbound::PlanConfig;
use mesh_core::{NetworkAddress, NetworkId, Reason, Service, Workload};
use mesh_hbone::Authority;
use mesh_state::View;
use std::{
    error::Error,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

/// What a stream is to be connected to.
#[derive(Clone, Debug)]
pub struct Target {
    /// The application.
    pub address: SocketAddr,
    /// The service that was meant, as far as it can be told.
    pub service: Option<Arc<Service>>,
    /// The destination to name in a PROXY protocol header, where the application takes one.
    pub announce: Option<SocketAddr>,
}

/// What is asked, and of whom.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// The workload that the tunnel came to.
    pub local: &'a Workload,
    /// The address that it came to.
    pub address: SocketAddr,
    /// What the CONNECT asks for.
    pub authority: &'a Authority,
    /// The service that the client says it meant.
    pub meant: Option<&'a str>,
    /// Our network.
    pub network: &'a NetworkId,
    /// Whether applications that take the PROXY protocol are reached on loopback.
    pub localhost_tunnel: bool,
}

/// Why a stream is refused, in Istio's words.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Refusal {
    /// The authority is another's address.
    Mismatch(IpAddr, IpAddr),
    /// The target is one of our own ports.
    Recursive,
    /// There is no such service.
    UnknownService(String),
    /// There is such a service, and this endpoint does not serve that port of it.
    UnknownPort(String),
    /// The service has no address to announce.
    NoVip(String),
}

impl Refusal {
    /// The answer to the CONNECT.
    #[must_use]
    pub const fn status(&self) -> u16 {
        self.reason().report().status
    }

    /// What it is an instance of.
    #[must_use]
    pub const fn reason(&self) -> Reason {
        match self {
            Self::Mismatch(..) => Reason::Malformed,
            Self::Recursive => Reason::Recursive,
            Self::UnknownService(_) | Self::UnknownPort(_) | Self::NoVip(_) => Reason::NoUpstream,
        }
    }

    /// The reason in a word, for a label.
    #[must_use]
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Mismatch(..) => "mismatch",
            Self::Recursive => "recursive",
            Self::UnknownService(_) | Self::UnknownPort(_) | Self::NoVip(_) => "unknown_service",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mismatch(local, asked) => write!(f, "ip mismatch: {local} != {asked}"),
            Self::Recursive => f.write_str("attempted recursive call to ourselves"),
            Self::UnknownService(host) => {
                write!(f, "no service or workload for hostname: {host}")
            }
            Self::UnknownPort(host) => {
                write!(f, "requested service {host} found, but cannot resolve port")
            }
            Self::NoVip(host) => write!(f, "requested service {host} has no address to announce"),
        }
    }
}

impl Error for Refusal {}

/// Finds the application that a CONNECT asks for.
///
/// # Errors
///
/// Returns why it may not ask that here.
pub fn resolve(view: &View, ask: Ask<'_>) -> Result<Target, Refusal> {
    let (port, service) = match ask.authority {
        Authority::Addr(asked) => {
            let asked_ip = asked.ip().to_canonical();
            let own = ask.address.ip().to_canonical();
            let accepted = asked_ip == own
                || ask.local.application_tunnel.is_some()
                || is_sandwiched(view, ask, asked_ip);
            if !accepted {
                return Err(Refusal::Mismatch(own, asked_ip));
            }
            (asked.port(), meant(view, ask, asked.port()))
        }
        Authority::Host(host, port) => {
            let service = view
                .service_of_host(host, &ask.local.identity.namespace)
                .ok_or_else(|| Refusal::UnknownService(format!("{host}:{port}")))?;
            let own = ask.local.membership(&service.key).and_then(|m| m.target_port(*port));
            let target = own.or_else(|| service.target_port(*port)).filter(|target| *target != 0);
            let target = target.ok_or_else(|| Refusal::UnknownPort(format!("{host}:{port}")))?;
            (target, Some(service))
        }
    };
    if PlanConfig::is_own_port(port) {
        return Err(Refusal::Recursive);
    }
    let Some(tunnel) = ask.local.application_tunnel else {
        return Ok(Target {
            address: SocketAddr::new(ask.address.ip(), port),
            service,
            announce: None,
        });
    };
    let port = tunnel.port.unwrap_or(port);
    let announce = tunnel.proxy_protocol.then(|| announced(ask, service.as_deref())).transpose()?;
    let ip = match ask.address.ip() {
        IpAddr::V4(_) if announce.is_some() && ask.localhost_tunnel => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) if announce.is_some() && ask.localhost_tunnel => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    Ok(Target { address: SocketAddr::new(ip, port), service, announce })
}

/// Whether we stand in front of the address that is asked for, as its waypoint.
fn is_sandwiched(view: &View, ask: Ask<'_>, asked: IpAddr) -> bool {
    let is_us = |workload: &Workload| workload.uid == ask.local.uid;
    let address = NetworkAddress { network: ask.network.clone(), ip: asked };
    if let Some(workload) = view.workload_at(&address) {
        return workload.waypoint.as_ref().is_some_and(|waypoint| view.gateway_is(waypoint, is_us));
    }
    // Any namespace's: visibility is for clients.
    view.services_at(&address)
        .any(|service| service.waypoint.as_ref().is_some_and(|w| view.gateway_is(w, is_us)))
}

/// The service that the client says it meant, if this workload serves it; else one that leads to the
/// port.
fn meant(view: &View, ask: Ask<'_>, port: u16) -> Option<Arc<Service>> {
    let told = ask.meant.and_then(|host| {
        let member = ask.local.services.iter().find(|m| m.service.hostname.as_str() == host)?;
        view.service(&member.service)
    });
    told.or_else(|| view.service_on_port(ask.local, port))
}

/// The destination in a PROXY protocol header: the address that was asked for, or a VIP.
fn announced(ask: Ask<'_>, service: Option<&Service>) -> Result<SocketAddr, Refusal> {
    match ask.authority {
        Authority::Addr(asked) => Ok(*asked),
        Authority::Host(host, port) => {
            let vips = service.map(|service| service.vips.as_slice()).unwrap_or_default();
            let ours = |v4: bool| {
                vips.iter()
                    .find(|vip| vip.network == *ask.network && vip.block.ip().is_ipv4() == v4)
            };
            let vip = ours(true).or_else(|| ours(false)).or_else(|| vips.first());
            let vip = vip.ok_or_else(|| Refusal::NoVip(format!("{host}:{port}")))?;
            Ok(SocketAddr::new(vip.block.ip(), *port))
        }
    }
}

#[cfg(test)]
mod tests;
